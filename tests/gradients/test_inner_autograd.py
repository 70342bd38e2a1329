"""Steps that differentiate inside: forces, gradient penalties, adversarial examples. Reference: sample by sample."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cases import loader_of, quiet_trainer
from lightning_attr import AttributionMixin
from lightning_attr.errors import AttributionError
from lightning_attr.features.featurizer import Featurizer, plan
from lightning_attr.gradients.inner_autograd import watch_autograd
from lightning_attr.methods import ConjugateGradient, Influence
from lightning_attr.outputs import NegativeLoss
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.projectors import IdentityProjector, NoProjection

Batch = tuple[Tensor, Tensor]


class Penalty(L.LightningModule):
    """A gradient penalty in the loss, as critics and PINNs have."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))

    def terms(self, batch: Batch) -> Tensor:
        x = batch[0].clone().requires_grad_()
        out = self.net(x)
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return F.cross_entropy(out, batch[1], reduction="none") + slope.square().sum(1)

    def training_step(self, batch: Batch) -> Tensor:
        return self.terms(batch).mean()


class PenaltyOfTheMixin(AttributionMixin, Penalty):
    model_output = NegativeLoss(lambda terms, _: terms)

    def attribution_step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.terms(batch), batch[1]


class Forces(Penalty):
    """The inner backward pass goes through layers that keep their inputs for the outer one."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleList([nn.Embedding(2, 5), nn.Linear(3, 5), nn.Linear(5, 1)])

    def terms(self, batch: Batch) -> Tensor:
        embedding, filters, head = self.net
        with torch.enable_grad():
            x = batch[0].clone().requires_grad_()
            energy = head(embedding(batch[1]) * filters(x).tanh())
            (slope,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        return (energy[:, 0] - 1).square() + slope.square().sum(1)


class Adversarial(Penalty):
    """Another sample is trained on: one step up the slope of the loss."""

    def terms(self, batch: Batch) -> Tensor:
        x = batch[0].clone().requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(self.net(x), batch[1], reduction="sum"), x)
        return F.cross_entropy(self.net(x.detach() + 0.1 * slope.sign()), batch[1], reduction="none")


class Jacobian(Penalty):
    """By torch.func, which needs no graph around it."""

    def terms(self, batch: Batch) -> Tensor:
        slopes = torch.func.vmap(torch.func.jacrev(self.net))(batch[0])
        return F.cross_entropy(self.net(batch[0]), batch[1], reduction="none") + slopes.square().sum((1, 2))


def _batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 3, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1, 0])


def _features(module: Any, batch: Batch, rows: Sequence[int] = range(6)) -> tuple[Tensor, Tensor]:
    """Gradients of the negative loss, and the losses."""
    found = plan(module, tuple(t[:4] for t in batch), 4)
    projection = IdentityProjector().bind(ParameterLayout.of(module), "")
    columns = Featurizer(module, found, projection)(batch, rows)
    return columns["features"], columns["loss"]


@pytest.mark.parametrize("cls", [Penalty, PenaltyOfTheMixin, Forces, Adversarial, Jacobian])
def test_features_are_those_of_autograd(cls: type[Penalty], caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    module, batch = cls().double().eval(), _batch()
    with caplog.at_level(logging.WARNING, "lightning_attr"):
        features, losses = _features(module, batch)
    for i in range(6):
        term = module.terms((batch[0][i : i + 1], batch[1][i : i + 1]))[0]
        rows = torch.autograd.grad(-term, list(module.parameters()))
        torch.testing.assert_close(features[i], torch.cat([row.flatten() for row in rows]))
        torch.testing.assert_close(losses[i], term.detach())
    if cls is not Jacobian:
        assert "go through a loop over samples, which is slower: the module differentiates inside" in caplog.text


def test_values_alone_are_there_too() -> None:
    module, batch = Penalty().double().eval(), _batch()
    found = plan(module, tuple(t[:4] for t in batch), 4)
    columns = Featurizer(module, found, NoProjection())(batch, range(6))
    torch.testing.assert_close(columns["loss"], module.terms(batch).detach())


def test_a_sparse_embedding_has_the_gradients_of_a_dense_one() -> None:
    class Bag(Penalty):
        def __init__(self, sparse: bool) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Embedding(2, 3, sparse=sparse), nn.Linear(3, 2))

        def terms(self, batch: Batch) -> Tensor:
            return (
                F.cross_entropy(self.net(batch[1]), batch[1], reduction="none") + self.net[0].weight[0].square().sum()
            )

    found = []
    for sparse in (True, False):
        torch.manual_seed(0)
        found.append(_features(Bag(sparse).double().eval(), _batch()))
    torch.testing.assert_close(found[0], found[1])


def test_a_step_that_hooks_break_goes_without_them(caplog: pytest.LogCaptureFixture) -> None:
    class Looks(Penalty):
        def terms(self, batch: Batch) -> Tensor:
            if self.net[0]._forward_hooks:
                raise KeyError("a hook")
            return F.cross_entropy(self.net(batch[0]), batch[1], reduction="none")

    torch.manual_seed(0)
    module, batch = Looks().double().eval(), _batch()
    features, _ = _features(module, batch)
    assert "with hooks, the module raises KeyError: 'a hook'" in caplog.text
    grads = torch.autograd.grad(-module.terms(batch)[2], list(module.parameters()))
    torch.testing.assert_close(features[2], torch.cat([row.flatten() for row in grads]))


def test_backward_is_seen_too() -> None:
    x = torch.ones(2, requires_grad=True)
    with watch_autograd() as inner:
        assert not inner.seen
        x.square().sum().backward()
    assert inner.seen
    with watch_autograd() as inner:
        pass
    assert not inner.seen


def test_curvatures_are_refused_by_name() -> None:
    data = loader_of(torch.utils.data.TensorDataset(*_batch()))
    with pytest.raises(AttributionError, match="Penalty differentiates inside its step, and products with"):
        quiet_trainer().attribute(
            model=Penalty().double(),
            train_dataloaders=data,
            targets="train",
            method=Influence("hessian", solver=ConjugateGradient()),
        )
