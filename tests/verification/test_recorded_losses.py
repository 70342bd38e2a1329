"""A step that uses what only its fit had is not silently another one later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cases import BlobClassifier, blobs, loader_of, quiet_trainer
from lightning_attr import attribute
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.errors import StoreMismatchError
from lightning_attr.methods import TRAK, GradDot
from lightning_attr.projectors import IdentityProjector


class Annealed(L.LightningModule):
    """Its loss depends on how far the run has come, as the Trainer's `max_epochs` tells."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.network = BlobClassifier(seed=seed).network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        share = (self.trainer.current_epoch + 1) / self.trainer.max_epochs
        return F.cross_entropy(self(x), y) + share * self(x).square().mean()


@pytest.mark.parametrize("epochs", [4, 400])
def test_another_trainer_gives_the_same_losses_or_is_refused(tmp_path: Path, epochs: int) -> None:
    train, targets = loader_of(blobs(20)), loader_of(blobs(5, seed=1))
    callback = AttributionCallback(tmp_path, method=GradDot(IdentityProjector()), feature_dtype="float32")
    trainer = quiet_trainer(max_epochs=4, callbacks=[callback])
    trainer.fit(Annealed(), train)
    own = trainer.attribute(target_dataloaders=targets)
    later: dict[str, Any] = {"train_dataloaders": train, "target_dataloaders": targets, "store": tmp_path}
    later["method"] = callback.method
    other = quiet_trainer(max_epochs=epochs)
    if epochs == 4:
        again = attribute(other, model=Annealed(seed=3), **later)
        torch.testing.assert_close(again.scores.values, own.scores.values)
        return
    with pytest.raises(StoreMismatchError, match=r"not those on record \(dataset\[0\]: .* now .*`max_epochs`"):
        attribute(other, model=Annealed(seed=3), **later)


class Rated(Annealed):
    """Its loss depends on the learning rate, which a scheduler lowers."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        optimizer: Any = self.optimizers()
        return F.cross_entropy(self(x), y) + 10 * optimizer.param_groups[0]["lr"] * self(x).square().mean()


class Counted(Annealed):
    """Its loss depends on how often it was called."""

    calls = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.calls += 1
        return (1 + 0.1 * self.calls) * F.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        (Rated, r"step of Rated asks for `self\.optimizers\(\)`\. Learning rates, .* are those of the end of training"),
        (Counted, r"step of Counted changes `calls`, and training has gone on with that.*`register_buffer`"),
    ],
)
def test_the_cause_is_named(kind: Any, cause: str, tmp_path: Path) -> None:
    callback = AttributionCallback(tmp_path, method=TRAK(8))
    trainer = quiet_trainer(max_epochs=4, callbacks=[callback])
    trainer.fit(kind(), loader_of(blobs(20)))
    with pytest.raises(StoreMismatchError, match=f"not those on record .*{cause}"):
        trainer.attribute(targets="train")


def test_where_nothing_is_on_record_it_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = AttributionCallback(tmp_path, method=GradDot(exact=True))
    trainer = quiet_trainer(max_epochs=2, callbacks=[callback])
    trainer.fit(Rated(), loader_of(blobs(20)))
    trainer.attribute(targets="train")
    assert "step of Rated asks for `self.optimizers()`. Learning rates, and the state" in caplog.text


class Turned(Annealed):
    """Its loss depends on an attribute that a callback sets, and leaves otherwise at the end."""

    alpha = 1.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.alpha * F.cross_entropy(self(batch[0]), batch[1])


class Turns(L.Callback):
    def __init__(self, last: float) -> None:
        self.last = last

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.alpha = self.last


@pytest.mark.parametrize("last", [1.0, 5.0])
@pytest.mark.parametrize("method", [GradDot(exact=True), TRAK()], ids=["runs the module", "features later"])
def test_without_features_the_losses_of_training_are_known_as_well(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, method: Any, last: float
) -> None:
    callback = AttributionCallback(tmp_path, method=method)
    trainer = quiet_trainer(max_epochs=2, callbacks=[callback, Turns(last)])
    trainer.fit(Turned(), loader_of(blobs(20)))
    assert all(len(snapshot.losses) == 4 and not snapshot.shards for snapshot in callback.store.snapshots)
    with caplog.at_level("WARNING"):
        trainer.attribute(targets="train")
    told = "are not those on record" in caplog.text and "Scores are of the losses as they are now" in caplog.text
    assert told == (last != 1.0)


def test_a_loss_that_cannot_be_noted_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise ValueError("no disk")

    told: list[str] = []
    monkeypatch.setattr("lightning_attr.callbacks.snapshot_recorder.note_first_losses", fails)
    monkeypatch.setattr("lightning_attr.callbacks.snapshot_recorder.rank_zero_warn", told.append)
    callback = AttributionCallback(tmp_path, method=GradDot(exact=True))
    quiet_trainer(max_epochs=1, callbacks=[callback]).fit(Annealed(), loader_of(blobs(20)))
    assert callback.stopped is None
    assert [snapshot.losses for snapshot in callback.store.snapshots] == [None]
    assert "losses of a snapshot were not noted, recording goes on: ValueError: no disk." in told[0]
