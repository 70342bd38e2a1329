"""The Kronecker-factored projection: sides, bias, and when it is exact."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch import nn

from lightning_attr.gradients import GatherSum, OuterSum, ParameterGradient, RowSum, materialise
from lightning_attr.gradients.convolution import convolution
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.projectors import KroneckerProjector, Projector, RademacherProjector
from lightning_attr.randomness.streams import rademacher

LAYOUT = ParameterLayout({"weight": (8, 10), "bias": (8,)})


def _net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Embedding(7, 3), nn.Linear(5, 6, bias=False))


def test_features_are_both_sides_of_the_gradient_with_the_bias_as_last_column() -> None:
    side, seed = 4, 7
    projection = KroneckerProjector(side**2, seed=seed).bind(LAYOUT, "final")
    assert projection.dim == side**2
    weight, bias = torch.randn(3, 8, 10).double(), torch.randn(3, 8).double()
    left, right = (
        rademacher((side, size), seed, "final", "weight", name).double() / math.sqrt(side)
        for name, size in (("rows", 8), ("columns", 11))
    )
    features = torch.zeros(3, projection.dim).double()
    projection.accumulate(features, "weight", weight)
    projection.accumulate(features, "bias", bias)
    expected = left @ torch.cat([weight, bias[:, :, None]], 2) @ right.T
    torch.testing.assert_close(features, expected.flatten(1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("proj_dim", [40, 88, 1000])
def test_a_small_side_is_kept_as_it_is(proj_dim: int) -> None:
    layout = ParameterLayout({"weight": (2, 50), "bias": (2,)})
    projection = KroneckerProjector(proj_dim).bind(layout, "final")
    assert projection.dim == 2 * min(proj_dim // 2, 51)
    rows = OuterSum(torch.tensor([[[1.0, 0.0]]]), torch.randn(1, 1, 50))
    features = torch.zeros(1, projection.dim)
    projection.accumulate(features, "weight", rows)
    assert not features.reshape(2, -1)[1].any()  # the rows of the gradient are not mixed
    assert features.reshape(2, -1)[0].any()


def test_nothing_is_lost_where_there_is_room() -> None:
    layout = ParameterLayout.of(_net())
    for proj_dim in (layout.numel, layout.numel + 1, 10**6):
        projection = KroneckerProjector(proj_dim).bind(layout, "final")
        assert projection.dim == layout.numel
        gradients = {name: torch.randn(5, *shape).double() for name, shape in layout.shapes.items()}
        features = torch.zeros(5, projection.dim).double()
        for name, gradient in gradients.items():
            projection.accumulate(features, name, gradient)
        flat = torch.cat([gradient.flatten(1) for gradient in gradients.values()], 1)
        torch.testing.assert_close(features @ features.T, flat @ flat.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("proj_dim", [5, 17, 50, 100, 131])
def test_the_side_is_the_largest_that_fits(proj_dim: int) -> None:
    layout = ParameterLayout.of(_net())
    sizes = [(4, 19), (4, 1), (4, 1), (7, 3), (6, 5)]  # weight and bias of the convolution, BatchNorm, table, linear

    def total(side: int) -> int:
        return sum(min(side, rows) * min(side, columns) for rows, columns in sizes)

    fits = max(side for side in range(1, 20) if total(side) <= proj_dim)
    assert KroneckerProjector(proj_dim).bind(layout, "final").dim == total(fits)


def test_too_few_features_for_the_weights() -> None:
    with pytest.raises(ValueError, match="`proj_dim` to be at least 5, one for each weight of the module, but got 4"):
        KroneckerProjector(4).bind(ParameterLayout.of(_net()), "final")
    assert KroneckerProjector(5).bind(ParameterLayout.of(_net()), "final").dim == 5


def test_a_bias_listed_before_its_weight_is_its_last_column_all_the_same() -> None:
    one = KroneckerProjector(16).bind(LAYOUT, "final")
    other = KroneckerProjector(16).bind(ParameterLayout({"bias": (8,), "weight": (8, 10)}), "final")
    assert one.dim == other.dim
    for name, shape in LAYOUT.shapes.items():
        gradient = torch.randn(2, *shape)
        found = [torch.zeros(2, 16), torch.zeros(2, 16)]
        for projection, features in zip((one, other), found, strict=True):
            projection.accumulate(features, name, gradient)
        assert torch.equal(*found)


@pytest.mark.parametrize(
    "shapes",
    [
        {"weight": (8, 10), "bias": (10,)},  # of another size
        {"weight": (8,), "bias": (8,)},  # of a vector, as in LayerNorm
        {"a.weight": (8, 10), "b.bias": (8,)},  # of another layer
    ],
)
def test_a_vector_that_is_no_bias_stays_apart(shapes: dict[str, tuple[int, ...]]) -> None:
    projection = KroneckerProjector(10**4).bind(ParameterLayout(shapes), "final")
    first, second = shapes
    features = torch.zeros(1, projection.dim)
    projection.accumulate(features, second, torch.ones(1, *shapes[second]))
    size = math.prod(shapes[first])
    assert not features[:, :size].any()
    assert features[:, size:].all()


@pytest.mark.parametrize("proj_dim", [16, 36, 10_000])
def test_layer_at_once_equals_its_parameters_one_by_one(proj_dim: int) -> None:
    layout = ParameterLayout({"a.weight": (8, 10), "a.bias": (8,), "b.weight": (6, 8)})
    projection = KroneckerProjector(proj_dim).bind(layout, "final")
    first = OuterSum(torch.randn(3, 5, 8).double(), torch.randn(3, 5, 10).double())
    other = OuterSum(torch.randn(3, 5, 8).double(), torch.randn(3, 5, 10).double())
    for bias in (RowSum(first), RowSum(other), torch.randn(3, 8).double()):
        gradients = {"a.weight": first, "a.bias": bias}
        together, apart = (torch.zeros(3, projection.dim).double() for _ in range(2))
        projection.accumulate_layer(together, gradients)
        for name, gradient in gradients.items():
            projection.accumulate(apart, name, gradient)
        torch.testing.assert_close(together, apart, rtol=1e-12, atol=1e-12)
        assert together.any()


def test_way_of_each_layer_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    layout = ParameterLayout({"short": (8, 10), "long": (8, 10)})
    projection = KroneckerProjector(98).bind(layout, "final")  # 7 x 7 each
    features = torch.zeros(1, projection.dim)
    with caplog.at_level(logging.DEBUG, logger="lightning_attr"):
        for _ in range(2):
            projection.accumulate(features, "short", OuterSum(torch.ones(1, 1, 8), torch.ones(1, 1, 10)))
            projection.accumulate(features, "long", OuterSum(torch.ones(1, 500, 8), torch.ones(1, 500, 10)))
    assert caplog.messages == [
        "short: gradients are projected factor by factor.",
        "long: gradients are materialised, then projected.",
    ]


@pytest.mark.parametrize(
    "projector", [KroneckerProjector(40), KroneckerProjector(200), RademacherProjector(5)], ids=["40", "200", "dense"]
)
@pytest.mark.parametrize("positions", [1, 6])
def test_filling_overwrites_what_was_there_and_adds_from_then_on(projector: Projector, positions: int) -> None:
    layout = ParameterLayout({
        "a.weight": (8, 10),
        "a.bias": (8,),
        "b.weight": (8, 10),
        "b.bias": (8,),
        "norm": (12,),
        "unused": (20, 3),
    })
    projection = projector.bind(layout, "final")

    def linear(name: str) -> dict[str, ParameterGradient]:
        weight = OuterSum(torch.randn(3, positions, 8), torch.randn(3, positions, 10))
        return {f"{name}.weight": weight, f"{name}.bias": RowSum(weight)}

    apart = {"b.bias": torch.randn(3, 8), "b.weight": torch.randn(3, 8, 10)}  # a bias that no weight brings along
    uses = [linear("a"), linear("a"), apart, linear("b"), {"norm": torch.randn(3, 12)}, {"norm": torch.randn(3, 12)}]
    expected = torch.zeros(3, projection.dim)
    for use in uses:
        for name, gradient in use.items():
            projection.accumulate(expected, name, gradient)
    found = torch.full((3, projection.dim), torch.nan)
    for _ in range(2):  # the second batch into the same place
        with projection.filling(found) as add:
            for use in uses:
                add(use)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("proj_dim", [60, 5000])
def test_filling_with_convolutions(proj_dim: int) -> None:
    layer = nn.Conv2d(3, 5, 3, padding=1)
    projection = KroneckerProjector(proj_dim).bind(ParameterLayout.of(layer), "final")
    gradients = convolution(layer, torch.randn(2, 3, 6, 6), torch.randn(2, 5, 6, 6))
    expected, found = torch.zeros(2, projection.dim), torch.full((2, projection.dim), torch.nan)
    for name, gradient in gradients.items():
        projection.accumulate(expected, name, gradient)
    with projection.filling(found) as add:
        add(gradients)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("proj_dim", [60, 5000])
@pytest.mark.parametrize("bias_too", [False, True])
def test_filling_where_the_weight_comes_without_its_bias(proj_dim: int, bias_too: bool) -> None:
    layout = ParameterLayout({"weight": (8, 10), "bias": (8,)})
    projection = KroneckerProjector(proj_dim).bind(layout, "final")
    ids, rows = torch.randint(0, 8, (3, 4)), torch.randn(3, 4, 10)
    weight = OuterSum(torch.randn(3, 5, 8), torch.randn(3, 5, 10))
    with_bias: dict[str, ParameterGradient] = {"weight": weight, "bias": RowSum(weight)}
    uses: list[dict[str, ParameterGradient]] = [{"weight": GatherSum(ids, rows, 8)}, {"weight": weight}]
    uses += [with_bias] * bias_too
    expected, found = torch.zeros(3, projection.dim), torch.full((3, projection.dim), torch.nan)
    for use in uses:
        for name, gradient in use.items():
            projection.accumulate(expected, name, materialise(gradient, layout.shapes[name]))
    with projection.filling(found) as add:
        for use in uses:
            add(use)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
