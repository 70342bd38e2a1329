"""Scaled gradients and Adam's direction, against loops over samples; parts of a gradient are added up first."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_attr import AttributionMixin
from lightning_attr.features.featurizer import Featurizer, plan
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.parameters.optimizer_state import AdamMoments
from lightning_attr.projectors import (
    AdamDirection,
    IdentityProjector,
    KroneckerProjector,
    LayerSubset,
    Projector,
    RademacherProjector,
    ScaledProjection,
)
from lightning_attr.projectors.base import flat_slots

B = 5


class Tied(AttributionMixin, nn.Module):
    """A weight that two layers share, one that is used twice, a bias, a norm, a parameter used by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.norm = nn.LayerNorm(3)
        self.gain = nn.Parameter(torch.rand(3))
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        x = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.head(self.norm(x) * self.gain)


def setting() -> tuple[Tied, tuple[Tensor, Tensor], ParameterLayout]:
    torch.manual_seed(0)
    module = Tied().double().eval()
    return module, (torch.randn(B, 3).double(), torch.randint(4, (B,))), ParameterLayout.of(module)


def gradients(module: Tied, batch: tuple[Tensor, Tensor], loss: bool) -> dict[str, Tensor]:
    """Sample after sample, by autograd: parameter name -> ``(b, *shape)``."""
    rows = []
    for i in range(B):
        one = tuple(part[i : i + 1] for part in batch)
        value = module.functional_loss({}, {}, one) if loss else module.functional_output({}, {}, one)
        rows.append(torch.autograd.grad(value.sum(), list(module.parameters())))
    names = [name for name, _ in module.named_parameters()]
    return {name: torch.stack(parts) for name, parts in zip(names, zip(*rows, strict=True), strict=True)}


def random_moments(layout: ParameterLayout) -> dict[str, AdamMoments]:
    return {
        name: AdamMoments(torch.randn(shape).double(), torch.rand(shape).double(), 4, (0.9, 0.99), 1e-3, 0.1, "Adam")
        for name, shape in layout.shapes.items()
    }


def projected(projector: Projector, layout: ParameterLayout, rows: dict[str, Tensor]) -> Tensor:
    projection = projector.bind(layout, "s")
    features = torch.zeros(B, projection.dim).double()
    for name, gradient in rows.items():
        if projection.names is None or name in projection.names:
            projection.accumulate(features, name, gradient)
    return features


def direction(gradient: Tensor, moments: AdamMoments) -> Tensor:
    beta1, beta2 = moments.betas
    mean = beta1 * moments.exp_avg + (1 - beta1) * gradient
    square = beta2 * moments.exp_avg_sq + (1 - beta2) * gradient**2
    return mean / (square + moments.eps).sqrt()


PROJECTORS = [
    IdentityProjector(),
    KroneckerProjector(20),
    RademacherProjector(16),
    LayerSubset(IdentityProjector(), ["first", "gain"]),
]


@pytest.mark.parametrize("projector", PROJECTORS, ids=lambda projector: projector.kind)
def test_scaled_gradients(projector: Projector) -> None:
    module, batch, layout = setting()
    scales = {name: torch.rand(shape).double() for name, shape in layout.shapes.items()}
    projection = ScaledProjection(projector.bind(layout, "s"), layout, scales)
    found = Featurizer(module, plan(module, batch, B), projection)(batch, range(B))["features"]
    rows = {name: scales[name] * gradient for name, gradient in gradients(module, batch, loss=False).items()}
    torch.testing.assert_close(found, projected(projector, layout, rows), rtol=1e-10, atol=1e-12)


def test_what_has_no_scale_is_left_out() -> None:
    module, batch, layout = setting()
    scales = {"first.weight": torch.ones(3, 3).double()}
    projection = ScaledProjection(IdentityProjector().bind(layout, "s"), layout, scales)
    assert projection.names == {"first.weight"}
    assert projection.layers is not None
    found = Featurizer(module, plan(module, batch, B), projection)(batch, range(B))["features"]
    slot = flat_slots(layout)["first.weight"]
    assert found[:, slot].any()
    found[:, slot] = 0
    assert not found.any()
    features = torch.zeros(B, projection.dim).double()
    projection.accumulate(features, "gain", torch.ones(B, 3).double())
    assert not features.any()


@pytest.mark.parametrize("projector", PROJECTORS, ids=lambda projector: projector.kind)
def test_adams_direction(projector: Projector) -> None:
    module, batch, layout = setting()
    moments = random_moments(layout)
    del moments["norm.bias"]  # never updated: it does not move
    projection = AdamDirection(projector.bind(layout, "s"), layout, moments)
    found = Featurizer(module, plan(module, batch, B), projection)(batch, range(B))
    losses, outputs = (gradients(module, batch, loss) for loss in (True, False))
    moved = {name: -direction(losses[name], own) for name, own in moments.items()}
    expected, own = projected(projector, layout, moved), projected(projector, layout, outputs)
    torch.testing.assert_close(found["features"], expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found["alignment"], F.cosine_similarity(expected, own), rtol=1e-10, atol=1e-12)
    assert set(found) > {"output", "loss", "label"}


def test_without_memory_the_direction_is_the_sign_of_the_gradient() -> None:
    """T-TR-5."""
    module, batch, layout = setting()
    moments = {
        name: AdamMoments(torch.zeros(shape).double(), torch.zeros(shape).double(), 1, (0.0, 0.0), 1e-30, 0.1, "Adam")
        for name, shape in layout.shapes.items()
    }
    projection = AdamDirection(IdentityProjector().bind(layout, "s"), layout, moments)
    found = Featurizer(module, plan(module, batch, B), projection)(batch, range(B))["features"]
    rows = gradients(module, batch, loss=True)
    signs = -torch.cat([rows[name].sign().flatten(1) for name in layout.shapes], dim=1)
    large = torch.cat([rows[name].flatten(1).abs() > 1e-10 for name in layout.shapes], dim=1)
    torch.testing.assert_close(found[large], signs[large])


def test_before_any_update_nothing_moves() -> None:
    module, batch, layout = setting()
    projection = AdamDirection(KroneckerProjector(20).bind(layout, "s"), layout, {})
    found = Featurizer(module, plan(module, batch, B), projection)(batch, range(B))
    assert found["features"].shape == (B, KroneckerProjector(20).bind(layout, "s").dim)
    assert not found["features"].any()
    assert not found["alignment"].any()
