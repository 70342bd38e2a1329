"""A recorded run is replayed from its store: exactly, or refused by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_attr import AttributionMixin, AttributionResult, AttributionTrainer
from lightning_attr.attribution import recorded_run
from lightning_attr.attribution.recorded_run import journal_steps, the_optimizer
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.errors import AttributionError
from lightning_attr.journal import Journal
from lightning_attr.methods import MAGIC, AttributionMethod, TrajectoryInfluence
from lightning_attr.store.feature_store import FeatureStore

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*in eval mode")

N = 24


class Blurred(Dataset[Any]):
    """Samples with an augmentation, and their rows."""

    def __init__(self, count: int, noise: float) -> None:
        draw = torch.Generator().manual_seed(0)
        self.x = torch.randn(count, 5, generator=draw)
        self.y = self.x[:, :3].argmax(1)
        self.noise = noise

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor, int]:
        noise = self.noise * torch.randn(5) if self.noise else torch.zeros(5)
        return self.x[row] + noise, self.y[row], row


class Net(AttributionMixin, L.LightningModule):
    """BatchNorm, dropout, a frozen BatchNorm in eval mode, two groups, a schedule."""

    def __init__(self, optimizer: str = "AdamW") -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))
        self.scale = nn.BatchNorm1d(5, affine=False).eval()
        self.optimizer = optimizer
        self.weights: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.net(self.scale(x))
        return found

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, rows = batch
        if self.weights is None:
            return F.cross_entropy(self(x), y)
        return (self.weights[rows] * F.cross_entropy(self(x), y, reduction="none")).mean()

    def attribution_step(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self(batch[0]), batch[1]

    def configure_optimizers(self) -> Any:
        groups = [{"params": self.net[0].parameters(), "lr": 0.02}, {"params": self.net[1:].parameters()}]
        kinds: dict[str, Callable[[], torch.optim.Optimizer]] = {
            "AdamW": lambda: torch.optim.AdamW(groups, lr=0.05, weight_decay=0.1, eps=1e-4),
            "SGD": lambda: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
            "RMSprop": lambda: torch.optim.RMSprop(groups, lr=0.01),
        }
        optimizer = kinds[self.optimizer]()
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
        return [optimizer], [{"scheduler": cosine, "interval": "step"}]


def loader(noise: float = 0.1) -> DataLoader[Any]:
    return DataLoader(Blurred(N, noise), batch_size=5, shuffle=True)


def targets() -> DataLoader[Any]:
    return DataLoader(Blurred(3, 0.0), batch_size=3)


def trained(
    path: Path | None,
    weights: Tensor | None = None,
    *,
    optimizer: str = "AdamW",
    callbacks: tuple[L.Callback, ...] = (),
    recording: dict[str, Any] | None = None,
    **settings: Any,
) -> AttributionTrainer:
    L.seed_everything(3, verbose=False)
    net = Net(optimizer)
    net.weights = weights
    recorder = {"snapshots": "start+geometric", "featurize": False, "log": False, **(recording or {})}
    trainer = AttributionTrainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[*callbacks, *([] if path is None else [AttributionCallback(path, **recorder)])],
        **{"precision": "64-true", **settings},
    )
    trainer.fit(net, loader())
    return trainer


def scored(trainer: AttributionTrainer, path: Path, method: AttributionMethod) -> AttributionResult:
    return trainer.attribute(train_dataloaders=loader(), target_dataloaders=targets(), method=method, store=path)


def outputs(trainer: AttributionTrainer) -> Tensor:
    x, y, _ = next(iter(targets()))
    net: Any = trainer.lightning_module
    with torch.no_grad():
        return net.eval().model_output.output(net(x.double()), y)


def differences(rows: list[int], size: float = 1e-5, **settings: Any) -> Tensor:
    found = torch.zeros(len(rows), 3, dtype=torch.float64)
    for place, row in enumerate(rows):
        for sign in (1, -1):
            weights = torch.ones(N, dtype=torch.float64)
            weights[row] += sign * size
            found[place] += sign * outputs(trained(None, weights, **settings)) / (2 * size)
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[AttributionTrainer, Path]:
    path = tmp_path_factory.mktemp("run") / "store"
    return trained(path), path


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2},
        pytest.param({"optimizer": "SGD", "gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, id="SGD"),
    ],
    ids=str,
)
def test_magic_is_what_training_again_finds(settings: dict[str, Any], tmp_path: Path) -> None:
    trainer = trained(tmp_path / "store", **settings)
    weights = {name: tensor.clone() for name, tensor in trainer.lightning_module.state_dict().items()}
    result = scored(trainer, tmp_path / "store", MAGIC(tolerance=0.0))
    found, expected = result.scores.values[[0, 5]].double(), differences([0, 5], **settings)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())
    evidence = next(iter(result.scores.provenance["evidence"].values()))
    assert set(evidence["drift"].values()) == {0.0}
    for name, tensor in trainer.lightning_module.state_dict().items():
        assert torch.equal(tensor, weights[name])


def test_scheduled_accumulation_is_replayed(tmp_path: Path) -> None:
    path = tmp_path / "store"
    trainer = trained(path, callbacks=(GradientAccumulationScheduler({1: 2, 2: 3}),))
    evidence = scored(trainer, path, MAGIC(tolerance=0.0)).scores.provenance["evidence"]
    assert set(next(iter(evidence.values()))["drift"].values()) == {0.0}


def test_random_numbers_that_nobody_knows_are_named_and_snapshots_help(
    run: tuple[AttributionTrainer, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unread(store: Any, last: Any) -> list[Any]:
        return [
            replace(step, batches=tuple(replace(batch, reading_state=None) for batch in step.batches))
            for step in journal_steps(store, last)
        ]

    monkeypatch.setattr(recorded_run, "journal_steps", unread)
    with pytest.raises(AttributionError, match=r"after 5 optimizer steps .*augmentation in worker processes"):
        scored(*run, MAGIC())
    result = scored(*run, TrajectoryInfluence())
    exact = TrajectoryInfluence()
    monkeypatch.undo()
    pair = torch.stack([result.scores.values.flatten(), scored(*run, exact).scores.values.flatten()])
    assert torch.corrcoef(pair)[0, 1] > 0.7


def test_hessians_of_the_trajectory(run: tuple[AttributionTrainer, Path]) -> None:
    exact, gram, none = (scored(*run, TrajectoryInfluence(kind)).scores.values for kind in ("exact", "gram", "none"))
    assert not torch.allclose(exact, gram)
    assert not torch.allclose(gram, none)


@pytest.fixture
def copied(run: tuple[AttributionTrainer, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(run[1], tmp_path / "store"))


def test_a_store_without_a_journal_is_refused(run: tuple[AttributionTrainer, Path], copied: Path) -> None:
    shutil.rmtree(copied / "journal")
    with pytest.raises(AttributionError, match=r"has no journal of the run.*journal=True"):
        scored(run[0], copied, MAGIC())


def test_a_journal_of_another_run_is_refused(run: tuple[AttributionTrainer, Path], tmp_path: Path) -> None:
    trained(tmp_path / "other", optimizer="SGD")
    shutil.rmtree(tmp_path / "other" / "journal")
    shutil.copytree(run[1] / "journal", tmp_path / "other" / "journal")
    with pytest.raises(AttributionError, match="is of the store"):
        scored(run[0], tmp_path / "other", MAGIC())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_scale": 8.0}, "loss of step 3 was scaled by 8 for half precision"),
        ({"optimizer": 1}, "The run has several optimizers"),
        ({"rank": 1}, "trained by several processes .step 3 has batches of process 1"),
    ],
)
def test_steps_that_cannot_be_replayed_are_refused(
    run: tuple[AttributionTrainer, Path], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    steps = Journal.steps

    def changed(self: Journal, *args: Any) -> Iterator[Any]:
        for step in steps(self, *args):
            if step.global_step < 3:
                yield step
            elif "rank" in changes:
                yield replace(step, batches=tuple(replace(batch, **changes) for batch in step.batches))
            else:
                yield replace(step, **changes)

    monkeypatch.setattr(Journal, "steps", changed)
    with pytest.raises(AttributionError, match=message):
        scored(*run, MAGIC())


def test_a_gap_and_an_unknown_order_are_refused(
    run: tuple[AttributionTrainer, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Journal, "gap", lambda self, last: "the steps 4 to 5 are missing")
    with pytest.raises(AttributionError, match=r"has a gap: the steps 4 to 5 are missing, of the 15 that led to"):
        scored(*run, MAGIC())
    monkeypatch.setattr(Journal, "unknown", "the loader streams")
    with pytest.raises(AttributionError, match="which samples the steps were taken on: the loader streams"):
        scored(*run, MAGIC())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "RMSprop"}, r"no form of the optimizer RMSprop. It has those of SGD, Adam, AdamW"),
        ({"recording": {"snapshots": "geometric"}}, "no snapshot of the weights that the run started from"),
        ({"precision": "bf16-mixed"}, "precision='bf16-mixed': a replay needs all digits"),
        pytest.param(
            {"callbacks": [getattr(lightning_callbacks, "WeightAveraging", L.Callback)()]},
            "'final' are not those that the last step led to",
            marks=pytest.mark.skipif(
                not hasattr(lightning_callbacks, "WeightAveraging"), reason="this Lightning has no such callback"
            ),
        ),
    ],
    ids=["optimizer", "start", "precision", "averaging"],
)
def test_runs_that_cannot_be_replayed_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    path = tmp_path / "store"
    trainer = trained(path, **settings)
    with pytest.raises(AttributionError, match=message):
        scored(trainer, path, MAGIC())


@pytest.mark.parametrize(
    ("optimizers", "message"),
    [
        (None, "does not say what optimizer trained the run"),
        ([], "has 0 optimizers"),
        ([{"kind": "Adam", "groups": [{"amsgrad": True}]}], "no form of Adam with amsgrad=True"),
        ([{"kind": "Adam", "module": "mine", "groups": []}], "no form of the optimizer mine.Adam"),
    ],
)
def test_optimizers_without_a_form_are_refused(optimizers: Any, message: str) -> None:
    with pytest.raises(AttributionError, match=message):
        the_optimizer(optimizers)


def test_the_store_knows_which_layers_rest(run: tuple[AttributionTrainer, Path]) -> None:
    settings = FeatureStore.open(run[1]).manifest.training
    assert settings is not None
    assert settings["resting"] == ["scale"]
