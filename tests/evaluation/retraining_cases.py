"""Modules, Trainers and data that other processes can import too."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cases import blobs, loader_of, quiet_trainer
from lightning_attr import AttributionMixin

N_TRAIN, N_TARGET = 24, 5


class Tiny(AttributionMixin, L.LightningModule):
    """A small classifier with random weights; it tells a side file, if there is one, of each training."""

    def __init__(self, side_file: str | None = None, learning_rate: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters("learning_rate")
        self.network = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.2), nn.Tanh(), nn.Linear(4, 3))
        self.side_file = side_file

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.hparams["learning_rate"])

    def on_train_start(self) -> None:
        if self.side_file is not None:
            # One write of one line: several processes append to the file.
            descriptor = os.open(self.side_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(descriptor, f"{os.environ['PL_GLOBAL_SEED']}\n".encode())
            os.close(descriptor)


def plain_sgd(parameters: Any) -> Any:
    return torch.optim.SGD(parameters, lr=0.1)


class Plain(AttributionMixin, L.LightningModule):
    """Nothing that trains one at a time only."""

    def __init__(self, optimizer: Callable[[Any], Any] = plain_sgd) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        self.optimizer = optimizer

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: Any) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


class Deadly(Tiny):
    """Its process dies."""

    def on_train_start(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Data(L.LightningDataModule):
    """Blobs."""

    def __init__(self, train: Any = None, targets: Any = None, **settings: Any) -> None:
        super().__init__()
        self.train = blobs(N_TRAIN) if train is None else train
        self.targets = blobs(N_TARGET, seed=1) if targets is None else targets
        self.settings = {"shuffle": True, "batch_size": 8, **settings}

    def train_dataloader(self) -> Any:
        return loader_of(self.train, **self.settings)

    def test_dataloader(self) -> Any:
        return loader_of(self.targets)


trainer: Callable[..., L.Trainer] = partial(quiet_trainer, L.Trainer, max_epochs=2)
double: Callable[..., L.Trainer] = partial(trainer, precision="64-true", max_epochs=3)


def lds_of(folder: str, side_file: str, num_subsets: int, num_workers: int = 1) -> None:
    """What a test runs in a process of its own."""
    from lightning_attr.evaluation import retrain_lds

    torch.set_num_threads(1)
    module = partial(Tiny, side_file)
    retrain_lds(
        module,
        trainer,
        Data,
        dirpath=Path(folder),
        num_subsets=num_subsets,
        seeds=2,
        num_workers=num_workers,
        progress=False,
    )
