"""Steps are replayed in the world of their fit: epoch, step, stage, loggers, loader, datamodule, optimizers."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from cases import quiet_trainer
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.methods import GradDot
from lightning_attr.trainer import attribute

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
