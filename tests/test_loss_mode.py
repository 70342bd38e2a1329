"""Losses that are no margins: several labels, ranked pairs, survival; by NegativeLoss and by training steps."""

from __future__ import annotations

import re
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_attr import AttributionMixin
from lightning_attr.errors import BatchDependenceError
from lightning_attr.features.featurizer import Featurizer, plan
from lightning_attr.outputs import NegativeLoss
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.projectors import IdentityProjector

B = 5


class Scores(L.LightningModule):
    """A network, and the loss of its scores by a class attribute, one value per sample."""

    classes = 1

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, self.classes))

    def losses(self, batch: Any) -> Tensor:
        raise NotImplementedError

    def training_step(self, batch: Any) -> Tensor:
        return self.losses(batch).mean()


class MultiLabel(Scores):
    """Each sample has any number of three labels; their binary cross-entropies are averaged."""

    classes = 3

    def losses(self, batch: Any) -> Tensor:
        return F.binary_cross_entropy_with_logits(self.network(batch[0]), batch[1], reduction="none").mean(1)


class Ranking(Scores):
    """A sample is a pair, of which the first item is to be ranked before the second."""

    def losses(self, batch: Any) -> Tensor:
        better, worse = (self.network(item).squeeze(1) for item in batch)
        return F.softplus(worse - better)


class Cox(Scores):
    """The partial likelihood: each event is compared with all samples of the batch that are still at risk."""

    def losses(self, batch: Any) -> Tensor:
        x, time, event = batch
        risk = self.network(x).squeeze(1)
        at_risk = time[None] >= time[:, None]
        return -event * (risk - risk.expand(len(risk), -1).masked_fill(~at_risk, float("-inf")).logsumexp(1))


BATCHES: dict[type[Scores], tuple[Tensor, ...]] = {
    MultiLabel: (torch.randn(B, 4).double(), torch.randint(2, (B, 3)).double()),
    Ranking: (torch.randn(B, 4).double(), torch.randn(B, 4).double()),
    Cox: (torch.randn(B, 4).double(), torch.tensor([3.0, 1.0, 4.0, 2.0, 5.0]).double(), torch.ones(B).double()),
}


def with_mixin(kind: type[Scores]) -> Scores:
    """The same module, whose attribution step gives the losses to NegativeLoss."""

    class Mixed(AttributionMixin, kind):  # type: ignore[valid-type, misc]
        model_output = NegativeLoss(lambda outputs, targets: outputs)

        def attribution_step(self, batch: Any) -> Any:
            return self.losses(batch), None

    return Mixed()


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("kind", [MultiLabel, Ranking])
def test_losses_of_single_samples_are_attributed(kind: type[Scores], mixed: bool) -> None:
    module = (with_mixin(kind) if mixed else kind()).double().eval()
    batch = BATCHES[kind]
    made = plan(module, batch, B)
    assert made.fallback == ()
    projection = IdentityProjector().bind(ParameterLayout.of(module), "final")
    found = Featurizer(module, made, projection)(batch, range(B))
    for row in range(B):
        loss = module.losses([part[row : row + 1] for part in batch]).sum()
        gradient = torch.autograd.grad(-loss, list(module.parameters()), materialize_grads=True)
        torch.testing.assert_close(found["features"][row], torch.cat([g.flatten() for g in gradient]))
        torch.testing.assert_close(found["loss"][row], loss.detach())
        assert found["out_to_loss"][row] == 1


@pytest.mark.parametrize("mixed", [False, True])
def test_a_partial_likelihood_within_the_batch_is_refused(mixed: bool) -> None:
    module = (with_mixin(Cox) if mixed else Cox()).double().eval()
    message = "depends on the samples beside it" if mixed else "losses that compare samples"
    with pytest.raises(BatchDependenceError, match=message):
        plan(module, BATCHES[Cox], B)


def test_a_partial_likelihood_with_risk_sets_of_its_own_is_attributed() -> None:
    """The samples at risk come with each sample, as data: then its loss is its own."""

    class OwnRiskSet(Scores):
        def losses(self, batch: Any) -> Tensor:
            x, at_risk = batch
            return self.network(at_risk).squeeze(2).logsumexp(1) - self.network(x).squeeze(1)

    x = torch.randn(B, 4).double()
    batch = x, torch.cat([x[:, None], torch.randn(B, 3, 4).double()], 1)
    module = OwnRiskSet().double().eval()
    made = plan(module, batch, B)
    projection = IdentityProjector().bind(ParameterLayout.of(module), "final")
    found = Featurizer(module, made, projection)(batch, range(B))
    for row in range(B):
        loss = module.losses([part[row : row + 1] for part in batch]).sum()
        gradient = torch.autograd.grad(-loss, list(module.parameters()), materialize_grads=True)
        torch.testing.assert_close(found["features"][row], torch.cat([g.flatten() for g in gradient]))


class ByIndex(Scores):
    """A loss that counts more in later batches, or is none there."""

    def __init__(self, skips: bool) -> None:
        super().__init__()
        self.skips = skips

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.network(batch).square().mean() * (1 + batch_idx)
        return None if self.skips and batch_idx else loss


@pytest.mark.parametrize(
    ("skips", "found"),
    [(False, r"[\d.]+ with batch_idx=1"), (True, r"with batch_idx=1 TypeError: Expected `training_st")],
)
def test_a_loss_that_depends_on_the_index_of_its_batch_is_told(
    skips: bool, found: str, caplog: pytest.LogCaptureFixture
) -> None:
    batch = torch.randn(B, 4)
    module = ByIndex(skips).eval()
    subject = plan(module, batch, B).objective
    torch.testing.assert_close(subject.forward(batch, B)[0], -module.network(batch).square().squeeze(1))
    assert re.search(
        rf"ByIndex: the loss of `training_step` depends on `batch_idx` \([\d.]+ with batch_idx=0, {found}", caplog.text
    )
