"""Metrics in a training step that do not run on one sample: reported ones are left out, others named as the cause."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric, MetricCollection, PearsonCorrCoef, R2Score
from torchmetrics.functional import r2_score

from cases import quiet_trainer
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.errors import BatchDependenceError
from lightning_attr.methods import GradDot

GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(8, 3, generator=GENERATOR), torch.randn(8, 1, generator=GENERATOR)


class Plain(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(3, 1)
        self.r2, self.mean = R2Score(), MeanMetric()
        self.several = MetricCollection([R2Score(), PearsonCorrCoef()])

    def report(self, out: Tensor, y: Tensor) -> Tensor | float:
        """Report; what is returned is added to the loss."""
        return 0.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        out = self.net(batch[0])
        more = self.report(out, batch[1])
        return F.mse_loss(out, batch[1]) + more

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Called(Plain):
    def report(self, out: Tensor, y: Tensor) -> float:
        self.log("r2", self.r2(out, y))
        return 0.0


class Updated(Plain):
    def report(self, out: Tensor, y: Tensor) -> float:
        self.r2.update(out, y)
        self.log("r2", self.r2.compute().item())
        return 0.0


class Collected(Plain):
    def report(self, out: Tensor, y: Tensor) -> float:
        self.log_dict(self.several(out.flatten(), y.flatten()))
        return 0.0


class InLoss(Plain):
    def report(self, out: Tensor, y: Tensor) -> Tensor:
        return 1 - self.r2(out, y)


class OfAFunction(Plain):
    def report(self, out: Tensor, y: Tensor) -> float:
        self.log("r2", r2_score(out, y))
        return 0.0


class MeanInLoss(Plain):
    """A metric that runs on one sample is none of this."""

    def report(self, out: Tensor, y: Tensor) -> Tensor:
        return 0 * self.mean(torch.ones(())) + (out * 0).sum()


def scores(kind: type[Plain]) -> Tensor:
    data = DataLoader(TensorDataset(X, Y), 4)
    method = GradDot(exact=True)
    found = quiet_trainer().attribute(model=kind(), train_dataloaders=data, targets="train", method=method)
    return found.scores.values


@pytest.mark.filterwarnings("ignore:The variance of predictions")
@pytest.mark.parametrize("kind", [Called, Updated, Collected, MeanInLoss])
def test_metrics_that_are_only_reported_change_nothing(kind: type[Plain]) -> None:
    torch.testing.assert_close(scores(kind), scores(Plain))


def test_training_goes_on_and_counts_what_it_counted(tmp_path: Any) -> None:
    modules = [Called(), Called()]
    for module, callbacks in zip(modules, ([], [AttributionCallback(tmp_path / "a")]), strict=True):
        quiet_trainer(max_epochs=1, callbacks=callbacks).fit(module, DataLoader(TensorDataset(X, Y), 4))
    assert torch.equal(modules[0].net.weight, modules[1].net.weight)
    assert modules[0].r2.total == modules[1].r2.total
    assert "forward" not in vars(modules[1].r2)


def test_a_loss_of_such_a_metric_is_refused_by_its_name() -> None:
    with pytest.raises(
        BatchDependenceError, match=r"metrics that do not run on one sample: `r2` \(ValueError: Needs at"
    ):
        scores(InLoss)


def test_a_function_of_torchmetrics_is_named_as_the_cause() -> None:
    with pytest.raises(
        BatchDependenceError, match=r"Needs at least two samples .*A metric raises that: compute it only"
    ):
        scores(OfAFunction)
