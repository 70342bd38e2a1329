"""Lightning's command line, with a subcommand for attribution."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from cases import BlobClassifier, blobs, loader_of
from lightning_attr import AttributionResult, AttributionTrainer
from lightning_attr.methods import TRAK, GradDot
from lightning_attr.projectors import KroneckerProjector

pytest.importorskip("jsonargparse")

TRAINER = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
TRAINER += ["--trainer.enable_model_summary=false"]


class Net(BlobClassifier):
    """Without arguments, as a command line makes it."""

    def __init__(self) -> None:
        super().__init__()


class Blobs(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader_of(blobs(20))

    def test_dataloader(self) -> Any:
        return loader_of(blobs(6, seed=1))


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    kept = ModelCheckpoint(tmp_path, filename="kept")
    settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    L.Trainer(max_epochs=1, callbacks=[kept], **settings).fit(Net(), datamodule=Blobs())
    return tmp_path / "kept.ckpt"


def run(*arguments: str) -> Any:
    from lightning_attr.cli import AttributionCLI

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["main.py", *arguments])
        return AttributionCLI(Net, Blobs, save_config_callback=None, seed_everything_default=0)


def test_attribute(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli = run("attribute", *TRAINER, f"--ckpt_path={checkpoint}", "--method=GradDot", "--method.exact=true", "--topk=3")
    assert "AttributionResult by GradDot: 20 training samples x 6 targets" in capsys.readouterr().out
    plain = AttributionTrainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    expected = plain.attribute(Blobs(), model=Net(), ckpt_path=checkpoint, method=GradDot(exact=True), topk=3)
    assert torch.equal(cli.result.scores.proponents, expected.scores.proponents)
    saved = AttributionResult.load("attribution_result")
    assert torch.equal(saved.scores.proponent_scores, expected.scores.proponent_scores)
    assert Path("attribution_result/report.html").is_file()

    again = run("--config", "attribution_result/config.yaml", "attribute")
    assert torch.equal(again.result.scores.proponents, expected.scores.proponents)


def test_check(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callback = ["--trainer.callbacks=lightning_attr.callbacks.AttributionCallback", "--trainer.max_epochs=3"]
    found = run("check", *TRAINER, *callback).checked
    assert (found.ok, found.num_samples, found.snapshots) == (True, 20, 3)
    assert "Attribution of Net by TRAK: 20 training samples" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        run("check", *TRAINER, *callback, "--trainer.callbacks.noise_mask=[true]")
    assert left.value.code == 1
    assert "would be refused: ValueError: Expected argument `noise_mask`" in capsys.readouterr().out
    with pytest.raises(ValueError, match="Expected an AttributionCallback among the Trainer's callbacks"):
        run("check", *TRAINER)


def test_every_argument_in_the_config(checkpoint: Path) -> None:
    text = f"""
trainer: {{accelerator: cpu, logger: false, enable_progress_bar: false, enable_model_summary: false}}
ckpt_path: [{checkpoint}]
targets: train
method:
  class_path: lightning_attr.methods.TRAK
  init_args:
    damping: 0.5
    projector: {{class_path: lightning_attr.projectors.KroneckerProjector, init_args: {{proj_dim: 16}}}}
"""
    Path("config.yaml").write_text(text)
    found = run("attribute", "--config", "config.yaml").result
    plain = AttributionTrainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    method = TRAK(damping=0.5, projector=KroneckerProjector(16))
    expected = plain.attribute(Blobs(), model=Net(), ckpt_path=checkpoint, method=method, targets="train")
    assert torch.equal(found.scores.values, expected.scores.values)


def test_the_other_subcommands_stay(checkpoint: Path) -> None:
    assert run("fit", *TRAINER, "--trainer.max_epochs=1").result is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method=TRAC"], "There is no method TRAC: did you mean TracIn? There are "),
        (["--method=lightning_attr.methods.gradDot"], "did you mean GradDot?"),
        (["--method.class_path=tracin"], "did you mean TracIn?"),
        (["--method=Unheard"], "There is no method Unheard: There are "),
        (["--topk=many"], "topk"),
        (["--print_configs"], "print_configs"),
    ],
)
def test_what_is_wrong_is_named(
    checkpoint: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run("attribute", *TRAINER, *arguments)
    assert message in capsys.readouterr().err
    assert not Path("attribution_result").exists()
