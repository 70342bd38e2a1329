"""What the image classifiers share: cross-entropy and SGD, with the learning rate of each recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

from lightning_attr import AttributionMixin


class Classifier(AttributionMixin, L.LightningModule):
    """A network on batches ``(x, y)``; what is attributed is the margin of the label, the mixin's default.

    Args:
        network: images to logits.
        learning_rate: the peak where there is a schedule.
        momentum: of SGD.
        weight_decay: of SGD.
        schedule: share of the run that is over -> factor of the learning rate, after every step; constant without.
    """

    def __init__(
        self,
        network: nn.Module,
        learning_rate: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        schedule: Callable[[float], float] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.learning_rate, self.momentum, self.weight_decay = learning_rate, momentum, weight_decay
        self.schedule = schedule

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), self.learning_rate, self.momentum, weight_decay=self.weight_decay)
        return with_schedule(self, optimizer, self.schedule)


def with_schedule(module: L.LightningModule, optimizer: Any, schedule: Callable[[float], float] | None) -> Any:
    """Give an optimizer a learning rate that depends on the share of the run that is over."""
    if schedule is None:
        return optimizer
    steps = module.trainer.estimated_stepping_batches
    scheduler = LambdaLR(optimizer, lambda step: schedule(step / steps))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
