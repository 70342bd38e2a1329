"""The two-stage projection: each stage against its definition, and the variance of both together."""

from __future__ import annotations

import pytest
import torch

from lightning_attr.gradients import OuterSum
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.projectors import FactoredSJLTProjector, SJLTProjector
from lightning_attr.projectors.kronecker import Sides

DRAWS = 4000


def test_features_are_the_sjlt_of_both_sides_of_the_gradient() -> None:
    layout = ParameterLayout({"a": (8, 5, 2), "b": (9,), "c": (3, 7)})
    key = (2, "final")
    left, right = Sides.draw(4, 8, 10, key, "a").on(torch.zeros(()).double())
    below = Sides.draw(4, 3, 7, key, "c").on(torch.zeros(()).double())
    assert left.shape == (4, 8)
    assert right.shape == (4, 10)
    assert below[0] is None  # three rows are not reduced
    gradients = {name: torch.randn(5, *shape).double() for name, shape in layout.shapes.items()}
    first = {
        "a": left @ gradients["a"].flatten(2) @ right.T,
        "b": gradients["b"],
        "c": gradients["c"] @ below[1].T,
    }
    found, expected = torch.zeros(5, 16).double(), torch.zeros(5, 16).double()
    projection = FactoredSJLTProjector(16, seed=2, side=4).bind(layout, "final")
    second = SJLTProjector(16, seed=2).bind(
        ParameterLayout({name: tuple(g.shape[1:]) for name, g in first.items()}), "final"
    )
    for name, gradient in gradients.items():
        projection.accumulate(found, name, gradient)
        second.accumulate(expected, name, first[name])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_with_a_large_side_it_is_sjlt() -> None:
    layout = ParameterLayout({"weight": (6, 9), "bias": (6,)})
    found = [torch.zeros(2, 16), torch.zeros(2, 16)]
    for projector, features in zip((FactoredSJLTProjector(16, side=9), SJLTProjector(16)), found, strict=True):
        for i, (name, shape) in enumerate(layout.shapes.items()):
            gradient = torch.randn(2, *shape, generator=torch.Generator().manual_seed(i))
            projector.bind(layout, "final").accumulate(features, name, gradient)
    assert torch.equal(*found)


def test_unbiased_with_the_known_variance() -> None:
    # Of gradients of rank one, the first stage's second moment is known: that of signs on each side.
    rows, columns, side, k = 8, 10, 4, 12
    generator = torch.Generator().manual_seed(0)
    e, f = torch.randn(2, rows, generator=generator).double()
    a, c = torch.randn(2, columns, generator=generator).double()
    f, c = f + e, c + a
    gradient = OuterSum(torch.stack([e, f])[:, None], torch.stack([a, c])[:, None])
    layout = ParameterLayout({"weight": (rows, columns)})
    products, spread = torch.empty(DRAWS).double(), torch.empty(500).double()
    for seed in range(DRAWS):
        features = torch.zeros(2, k).double()
        FactoredSJLTProjector(k, seed, side).bind(layout, "final").accumulate(features, "weight", gradient)
        products[seed] = features[0] @ features[1]
        if seed >= len(spread):
            continue
        x, y = Sides.draw(side, rows, columns, (seed, "final"), "weight").project(gradient, features).flatten(1)
        spread[seed] = (x @ x) * (y @ y) + (x @ y) ** 2 - 2 * (x**2 @ y**2)

    def second_moment(x: torch.Tensor, y: torch.Tensor) -> float:
        variance = (x @ x) * (y @ y) + (x @ y) ** 2 - 2 * (x**2 @ y**2)
        return (variance / side + (x @ y) ** 2).item()

    product = ((e @ f) * (a @ c)).item()
    variance = second_moment(e, f) * second_moment(a, c) - product**2 + spread.mean().item() / k
    assert abs(products.mean().item() - product) < 4 * (variance / DRAWS) ** 0.5
    assert products.var().item() == pytest.approx(variance, rel=0.15)  # its tails are heavy


@pytest.mark.parametrize("side", [0, -3])
def test_side_that_is_not_positive(side: int) -> None:
    with pytest.raises(ValueError, match=rf"`side` of .+ to be an integer >= 1, but got {side}\."):
        FactoredSJLTProjector(side=side)


def test_config_holds_the_side() -> None:
    assert FactoredSJLTProjector(8, seed=2, side=3).config == {
        "kind": "factored_sjlt",
        "proj_dim": 8,
        "seed": 2,
        "side": 3,
    }
