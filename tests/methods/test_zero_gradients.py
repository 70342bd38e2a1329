"""A snapshot at which every loss is at its least: scores of zero, told once."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from cases import quiet_trainer
from lightning_attr.methods import (
    GAS,
    TRAK,
    AttributionMethod,
    FactGraSS,
    GradCos,
    GradDot,
    LoGra,
    ProjectedInfluence,
    TracIn,
)


class Hinge(L.LightningModule):
    """Far from the margin of every sample."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 2)
        with torch.no_grad():
            self.net.weight.copy_(10 * torch.eye(2))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.multi_margin_loss(self.net(batch[0]), batch[1], margin=0.1)


@pytest.mark.parametrize(
    "method",
    [
        TRAK(),
        TRAK(exact=True),
        TRAK(per_layer=True),
        TracIn(weights="uniform"),
        GradDot(exact=True),
        GradCos(),
        GradCos(exact=True),
        GAS(weights="uniform"),
        ProjectedInfluence(),
        LoGra(),
        FactGraSS(),
    ],
    ids=lambda method: type(method).__name__,
)
def test_scores_are_zero(method: AttributionMethod, caplog: pytest.LogCaptureFixture) -> None:
    x, y = torch.eye(2).repeat(4, 1), torch.tensor([0, 1]).repeat(4)
    loader = DataLoader(TensorDataset(x, y), 4)
    result = quiet_trainer().attribute(model=Hinge(), train_dataloaders=loader, targets="train", method=method)
    assert not result.scores.values.any()
    assert not result.self_influence.any()
    told = [message for message in caplog.messages if "gradients of all training samples are zero" in message]
    assert len(told) == (1 if type(method) in (TRAK, ProjectedInfluence, LoGra, FactGraSS) else 0)
