"""Second directions that share a forward pass are those of a pass of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_attr import AttributionMixin
from lightning_attr.features.featurizer import Featurizer, plan
from lightning_attr.features.second_direction import GaussNewtonFeaturizer, SecondFeaturizer
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.projectors import KroneckerProjector

ROWS = [3, 4, 9, 11, 12, 20]


class Network(AttributionMixin, nn.Module):
    """Convolution, norm and linear layers; with `table`, a parameter that no layer owns."""

    def __init__(self, table: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4))
        self.table = nn.Parameter(torch.ones(4)) if table else None

    def attribution_step(self, batch: Any) -> tuple[Tensor, Tensor]:
        scores = self.layers(batch[0])
        return scores if self.table is None else scores * self.table, batch[1]


class Passes(TorchDispatchMode):
    """Counts forward passes by their activations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += str(func).startswith("aten.relu.")
        return func(*args, **(kwargs or {}))


def featurizers(table: bool, directions: int, share: float = 1.0) -> tuple[Any, ...]:
    torch.manual_seed(0)
    module = Network(table).double().eval()
    batch = torch.randn(len(ROWS), 1, 5, 5).double(), torch.randint(4, (len(ROWS),))
    found = plan(module, batch, len(ROWS))
    projection = KroneckerProjector(20).bind(ParameterLayout.of(module), "final")
    second = SecondFeaturizer(module, found, projection, None, "final", directions, share)
    return batch, Featurizer(module, found, projection, None, "final"), second


@pytest.mark.parametrize("directions", [1, 3])
@pytest.mark.parametrize("table", [False, True], ids=["hooks", "followed"])
def test_both_are_those_of_passes_of_their_own(table: bool, directions: int) -> None:
    batch, first, second = featurizers(table, directions)
    expected, directed = first(batch, ROWS), second(batch, ROWS)
    with Passes() as passes:
        found = GaussNewtonFeaturizer(second)(batch, ROWS)
    assert passes.count == (1 + directions if table else 1)
    torch.testing.assert_close(found.pop("second_features"), directed, rtol=1e-12, atol=1e-12)
    assert found.keys() == expected.keys()
    for name, values in found.items():
        torch.testing.assert_close(values, expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("share", "passes"), [(0.6, 1), (0.4, 2)])
def test_few_samples_with_directions_go_alone(share: float, passes: int) -> None:
    batch, _, second = featurizers(False, 1, share)
    expected = second(batch, ROWS)
    assert 0 < expected.flatten(1).any(1).sum() < len(ROWS)
    with Passes() as counted:
        found = GaussNewtonFeaturizer(second)(batch, ROWS)["second_features"]
    assert counted.count == passes
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
