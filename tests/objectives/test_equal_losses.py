"""Losses that are all the same at the start, as those of a head of zeros: how they are added up is seen elsewhere."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cases import blobs, loader_of, quiet_trainer
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.errors import BatchDependenceError
from lightning_attr.methods import GradDot


class ZeroHead(L.LightningModule):
    def __init__(self, weight: Tensor | None = None, scale: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        self.weight, self.scale, self.reduction = weight, scale, reduction
        self.head = nn.Linear(blobs(1)[0][0].numel(), 3)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.scale * self.head(batch[0])
        return F.cross_entropy(logits, batch[1], self.weight, reduction=self.reduction)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class FromZero(ZeroHead):
    """Has a loss of zero for every sample before the first step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.head(batch[0])[:, 0].square().sum()


def test_means_weighted_by_class_are_refused_before_training(tmp_path: Any) -> None:
    module = ZeroHead(torch.tensor([1.0, 2.0, 9.0]))
    trainer = quiet_trainer(max_epochs=1, callbacks=[AttributionCallback(tmp_path)])
    with pytest.raises(BatchDependenceError, match="neither the mean nor the sum of one term a sample"):
        trainer.fit(module, loader_of(blobs(16)))
    assert trainer.global_step == 0
    assert not module.head.weight.any()


@pytest.mark.parametrize("module", [ZeroHead(), ZeroHead(reduction="sum"), FromZero()])
def test_means_and_sums_are_told_apart(module: Any, tmp_path: Any) -> None:
    trainer = quiet_trainer(max_epochs=2, callbacks=[AttributionCallback(tmp_path)])
    trainer.fit(module, loader_of(blobs(16)))
    found = trainer.attribute(targets="train", method=GradDot(exact=True))
    batch = blobs(16)[:]
    alone = [module.training_step([x[i : i + 1] for x in batch], 0) for i in range(16)]
    torch.testing.assert_close(found.loss, torch.stack(alone).detach(), rtol=1e-4, atol=1e-6)
    gradients = torch.stack([
        torch.cat([g.flatten() for g in torch.autograd.grad(a, [*module.parameters()])]) for a in alone
    ])
    torch.testing.assert_close(found.scores.values, gradients @ gradients.T, rtol=1e-3, atol=1e-6)
