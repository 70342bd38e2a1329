"""Steps are replayed in the world of their fit: epoch, step, stage, loggers, loader, datamodule, optimizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from cases import blobs, loader_of, quiet_trainer
from lightning_attr.attribution.trainer import attribute
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.errors import AttributionError
from lightning_attr.methods import GradDot

X, Y = torch.eye(6)[:, :3] + 0.1, torch.linspace(-1, 1, 6)[:, None]


class Data(L.LightningDataModule):
    scale = 2.0

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(X, Y), 3, shuffle=True)


class Annealed(L.LightningModule):
    """A loss with a weight that depends on all that a step can ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert self.trainer.training
        assert len(self.loggers) == 2
        self.loggers[1].log_metrics({"x": 1.0}, step=0)
        assert len(self.trainer.train_dataloader.dataset) == 6
        assert self.trainer.num_training_batches == 2
        assert self.optimizers().param_groups[0]["lr"] == 0.1
        weight = (1 + self.current_epoch) * self.trainer.datamodule.scale + self.global_step
        return weight * F.mse_loss(self.layer(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def losses(weights: Any, epoch: int, step: int) -> Tensor:
    output = X @ weights["layer.weight"].T + weights["layer.bias"]
    return ((1 + epoch) * 2.0 + step) * (output - Y).square().flatten()


def test_each_snapshot_has_its_own_epoch_and_step(tmp_path: Any) -> None:
    def trainer(*callbacks: Any) -> Any:
        loggers = [CSVLogger(tmp_path / name) for name in "ab"]
        return quiet_trainer(max_epochs=3, logger=loggers, callbacks=[*callbacks], log_every_n_steps=1)

    callback = AttributionCallback(tmp_path / "store", GradDot(), snapshots="all", log=False, on_error="raise")
    run, module = trainer(callback), Annealed()
    run.fit(module, datamodule=Data())
    assert [(s.epoch, s.global_step) for s in callback.store.snapshots] == [(0, 2), (1, 4), (2, 6)]
    for snapshot in callback.store.snapshots:
        expected = losses(callback.store.weights(snapshot.key), snapshot.epoch, snapshot.global_step)
        torch.testing.assert_close(callback.store.column(snapshot.key, "loss"), expected)
    stage, epoch = run.state.stage, run.current_epoch
    last = losses(module.state_dict(), 2, 6).detach()
    here = run.attribute(targets="train", method=GradDot(exact=True))
    torch.testing.assert_close(here.loss, last)
    assert (run.state.stage, run.current_epoch) == (stage, epoch)
    other = attribute(
        trainer(), Data(), model=Annealed(), store=tmp_path / "store", targets="train", method=GradDot(exact=True)
    )
    torch.testing.assert_close(other.loss, last)
    torch.testing.assert_close(other.scores.values, here.scores.values)


class StartsLate(L.LightningModule):
    """Its hooks make what its step needs, and report through Lightning."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)

    def on_train_start(self) -> None:
        self.losses: list[Tensor] = []

    def on_train_epoch_start(self) -> None:
        self.factor = 0.5**self.current_epoch
        self.log("factor", self.factor)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.factor * F.cross_entropy(self.layer(batch[0]), batch[1])
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_what_hooks_make_when_training_starts_is_there_before(tmp_path: Path) -> None:
    trained = []
    for callbacks in ([], [AttributionCallback(tmp_path)]):
        module, trainer = StartsLate(), quiet_trainer(max_epochs=2, callbacks=callbacks)
        trainer.fit(module, loader_of(blobs(16)))
        trained.append((module.layer.weight.clone(), len(module.losses)))
    assert torch.equal(trained[0][0], trained[1][0])
    assert trained[0][1] == trained[1][1] == 4


def test_a_step_that_fails_after_its_hooks_as_well_fails_as_it_did() -> None:
    class Broken(StartsLate):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.layer(batch[0]).sum() * self.missing

    trainer = quiet_trainer(max_epochs=1, callbacks=[AttributionCallback()])
    with pytest.raises(AttributionError, match=r"The code of Broken reads `self.missing`, which it does not have") as e:
        trainer.fit(Broken(), loader_of(blobs(16)))
    assert "'Broken' object has no attribute 'missing'" in str(e.value.__cause__)
