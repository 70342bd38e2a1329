"""lightly: its examples, which import `pytorch_lightning`, with fixed views, so that copies are copies."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from checks import QUIET, check_scores, train_both
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.errors import BatchDependenceError

pytest.importorskip("lightly")
pytest.importorskip("pytorch_lightning")
import pytorch_lightning as pl
from lightly.data import LightlyDataset
from lightly.loss import NegativeCosineSimilarity, NTXentLoss
from lightly.models.modules import (
    BYOLPredictionHead,
    BYOLProjectionHead,
    SimCLRProjectionHead,
    SimSiamPredictionHead,
    SimSiamProjectionHead,
)
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms.multi_view_transform import MultiViewTransform
from lightly.utils.scheduler import cosine_schedule

ROWS = [0, 5, 11]


class Images(Dataset[Any]):
    def __init__(self) -> None:
        self.images = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        self.transform: Any = None  # set by LightlyDataset

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), 0


def backbone() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2)]
    return nn.Sequential(*layers)


class BYOL(pl.LightningModule):
    """examples/pytorch_lightning/byol.py."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = backbone()
        self.projection_head = BYOLProjectionHead(32, 24, 8)
        self.prediction_head = BYOLPredictionHead(8, 24, 8)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)
        self.criterion = NegativeCosineSimilarity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.backbone(x).flatten(start_dim=1)
        return self.prediction_head(self.projection_head(y))

    def forward_momentum(self, x: Tensor) -> Tensor:
        y = self.backbone_momentum(x).flatten(start_dim=1)
        return self.projection_head_momentum(y).detach()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        momentum = cosine_schedule(self.current_epoch, 10, 0.996, 1)
        update_momentum(self.backbone, self.backbone_momentum, m=momentum)
        update_momentum(self.projection_head, self.projection_head_momentum, m=momentum)
        (x0, x1) = batch[0]
        p0, p1 = self.forward(x0), self.forward(x1)
        z0, z1 = self.forward_momentum(x0), self.forward_momentum(x1)
        return 0.5 * (self.criterion(p0, z1) + self.criterion(p1, z0))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.06)


class SimSiam(pl.LightningModule):
    """examples/pytorch_lightning/simsiam.py."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = backbone()
        self.projection_head = SimSiamProjectionHead(32, 24, 8)
        self.prediction_head = SimSiamPredictionHead(8, 4, 8)
        self.criterion = NegativeCosineSimilarity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.projection_head(self.backbone(x).flatten(start_dim=1))
        return z.detach(), self.prediction_head(z)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x0, x1) = batch[0]
        z0, p0 = self.forward(x0)
        z1, p1 = self.forward(x1)
        loss = 0.5 * (self.criterion(z0, p1) + self.criterion(z1, p0))
        self.log("train_loss_ssl", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.06)


class SimCLR(pl.LightningModule):
    """examples/pytorch_lightning/simclr.py."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = backbone()
        self.projection_head = SimCLRProjectionHead(32, 24, 8)
        self.criterion = NTXentLoss()

    def forward(self, x: Tensor) -> Tensor:
        return self.projection_head(self.backbone(x).flatten(start_dim=1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x0, x1) = batch[0]
        return self.criterion(self.forward(x0), self.forward(x1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.06)


def dataset() -> LightlyDataset:
    views = [lambda image: image.flip(-1), lambda image: image.roll(3, 1) * 0.8]
    return LightlyDataset.from_torch_dataset(Images(), transform=MultiViewTransform(views))


def trainer_of(module: Any, callbacks: list[Any]) -> Any:
    trainer = pl.Trainer(max_epochs=2, callbacks=callbacks, **QUIET)
    trainer.fit(module(), DataLoader(dataset(), batch_size=4, shuffle=True, drop_last=True))
    return trainer


@pytest.mark.parametrize("module", [BYOL, SimSiam])
def test_losses_of_pairs(module: Any) -> None:
    trainer = train_both(lambda callbacks: trainer_of(module, callbacks))
    targets = DataLoader(Subset(dataset(), ROWS), batch_size=4)
    check_scores(trainer, ROWS, DataLoader(dataset()), target_dataloaders=targets)


def test_contrastive_loss_is_refused_before_training() -> None:
    with pytest.raises(BatchDependenceError, match="neither the mean nor the sum of one term a sample"):
        trainer_of(SimCLR, [AttributionCallback("attribution")])
