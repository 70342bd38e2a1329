"""Inner products with one vector: against those of flattened gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_attr import AttributionMixin
from lightning_attr.features.featurizer import Featurizer, plan
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.projectors import IdentityProjector
from lightning_attr.projectors.inner_product import InnerProduct

B = 5


class Classifier(AttributionMixin, nn.Module):
    """A batch is (inputs, labels)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def attribution_step(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self.network(batch[0]), batch[1]


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5, bias=False), nn.Tanh(), nn.Linear(5, 4))


def _convolution() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 2, 3), nn.GroupNorm(1, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 4)
    )


def _tokens() -> nn.Module:
    """A table, and a linear layer at several positions of a sample."""
    return nn.Sequential(nn.Embedding(9, 3), nn.Linear(3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4))


@pytest.mark.parametrize("make", [_mlp, _convolution, _tokens])
@pytest.mark.parametrize("wanted", [None, "bias"])
def test_products_are_those_of_flattened_gradients(make: Callable[[], nn.Module], wanted: str | None) -> None:
    torch.manual_seed(0)
    module = Classifier(make().double()).eval()
    inputs = torch.randint(9, (B, 6)) if make is _tokens else torch.randn(B, 6).double()
    batch, rows = (inputs, torch.arange(B) % 4), range(B)
    layout, found = ParameterLayout.of(module), plan(module, batch, B)
    vector = {name: torch.randn(shape).double() for name, shape in layout.shapes.items()}
    if wanted is not None:
        vector = {name: part if wanted in name else torch.zeros_like(part) for name, part in vector.items()}
    flat = torch.cat([part.flatten() for part in vector.values()])
    expected = Featurizer(module, found, IdentityProjector().bind(layout, ""))(batch, rows)["features"] @ flat
    given = {name: part for name, part in vector.items() if wanted is None or wanted in name}
    products = Featurizer(module, found, InnerProduct(given))(batch, rows)["features"]
    torch.testing.assert_close(products[:, 0], expected, rtol=1e-10, atol=1e-12)
