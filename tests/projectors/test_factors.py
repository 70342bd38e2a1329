"""Gradients kept whole: products of factors against products of flattened gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import LayersOf
from lightning_attr import AttributionMixin
from lightning_attr.errors import UnsupportedLayerError
from lightning_attr.features.featurizer import Featurizer, plan
from lightning_attr.gradients import OuterSum, RowSum
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.projectors import GradientFactors, IdentityProjector

B, M = 5, 3


class Classifier(AttributionMixin, nn.Module):
    """A batch is (inputs, labels)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def attribution_step(self, batch: Any) -> tuple[Tensor, Tensor]:
        output = self.network(batch[0])
        return (output if output.ndim == 2 else torch.stack([output, -output], 1)), batch[1]


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5, bias=False), nn.Tanh(), nn.Linear(5, 4))


def _frozen_bias() -> nn.Module:
    network = _mlp()
    network[0].bias.requires_grad_(False)
    return network


def _frozen_weight() -> nn.Module:
    network = _mlp()
    network[4].weight.requires_grad_(False)
    return network


def _narrow() -> nn.Module:
    """A weight of one column, of which the factors would be longer."""
    return nn.Sequential(nn.Linear(6, 1), nn.Tanh(), nn.Linear(1, 4))


def _convolution() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 2, 3), nn.GroupNorm(1, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 4)
    )


def _twice() -> nn.Module:
    return LayersOf(lambda m, x: m.b(m.a(m.a(x).tanh())), a=nn.Linear(6, 6), b=nn.Linear(6, 4))


def _positions() -> nn.Module:
    """One layer sees six positions of a sample, the other one."""
    return LayersOf(lambda m, x: m.b(m.a(x.unsqueeze(2)).tanh().sum(1)), a=nn.Linear(1, 5), b=nn.Linear(5, 4))


def _direct() -> nn.Module:
    """A weight that is used in its layer and beside it."""
    return LayersOf(lambda m, x: m.b(m.a(x)) + x @ m.b.weight.T, a=nn.Linear(6, 6), b=nn.Linear(6, 4))


@pytest.mark.parametrize(
    ("make", "pairs"),
    [
        (_mlp, 3),
        (_frozen_bias, 3),
        (_frozen_weight, 2),
        (_narrow, 0),
        (_convolution, 1),
        (_twice, 1),
        (_positions, 1),
        (_direct, 1),
    ],
)
def test_products_are_those_of_flattened_gradients(make: Any, pairs: int) -> None:
    torch.manual_seed(0)
    module = Classifier(make()).double().eval()
    batches = [(torch.randn(n, 6).double(), torch.randint(2, (n,))) for n in (B, M)]
    path, layout = plan(module, batches[0], B), ParameterLayout.of(module)
    factors, identity = GradientFactors(layout, path.outer), IdentityProjector().bind(layout, "final")
    assert len(factors.pairs) == pairs
    if pairs:
        assert factors.dim < layout.numel
    kept, whole = (
        [Featurizer(module, path, projection)(batch, range(len(batch[0])))["features"] for batch in batches]
        for projection in (factors, identity)
    )
    torch.testing.assert_close(factors.products(*kept), whole[0] @ whole[1].T, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(factors.squares(kept[0]), whole[0].square().sum(1), rtol=1e-10, atol=1e-12)
    assert identity.layers is not None
    layers = factors.of_layers()
    assert len(layers) == len(identity.layers)
    expected = sorted((whole[0][:, own] @ whole[1][:, own].T).sum().item() for own in identity.layers.values())
    assert sorted(layer.products(*kept).sum().item() for layer in layers) == pytest.approx(expected, rel=1e-10)
    squares = torch.stack([layer.squares(kept[0]) for layer in layers]).sum(0)
    torch.testing.assert_close(squares, whole[0].square().sum(1), rtol=1e-10, atol=1e-12)


def test_without_outer_products_it_is_the_identity() -> None:
    factors = GradientFactors(ParameterLayout({"w": (2, 3), "b": (2,)}))
    features = torch.ones(1, factors.dim)
    with factors.filling(features) as add:
        add({"b": torch.tensor([[3.0, 4.0]])})
    assert features.tolist() == [[0, 0, 0, 0, 0, 0, 3, 4]]


def _outer(positions: int = 1) -> OuterSum:
    return OuterSum(torch.ones(1, positions, 3), torch.ones(1, positions, 4))


@pytest.mark.parametrize(
    "uses",
    [
        [{"w": _outer()}, {"w": _outer()}],
        [{"w": _outer(2)}],
        [{"w": torch.ones(1, 3, 4)}],
        [{"bias": RowSum(_outer(2))}],
    ],
    ids=["two uses", "two positions", "no factors", "bias"],
)
def test_what_is_no_outer_product_is_refused(uses: list[dict[str, Any]]) -> None:
    layout = ParameterLayout({"w": (3, 4), "weight": (3, 4), "bias": (3,)})
    factors = GradientFactors(layout, ["w", "weight", "bias"])
    message = r"The layer of `(w|bias)` was called more than once.*Take `projector=IdentityProjector\(\)`"
    with factors.filling(torch.empty(1, factors.dim)) as add:
        for gradients in uses[:-1]:
            add(gradients)
        with pytest.raises(UnsupportedLayerError, match=message):
            add(uses[-1])
