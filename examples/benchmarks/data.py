"""A pair of data sets for Lightning, and what is said when files are missing or broken."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

Pair = tuple[TensorDataset, TensorDataset]
"""Training data and targets."""


class MissingDataError(FileNotFoundError):
    """A file of a data set is not there; the message says how to get it."""


def find(folder: Path, names: Iterable[str], advice: str) -> Path:
    """Find the first of some names in a folder.

    Raises:
        MissingDataError: if none of them is there.
    """
    names = list(names)
    for name in names:
        if (folder / name).is_file():
            return folder / name
    reason = f"no {' or '.join(names)} there" if folder.is_dir() else "there is no such folder"
    raise MissingDataError(f"Expected the data in {folder}, but {reason}. {advice}")


class BenchmarkData(L.LightningDataModule):
    """Training data, shuffled, and targets, in order."""

    def __init__(self, train: Dataset[Any], targets: Dataset[Any], batch_size: int) -> None:
        super().__init__()
        self.train, self.targets, self.batch_size = train, targets, batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.targets, self.batch_size)


def first(dataset: TensorDataset, n: int) -> TensorDataset:
    return TensorDataset(*(tensor[:n] for tensor in dataset.tensors))


def flip_labels(dataset: TensorDataset, fraction: float, classes: int) -> tuple[TensorDataset, Tensor]:
    """Give a share of the samples another label, drawn evenly from the others; also says which, ``(n,)`` bool."""
    x, y = dataset.tensors
    generator = torch.Generator().manual_seed(0)
    flipped = torch.zeros(len(y), dtype=torch.bool)
    flipped[torch.randperm(len(y), generator=generator)[: round(fraction * len(y))]] = True
    other = (y + torch.randint(1, classes, y.shape, generator=generator)) % classes
    return TensorDataset(x, torch.where(flipped, other, y)), flipped
