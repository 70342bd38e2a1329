"""At the end of which epochs a snapshot is taken, and that the last one never fails to be."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from torch import Tensor
from torch.nn import functional as F

from cases import BlobClassifier, blobs, loader_of, quiet_trainer, told
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.callbacks.schedule import SnapshotSchedule, epoch_limit
from lightning_attr.errors import NonFiniteGradientError
from lightning_attr.parameters.weights import weights_of
from lightning_attr.store.manifest import Snapshot

# Only early stopping needs validation data here.
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


@pytest.mark.parametrize(
    ("snapshots", "due"),
    [
        ("geometric", [0, 1, 2, 4, 8, 16, 32]),
        ("all", list(range(40))),
        (7, [0, 7, 14, 21, 28, 35]),
        (1, list(range(40))),
        ([3, 1], [1, 3]),
        ([3, -1], [-1, 3]),
        ("start+geometric", [-1, 0, 1, 2, 4, 8, 16, 32]),
        ("early+geometric", [-1, 0, 1, 2, 4, 8, 16, 32]),
        ((), []),
        (range(2), [0, 1]),
    ],
)
def test_due(snapshots: Any, due: list[int]) -> None:
    schedule = SnapshotSchedule(snapshots)
    assert [epoch for epoch in range(-1, 40) if schedule.due(epoch)] == due
    for epochs in range(1, 40):
        expected = {epoch for epoch in due if epoch < epochs} | {epochs - 1}
        assert schedule.count(epochs) == len(expected)
    assert schedule.count(0) == (-1 in due)


@pytest.mark.parametrize("snapshots", ["often", 0, -1, True, [-2], [0.5], [True], 2.0, None])
def test_bad_schedule(snapshots: Any) -> None:
    with pytest.raises(
        ValueError,
        match=r"Expected argument `snapshots(\[0\])?` of .* to be ('geometric'|an integer >=)",
    ):
        SnapshotSchedule(snapshots)
    with pytest.raises(ValueError, match="Expected argument `snapshots"):
        AttributionCallback(snapshots=snapshots)


def test_the_start_of_training(tmp_path: Path) -> None:
    module = BlobClassifier()
    start = {name: tensor.clone() for name, tensor in weights_of(module).items()}
    callback = AttributionCallback(tmp_path / "run", snapshots="start+geometric", featurize=True)
    trainer = quiet_trainer(max_epochs=2, callbacks=[callback])
    trainer.fit(module, loader_of(blobs(20), shuffle=True))
    first, second, third = callback.store.snapshots
    assert (first.key, first.epoch, first.global_step, first.learning_rate) == ("start", -1, 0, 0.0)
    assert all(torch.equal(tensor, start[name]) for name, tensor in callback.store.weights("start").items())
    assert not callback.store.missing("start")
    assert (second.epoch, third.epoch) == (0, 1)
    assert second.learning_rate == pytest.approx(3 * 0.1)
    result = trainer.attribute(target_dataloaders=loader_of(blobs(5, seed=1)))
    assert result.scores.provenance["snapshots"] == ["start", second.key, third.key]


def test_a_start_that_is_nan_is_refused(tmp_path: Path) -> None:
    module = BlobClassifier()
    with torch.no_grad():
        module.network[0].bias[0] = float("nan")
    callback = AttributionCallback(tmp_path / "run", snapshots=[-1])
    with pytest.raises(NonFiniteGradientError, match="NaN"):
        quiet_trainer(max_epochs=1, callbacks=[callback]).fit(module, loader_of(blobs(20)))


class Weights(L.Callback):
    """Collects the weights at the end of every epoch, and of training."""

    def __init__(self) -> None:
        self.seen: dict[int, dict[str, Tensor]] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.on_train_epoch_end(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.on_train_epoch_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seen[trainer.global_step] = {name: tensor.clone() for name, tensor in weights_of(pl_module).items()}


class StopAt(L.Callback):
    """Ends training after a number of steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step >= self.step


class ClockAt(Timer):
    """A time limit that is reached at a step instead of a time."""

    def __init__(self, step: int) -> None:
        super().__init__(duration=timedelta(hours=1))
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step >= self.step:
            self._duration = 0.0
        super().on_train_batch_end(trainer, *args, **kwargs)


def snapshots_of(
    tmp_path: Any, module: L.LightningModule | None = None, schedule: Any = "geometric", **settings: Any
) -> tuple[Snapshot, ...]:
    """Train on 5 batches per epoch; check every snapshot against the weights at that moment."""
    weights = Weights()
    callback = AttributionCallback(tmp_path / "store", snapshots=schedule, featurize=False)
    settings["callbacks"] = [weights, *settings.get("callbacks", []), callback]
    trainer = quiet_trainer(L.Trainer, **settings)
    needs_val = any(isinstance(c, EarlyStopping) for c in settings["callbacks"])
    val = loader_of(blobs(9, seed=1)) if needs_val else None
    trainer.fit(module or BlobClassifier(), loader_of(blobs(20), batch_size=4, shuffle=True), val)
    for snapshot in callback.store.snapshots:
        stored = callback.store.weights(snapshot.key)
        assert stored.keys() == weights.seen[snapshot.global_step].keys()
        assert all(torch.equal(stored[name], tensor) for name, tensor in weights.seen[snapshot.global_step].items())
    return callback.store.snapshots


