"""A run with a store, and modules that can or cannot be made again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cases import blobs, loader_of, quiet_trainer
from lightning_attr import AttributionMixin
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.methods import TRAK

N, M, EPOCHS = 40, 6, 4


class Fresh(AttributionMixin, L.LightningModule):
    """A small classifier with other weights each time."""

    def __init__(self, learning_rate: float = 0.1, width: int = 6) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.hparams["learning_rate"], momentum=0.5)


class Data(L.LightningDataModule):
    def __init__(self, batch_size: int = 8) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> Any:
        return loader_of(blobs(N), self.batch_size, shuffle=True)

    def test_dataloader(self) -> Any:
        return loader_of(blobs(M, seed=1))


def recorded(folder: Path, module: L.LightningModule | None = None, **settings: Any) -> Any:
    """A trainer that has fitted with the callback."""
    L.seed_everything(3, verbose=False)
    method = settings.pop("method", TRAK(16))
    callbacks = [AttributionCallback(folder, method, log=False), *settings.pop("callbacks", [])]
    trainer = quiet_trainer(callbacks=callbacks, **{"max_epochs": EPOCHS, **settings})
    trainer.fit(module or Fresh(0.2), datamodule=Data())
    return trainer


def attribute_with_pilots(folder: str, side_file: str) -> None:
    """For a process that is killed: from the store alone; each batch of a pilot is told to a file."""
    path = Path(side_file)

    class Slow(Fresh):
        def on_train_batch_end(self, *args: Any) -> None:
            with path.open("a") as file:
                file.write("x")

    trainer = quiet_trainer()
    trainer.attribute(Data(), model=Slow(0.2), store=folder, pilots=2)
