"""The setting of the leaderboard without text, and its bank: digits, a CNN with BatchNorm, augmentation, momentum.

512 images are shifted by up to a pixel each time that they are drawn, and learned by SGD with momentum and weight decay
in 80 steps. As in the bank of text, what is removed has weight zero in the batches that it was in: it still counts in
their statistics and denominators, and order and random numbers stay. Learning rate, length and activation were chosen
without looking at any score, so that a removal has about the effect that its derivative says.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import lightning as L
import torch
from leaderboard_text import N_REPORT, N_TRAIN, N_TUNE, Bank
from safetensors.torch import save_file
from sklearn.datasets import load_digits  # type: ignore[import-untyped]  # ships no types
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from digits import margin
from lightning_attr import AttributionMixin

EPOCHS, BATCH_SIZE = 10, 64
STEPS = EPOCHS * N_TRAIN // BATCH_SIZE
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.05, 0.9, 1e-3


@lru_cache(maxsize=1)
def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw images (n, 1, 8, 8) in [0, 1] and labels (n,) to train on, and those of the queries."""
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(pixels / 16).float().view(-1, 1, 8, 8), torch.from_numpy(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, queries = order[:N_TRAIN], order[N_TRAIN : N_TRAIN + N_TUNE + N_REPORT]
    return x[train], y[train], x[queries], y[queries]


def network(seed: int) -> nn.Sequential:
    """4k parameters with new weights."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.SiLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


def shifted(x: Tensor) -> Tensor:
    """Shift each image by up to a pixel both ways, by torch's random numbers: (b, 1, 8, 8) -> (b, 1, 8, 8)."""
    top, left = torch.randint(3, (2, len(x), 1)) + torch.arange(8)
    each = torch.arange(len(x))[:, None, None]
    return F.pad(x, (1, 1, 1, 1))[each, 0, top[:, :, None], left[:, None, :]].unsqueeze(1)


def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Loss of each image where it was shifted to, (b,)."""
    return F.cross_entropy(model(shifted(x)), y, reduction="none")


def optimizer_of(module: nn.Module) -> tuple[torch.optim.SGD, torch.optim.lr_scheduler.LambdaLR]:
    optimizer = torch.optim.SGD(module.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)


def orders(seed: int) -> Tensor:
    """Rows of each epoch of a run, in order, (EPOCHS, N_TRAIN)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(N_TRAIN, generator=generator) for _ in range(EPOCHS)])


class Reader(AttributionMixin, L.LightningModule):
    """The model as its author would train it; what is attributed is the margin of the label."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.network = network(seed)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)  # type: ignore[no-any-return]  # torch types a module's call as Any

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return losses(self.network, *batch).mean()

    def configure_optimizers(self) -> Any:
        optimizer, schedule = optimizer_of(self)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class InOrder(torch.utils.data.Sampler[int]):
    """Gives the rows of a run, one epoch after another; the Trainer says which."""

    def __init__(self, seed: int) -> None:
        self.epochs, self.epoch = orders(seed).tolist(), 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return N_TRAIN

    def __iter__(self) -> Iterator[int]:
        return iter(self.epochs[self.epoch])


class ImageData(L.LightningDataModule):
    """The images, and queries as targets; reading them takes none of the run's random numbers."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        x, y, x_query, y_query = load()
        self.train, self.queries = TensorDataset(x, y), TensorDataset(x_query, y_query)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.train, BATCH_SIZE, sampler=InOrder(self.seed), generator=torch.Generator())

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.queries, BATCH_SIZE, generator=torch.Generator())


# The bank -------------------------------------------------------------------------------------------------------------


def trained(kept: Tensor, seed: int) -> nn.Sequential:
    """Train again in a plain loop: kept (N_TRAIN,), the weights of the images; the seed fixes all that is drawn."""
    x, y, _, _ = load()
    model = network(seed)
    optimizer, schedule = optimizer_of(model)
    for rows in orders(seed).view(STEPS, BATCH_SIZE):
        optimizer.zero_grad()
        (kept[rows] * losses(model, x[rows], y[rows])).mean().backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def margins(model: nn.Module) -> Tensor:
    """Margin of each query, (N_TUNE + N_REPORT,)."""
    _, _, x, y = load()
    return margin(model(x), y)


def _train_one(job: tuple[str, list[bool], int]) -> None:
    """Train one model of the bank, in a process of its own; a killed one leaves no half of a file."""
    torch.set_num_threads(1)
    path, kept, seed = job
    unfinished = f"{path}.{os.getpid()}"
    save_file({"outputs": margins(trained(torch.tensor(kept).float(), seed))}, unfinished)
    Path(unfinished).rename(path)


class ImageBank(Bank):
    """Margins of models trained on subsets of the images.

    Args:
        folder: of the models' outputs.
    """

    train_one = staticmethod(_train_one)

    def __init__(self, folder: Path) -> None:
        numbers = (EPOCHS, BATCH_SIZE, LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, str(network(0)), torch.__version__)
        known = hashlib.sha256(repr(numbers).encode())
        for tensor in load():
            known.update(tensor.numpy().tobytes())
        self.folder = folder / f"leaderboard-digits-{known.hexdigest()[:12]}"
        self.folder.mkdir(parents=True, exist_ok=True)