@pytest.mark.parametrize(
    ("schedule", "settings", "expected"),
    [
        ("geometric", {"max_epochs": 7}, [(0, 5), (1, 10), (2, 15), (4, 25), (6, 35)]),
        ("geometric", {"max_epochs": 5}, [(0, 5), (1, 10), (2, 15), (4, 25)]),
        ("all", {"max_epochs": 3}, [(0, 5), (1, 10), (2, 15)]),
        (2, {"max_epochs": 4}, [(0, 5), (2, 15), (3, 20)]),
        ([1], {"max_epochs": 3}, [(1, 10), (2, 15)]),
        ([], {"max_epochs": 2}, [(1, 10)]),
        # Ends that are known in advance, at the end of an epoch or within one.
        ([0], {"max_steps": 15}, [(0, 5), (2, 15)]),
        ([0], {"max_steps": 12}, [(0, 5), (2, 12)]),
        ([0], {"max_steps": 3}, [(0, 3)]),
        ([0], {"max_steps": 12, "max_epochs": 2}, [(0, 5), (1, 10)]),
        ([0], {"max_epochs": 3, "accumulate_grad_batches": 2}, [(0, 3), (2, 9)]),
        # Ends that nobody knows in advance.
        ([0], {"max_epochs": 9, "callbacks": [StopAt(15)]}, [(0, 5), (2, 15)]),
        ([0], {"max_epochs": 9, "callbacks": [StopAt(12)]}, [(0, 5), (2, 12)]),
        ([0], {"max_epochs": 9, "callbacks": [ClockAt(12)]}, [(0, 5), (2, 12)]),
        ("all", {"max_epochs": 9, "callbacks": [StopAt(12)]}, [(0, 5), (1, 10), (2, 12)]),
        ([0], {"max_epochs": -1, "callbacks": [StopAt(12)]}, [(0, 5), (2, 12)]),
        (
            [0],
            {"max_epochs": 9, "callbacks": [EarlyStopping("val_loss", patience=2, min_delta=9.0)]},
            [(0, 5), (2, 15)],
        ),
    ],
)
def test_snapshots(tmp_path: Any, schedule: Any, settings: dict[str, Any], expected: list[tuple[int, int]]) -> None:
    found = snapshots_of(tmp_path, schedule=schedule, **settings)
    assert [(snapshot.epoch, snapshot.global_step) for snapshot in found] == expected
    assert [s.key for s in found] == [f"epoch={epoch:04d}-step={step:06d}" for epoch, step in expected]


@pytest.mark.parametrize(
    ("batch_size", "settings", "steps"),
    [
        (1, {}, [0, 4, 8, 16, 20, 40]),
        (4, {}, [0, 4, 5, 10]),
        (1, {"accumulate_grad_batches": 3}, [0, 4, 7, 14]),
        (5, {}, [0, 4, 8]),  # the last step of an epoch has one in any case
        (1, {"max_steps": 9}, [0, 4, 8, 9]),
    ],
)
def test_steps_of_the_first_epoch(tmp_path: Path, batch_size: int, settings: dict[str, Any], steps: list[int]) -> None:
    weights = Weights()
    callback = AttributionCallback(tmp_path, snapshots="early+geometric", featurize=False)
    trainer = quiet_trainer(max_epochs=2, callbacks=[weights, callback], **settings)
    trainer.fit(BlobClassifier(), loader_of(blobs(20), batch_size=batch_size, shuffle=True))
    found = callback.store.snapshots
    assert [snapshot.global_step for snapshot in found] == steps
    assert [s.key for s in found[1:]] == [f"epoch={s.epoch:04d}-step={s.global_step:06d}" for s in found[1:]]
    for snapshot, before in zip(found[1:], found, strict=False):
        stored = callback.store.weights(snapshot.key)
        assert all(torch.equal(stored[name], tensor) for name, tensor in weights.seen[snapshot.global_step].items())
        assert snapshot.learning_rate == pytest.approx(0.1 * (snapshot.global_step - before.global_step))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_resumed_in_and_after_the_first_epoch(tmp_path: Path) -> None:
    def fit(name: str, epochs: int, *more: L.Callback, **settings: Any) -> Any:
        torch.manual_seed(0)
        callback = AttributionCallback(tmp_path / name, snapshots="early+geometric", featurize=False)
        trainer = quiet_trainer(max_epochs=epochs, callbacks=[callback, *more], enable_checkpointing=bool(more))
        trainer.fit(BlobClassifier(), loader_of(blobs(20), batch_size=2), **settings)
        return [(s.key, s.weights, s.learning_rate) for s in callback.store.snapshots]

    whole = fit("whole", 3)
    assert [key for key, *_ in whole][:4] == ["start", *(f"epoch=0000-step=0000{step}" for step in ("04", "08", "10"))]
    fit("broken", 1, ModelCheckpoint(tmp_path / "checkpoints", filename="{step}", every_n_train_steps=1, save_top_k=-1))
    assert fit("broken", 3, ckpt_path=tmp_path / "checkpoints" / "step=10.ckpt") == whole
    with told("is written anew from step 8 on"):  # Lightning begins the epoch's batches again: another course
        again = fit("broken", 3, ckpt_path=tmp_path / "checkpoints" / "step=5.ckpt")
    assert [key for key, *_ in again] == [key for key, *_ in whole]


