"""torchgeo: its tasks and data modules, on images that are made here."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from checks import QUIET, check_scores, train_both

pytest.importorskip("torchgeo")
from torchgeo.datamodules import NonGeoDataModule
from torchgeo.datasets import NonGeoDataset
from torchgeo.trainers import ClassificationTask, RegressionTask, SemanticSegmentationTask

ROWS = [0, 5, 11]


class Fields(NonGeoDataset):
    """Multispectral images with a class, a value or a mask."""

    def __init__(self, split: str = "train", kind: str = "label") -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.rand(12, 4, 32, 32, generator=generator)
        self.masks = (torch.rand(12, 32, 32, generator=generator) > 0.4).long()
        self.kind, self.rows = kind, range(12) if split == "train" else ROWS

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.rows[index]
        answers = {"label": torch.tensor(row % 3), "mask": self.masks[row], "value": self.images[row].mean()}
        key = "label" if self.kind == "value" else self.kind
        return {"image": self.images[row] * 255, key: answers[self.kind]}


def check(task: Any, kind: str) -> None:
    def train(callbacks: list[Any]) -> Any:
        trainer = L.Trainer(max_epochs=2, callbacks=callbacks, **QUIET)
        trainer.fit(task(), datamodule=NonGeoDataModule(Fields, batch_size=4, kind=kind))
        return trainer

    trainer = train_both(train)
    ones = [trainer.datamodule.aug(batch) for batch in DataLoader(Fields(kind=kind))]
    check_scores(trainer, ROWS, ones, datamodule=trainer.datamodule, targets="test")


def test_classification() -> None:
    check(lambda: ClassificationTask("resnet18", weights=None, in_channels=4, num_classes=3, lr=1e-3), "label")


def test_regression() -> None:
    check(lambda: RegressionTask("resnet18", weights=None, in_channels=4, num_outputs=1, lr=1e-3), "value")


def test_segmentation() -> None:
    settings: dict[str, Any] = {"weights": None, "in_channels": 4, "num_classes": 2, "loss": "ce", "lr": 1e-3}
    check(lambda: SemanticSegmentationTask("fcn", num_filters=4, **settings), "mask")
