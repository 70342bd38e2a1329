"""timm: its models, losses and averaged weights in a module as people write it."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset

from checks import QUIET, check_scores, train_both

pytest.importorskip("timm")
import timm
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3

ROWS = [0, 5, 11]


def images(n: int = 12) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.rand(n, 3, 64, 64, generator=generator), torch.arange(n) % 4)


class ImageClassifier(L.LightningModule):
    """A model of timm with its smoothed loss, its optimizers and its moving average of the weights."""

    def __init__(self, name: str, **settings: Any) -> None:
        super().__init__()
        self.model = timm.create_model(name, pretrained=False, num_classes=4, **settings)
        self.loss = LabelSmoothingCrossEntropy(smoothing=0.1)
        self.average = [ModelEmaV3(self.model, decay=0.9)]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = self.loss(self.model(x), y)
        self.log("train_loss", loss)
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.average[0].update(self.model, step=self.global_step)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return create_optimizer_v2(self.model, opt="adamw", lr=1e-3, weight_decay=0.05)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("test_resnet", {}),
        ("test_efficientnet", {"drop_path_rate": 0.1}),
        ("test_vit", {"img_size": 64, "drop_path_rate": 0.1}),
        ("test_convnext", {}),
    ],
)
def test_models(name: str, settings: dict[str, Any]) -> None:
    data = images()

    def train(callbacks: list[Any]) -> Any:
        trainer = L.Trainer(max_epochs=2, callbacks=callbacks, **QUIET)
        trainer.fit(ImageClassifier(name, **settings), DataLoader(data, batch_size=4, shuffle=True))
        return trainer

    trainer = train_both(train)
    check_scores(trainer, ROWS, DataLoader(data), target_dataloaders=DataLoader(Subset(data, ROWS), batch_size=4))