class TwoSteps(BlobClassifier):
    """Two optimizers, so that Lightning counts two steps per batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.network[0], self.network[2])]


def test_steps_of_several_optimizers(tmp_path: Path) -> None:
    callback = AttributionCallback(tmp_path, snapshots="early+geometric", featurize=False)
    quiet_trainer(max_epochs=1, callbacks=[callback]).fit(TwoSteps(), loader_of(blobs(13), batch_size=1))
    assert [snapshot.global_step for snapshot in callback.store.snapshots] == [0, 4, 8, 16, 26]


class Scheduled(BlobClassifier):
    """Two parameter groups of different size and learning rate, both falling from step to step."""

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": list(self.network[0].parameters()), "lr": 0.1},
            {"params": list(self.network[2].parameters()), "lr": 0.01},
        ]
        optimizer = torch.optim.SGD(groups)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.parametrize(("accumulate", "steps"), [(1, [5, 10, 20]), (2, [3, 6, 12]), (5, [1, 2, 4])])
def test_integrated_learning_rate(tmp_path: Any, accumulate: int, steps: list[int]) -> None:
    found = snapshots_of(tmp_path, Scheduled(), schedule=[0, 1], max_epochs=4, accumulate_grad_batches=accumulate)
    sizes, rates = (4 * 8 + 8, 8 * 3 + 3), (0.1, 0.01)
    average = sum(size * rate for size, rate in zip(sizes, rates, strict=True)) / sum(sizes)
    bounds = [0, *steps]
    for snapshot, start, stop in zip(found, bounds, steps, strict=False):
        assert snapshot.global_step == stop
        assert snapshot.learning_rate == pytest.approx(sum(average / (1 + step) for step in range(start, stop)))


class Alternating(Scheduled):
    """Two optimizers that step one after the other: each moves its own parameters only."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        parts = (self.network[0], 0.1), (self.network[2], 0.01)
        return [torch.optim.SGD(part.parameters(), lr=lr) for part, lr in parts]


def test_integrated_learning_rate_of_two_optimizers(tmp_path: Any) -> None:
    (snapshot,) = snapshots_of(tmp_path, Alternating(), max_epochs=1)
    assert snapshot.global_step == 10  # Lightning counts the steps of both
    assert snapshot.learning_rate == pytest.approx(5 * (40 * 0.1 + 27 * 0.01) / 67)


class Quasi(BlobClassifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)


class Partly(BlobClassifier):
    """Frozen parameters stand in the optimizer, and count for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.network[0].requires_grad_(False)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([
            {"params": part.parameters(), "lr": lr} for part, lr in ((self.network[0], 9.0), (self.network[2], 0.1))
        ])


@pytest.mark.parametrize("module", [BlobClassifier, Quasi, Partly])
def test_integrated_learning_rate_counts_steps(tmp_path: Any, module: type[BlobClassifier]) -> None:
    (snapshot,) = snapshots_of(tmp_path, module(), max_epochs=1)
    assert snapshot.learning_rate == pytest.approx(5 * 0.1)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_epochs": 3}, 3),
        ({"max_epochs": -1}, 0),
        ({"max_steps": 11}, 3),
        ({"max_steps": 10}, 2),
        ({"max_steps": 6, "accumulate_grad_batches": 2}, 3),
        ({"max_steps": 11, "max_epochs": 2}, 2),
    ],
)
def test_epoch_limit(settings: dict[str, Any], expected: int) -> None:
    found = []

    class Ask(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            found.append(epoch_limit(trainer))
            trainer.should_stop = True

    trainer = quiet_trainer(L.Trainer, callbacks=[Ask()], **settings)
    trainer.fit(BlobClassifier(), loader_of(blobs(20), batch_size=4))
    assert found == [expected]
