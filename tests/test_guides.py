"""The code of the guides runs as it stands, with a module and loaders in place of the reader's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import Subset

from cases import QUIET, BlobClassifier, blobs, loader_of, quiet_trainer
from lightning_attr import AttributionMixin, AttributionResult, FeatureStore, ScoreMatrix
from lightning_attr.__main__ import main
from lightning_attr.callbacks import AttributionCallback, DataCuration
from lightning_attr.methods import TRAK, GradDot


class LibraryModule(L.LightningModule):
    """The loss weighs a batch as a whole, so that the mixin is needed; a dict batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self(batch["x"]) - batch["y"]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Blobs(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader_of(blobs(20))

    def test_dataloader(self) -> Any:
        return loader_of(blobs(8, seed=1))


def test_your_module(repository: Path) -> None:
    text = (repository / "examples" / "guides" / "your_module.md").read_text()
    two_lines, mixin, mode, rehearsal, look = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    data = [{"x": torch.randn(3), "y": torch.randn(2)} for _ in range(8)]
    names: dict[str, Any] = {
        "Trainer": lambda **settings: L.Trainer(**{**QUIET, **settings}),
        "LibraryModule": LibraryModule,
        "module": LibraryModule(),
        "train_loader": loader_of(data, 4, shuffle=True),
        "target_loader": loader_of(data[:3]),
    }
    exec(two_lines, names)
    assert names["result"].scores.shape == (8, 3)

    exec(mixin, names)
    names["module"] = names["Mine"]()
    exec(two_lines.replace('"attribution"', '"of the mixin"'), names)
    assert names["result"].scores.shape == (8, 3)

    exec(f"callback = {mode}", names)
    assert names["callback"].mode == "train"
    exec(rehearsal, names)
    exec(look, names)
    assert names["check"].ok
    assert len(text.splitlines()) < 200


def test_your_checkpoints(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (repository / "examples" / "guides" / "your_checkpoints.md").read_text()
    attribute, store, report, _ = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)  # tests/test_commands.py
    commands = text.split("# The command")[1].split("```")[1]
    kept = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    settings = {**QUIET, "enable_checkpointing": True, "max_epochs": 3, "callbacks": [kept]}
    L.Trainer(**settings).fit(BlobClassifier(), datamodule=Blobs())
    names: dict[str, Any] = {"datamodule": Blobs(), "model": BlobClassifier()}

    exec(attribute, names)
    assert len(names["result"].scores.provenance["snapshots"]) == 3
    assert names["indices"].shape[1] == 5
    exec(store, names)
    assert names["again"].scores.shape == names["result"].scores.shape
    exec(report, names)
    assert names["page"].is_file()

    for folder in ("attribution", "other"):
        arguments = {"model": names["model"], "ckpt_path": "epoch=0.ckpt", "store": folder}
        names["trainer"].attribute(names["datamodule"], **arguments)
    for command in commands.strip().splitlines():
        program, *arguments = command.split()
        assert program == "lightning-attr"
        assert main(arguments) == 0
    assert (tmp_path / "ensemble" / "manifest.json").is_file()


def test_extending(repository: Path) -> None:
    text = (repository / "examples" / "guides" / "extending.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == len(re.findall("^## ", text, flags=re.MULTILINE)) == 6
    model = BlobClassifier()
    trainer = quiet_trainer(enable_checkpointing=False)
    names = {"trainer": trainer, "model": model, "datamodule": Blobs(), "ModelClass": LibraryModule}
    exec("\n".join(blocks), names)
    assert names["result"].scores.values.abs().max() <= 1.0001
    dots = trainer.attribute(Blobs(), model=model, method=GradDot(exact=True)).scores.values
    assert torch.allclose(names["influence"].scores.values, dots / 20, rtol=1e-4, atol=1e-6)
    assert names["projected"].scores.shape == (20, 8)
    assert names["agreement"].compute() == 1


class YourTagger(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens)


def token_loss(outputs: Tensor, tags: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs.transpose(1, 2), tags, reduction="none").sum(1)


def test_beyond_classifiers(repository: Path) -> None:
    (block,) = code(repository, "beyond_classifiers")
    names: dict[str, Any] = {"YourTagger": YourTagger, "token_loss": token_loss, "AttributionMixin": AttributionMixin}
    exec(block, names)
    data = [{"tokens": torch.tensor([i % 5, 1, 2]), "tags": torch.tensor([0, 1, 2])} for i in range(8)]
    loader = loader_of(data)
    trainer = quiet_trainer(enable_checkpointing=False)
    result = trainer.attribute(model=names["LitTagger"](), train_dataloaders=loader, target_dataloaders=loader)
    assert result.scores.shape == (8, 8)


def test_evaluating_scores_shows_what_the_readme_shows(repository: Path) -> None:
    (block,) = code(repository, "evaluating_scores")  # tests/test_readme.py runs it
    assert block in (repository / "README.md").read_text("utf-8")


def test_every_link_leads_somewhere(repository: Path) -> None:
    pages = [repository / "README.md", *(repository / "examples").rglob("*.md"), *(repository / "tests").rglob("*.md")]
    pages += (repository / ".github").glob("*.md")
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#]+)", page.read_text("utf-8"))]
    local = [(page, link) for page, link in links if "://" not in link]
    assert len(local) > 20
    assert [link for page, link in local if not (page.parent / link).exists()] == []


def test_the_site_has_every_guide_and_every_public_module(repository: Path) -> None:
    guides = repository / "examples" / "guides"
    index = (guides / "index.md").read_text("utf-8")
    pages = {page.relative_to(guides).with_suffix("").as_posix() for page in guides.rglob("*.md")} - {"index"}
    assert pages == {line for block in index.split("```{toctree}")[1:] for line in block.split() if line in pages}
    shown = {
        module for page in (guides / "api").glob("*.md") for module in re.findall("automodule:: (.*)", page.read_text())
    }
    rooms = {
        file.parent.name
        for file in (repository / "lightning_attr").glob("*/__init__.py")
        if "__all__" in file.read_text()
    }
    assert shown >= {f"lightning_attr.{room}" for room in rooms} | {"lightning_attr", "lightning_attr.callbacks"}


def code(repository: Path, guide: str) -> list[str]:
    """The blocks of a guide that are Python."""
    text = (repository / "examples" / "guides" / f"{guide}.md").read_text("utf-8")
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def test_selecting_data(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    choose, curate = code(repository, "selecting_data")
    generator = torch.Generator().manual_seed(0)
    scores = ScoreMatrix(torch.randn(30, 5, generator=generator))
    result = AttributionResult(scores, torch.rand(30), torch.rand(30), torch.arange(30) % 3)
    names: dict[str, Any] = {"result": result, "train_set": blobs(30), "Subset": Subset}
    exec(choose, names)
    assert (len(names["keep"]), len(names["smaller"])) == (27, 6)
    names |= {"Trainer": lambda **settings: L.Trainer(**{**QUIET, **settings}), "model": BlobClassifier()}
    names |= {"AttributionCallback": AttributionCallback, "DataCuration": DataCuration}
    exec(curate, {**names, "train_loader": loader_of(blobs(20), shuffle=True)})


def test_pilots(repository: Path, tmp_path: Path) -> None:
    text = (repository / "examples" / "guides" / "pilots.md").read_text()
    short, own = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)

    class LitClassifier(BlobClassifier):
        def __init__(self, width: int = 64) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.network = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))

    trainer = quiet_trainer(
        max_epochs=2, gradient_clip_val=1.0, callbacks=[AttributionCallback(tmp_path, TRAK(16), log=False)]
    )
    trainer.fit(LitClassifier(), datamodule=Blobs())
    names: dict[str, Any] = {"trainer": trainer, "datamodule": Blobs(), "LitClassifier": LitClassifier}
    names["Trainer"] = lambda **settings: L.Trainer(**{**QUIET, **settings})
    exec(short, names)
    assert len(names["result"].scores.provenance["parts"]) == 3
    FeatureStore.open(tmp_path).set_aside(["pilot=0000", "pilot=0001"])
    exec(own, names)
    assert len(names["result"].scores.provenance["parts"]) == 3
