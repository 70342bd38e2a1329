"""MONAI: 3D segmentation with dictionary transforms, as its Lightning tutorials do it."""

from __future__ import annotations

from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor

from checks import QUIET, check_scores, train_both

pytest.importorskip("monai")
from monai.data import CacheDataset, DataLoader, Dataset, list_data_collate
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss, DiceLoss
from monai.metrics import DiceMetric
from monai.networks.layers import Norm
from monai.networks.nets import UNet
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    EnsureTyped,
    RandCropByPosNegLabeld,
    RandFlipd,
    ScaleIntensityd,
)

ROWS = [0, 5, 11]


def volumes(n: int = 12) -> list[dict[str, Any]]:
    generator = np.random.default_rng(0)
    found = []
    for i in range(n):
        label = np.zeros((16, 16, 16), np.float32)
        label[2 + i % 4 : 12, 3:11, 4:12] = 1
        found.append({"image": label + generator.normal(size=label.shape).astype(np.float32), "label": label})
    return found


class Net(L.LightningModule):
    """3d_segmentation/spleen_segmentation_3d_lightning.ipynb, smaller."""

    def __init__(self, loss: Any) -> None:
        super().__init__()
        self._model = UNet(3, 1, 2, channels=(4, 8), strides=(2,), num_res_units=1, norm=Norm.BATCH)
        self.loss_function = loss
        self.dice_metric = DiceMetric(include_background=False, reduction="mean")

    def forward(self, x: Tensor) -> Tensor:
        return self._model(x)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        images, labels = batch["image"], batch["label"]
        output = self.forward(images)
        loss = self.loss_function(output, labels)
        self.log("train_loss", loss.item())
        return {"loss": loss, "log": {"train_loss": loss.item()}}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch["image"], batch["label"]
        outputs = sliding_window_inference(images, (16, 16, 16), 4, self.forward)
        self.dice_metric(y_pred=outputs.argmax(1, keepdim=True), y=labels)

    def on_validation_epoch_end(self) -> None:
        self.log("val_dice", self.dice_metric.aggregate().item())
        self.dice_metric.reset()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self._model.parameters(), 1e-3)


class Volumes(L.LightningDataModule):
    def __init__(self, random: list[Any], dataset: Any = CacheDataset) -> None:
        super().__init__()
        fixed = [EnsureChannelFirstd(["image", "label"], channel_dim="no_channel"), ScaleIntensityd("image")]
        self.transform = Compose([*fixed, *random, EnsureTyped(["image", "label"])])
        self.dataset = dataset

    def setup(self, stage: str | None = None) -> None:
        progress = {"progress": False} if self.dataset is CacheDataset else {}
        self.train_ds = self.dataset(volumes(), self.transform, **progress)
        self.val_ds = self.dataset(volumes(2), self.transform, **progress)

    def train_dataloader(self) -> Any:
        return DataLoader(self.train_ds, batch_size=4, shuffle=True, collate_fn=list_data_collate)

    def val_dataloader(self) -> Any:
        return DataLoader(self.val_ds, batch_size=1)


def train_with(loss: Any, dm: Any) -> Any:
    def train(callbacks: list[Any]) -> Any:
        trainer = L.Trainer(max_epochs=2, callbacks=callbacks, **QUIET)
        trainer.fit(Net(loss), datamodule=dm())
        return trainer

    return train_both(train)


@pytest.mark.parametrize("dataset", [CacheDataset, Dataset])
@pytest.mark.parametrize("loss", [DiceLoss, DiceCELoss])
def test_dice(loss: Any, dataset: Any) -> None:
    trainer = train_with(
        loss(to_onehot_y=True, softmax=True), lambda: Volumes([RandFlipd(["image", "label"], prob=0)], dataset)
    )
    data = trainer.datamodule.train_ds
    targets = DataLoader([data[row] for row in ROWS], batch_size=4)
    check_scores(trainer, ROWS, DataLoader(data, batch_size=1), target_dataloaders=targets)


def test_several_crops_a_volume() -> None:
    """One row of the data set is a list of two crops: the loss of the row is their mean."""
    crops = RandCropByPosNegLabeld(["image", "label"], "label", (8, 8, 8), num_samples=2)
    trainer = train_with(DiceLoss(to_onehot_y=True, softmax=True), lambda: Volumes([crops]))
    scores = trainer.attribute(targets="train").scores.values
    assert scores.shape == (12, 12)
    assert (scores.argmax(0) == torch.arange(12)).float().mean() > 0.9
