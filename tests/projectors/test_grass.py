"""Masks: what they keep, of which form of gradient, and the variance of mask and SJLT together."""

from __future__ import annotations

import math
from functools import partial
from itertools import combinations

import pytest
import torch
from torch import Tensor

from lightning_attr.gradients import ConvSum, GatherSum, OuterSum, ParameterGradient
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.projectors import (
    FactGraSSProjector,
    GraSSProjector,
    Projector,
    SJLTProjector,
    grass,
    projector_from_config,
)
from lightning_attr.projectors.base import flat_slots

DRAWS = 4000
MASKED = [GraSSProjector, FactGraSSProjector]


def _images(projector: Projector, layout: ParameterLayout) -> Tensor:
    """The images of the unit vectors, ``(parameters, dim)``."""
    features, eye = torch.zeros(layout.numel, projector.proj_dim).double(), torch.eye(layout.numel).double()
    projection = projector.bind(layout, "final")
    for name, slot in flat_slots(layout).items():
        projection.accumulate(features, name, eye[:, slot].reshape(-1, *layout.shapes[name]))
    return features


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5])
def test_every_subset_is_as_likely(count: int) -> None:
    found: dict[tuple[int, ...], int] = dict.fromkeys(combinations(range(5), count), 0)
    for seed in range(2000):
        subset = grass._subset(count, 5, seed)
        assert subset.dtype == torch.int64
        found[tuple(subset.tolist())] += 1  # sorted and without repetition, or a KeyError
    expected = 2000 / len(found)
    chi_squared = sum((n - expected) ** 2 / expected for n in found.values())
    assert chi_squared <= len(found) - 1 + 4 * math.sqrt(2 * (len(found) - 1))


@pytest.mark.parametrize("factor", [1, 4])
def test_grass_keeps_so_many_entries_of_the_whole_gradient(factor: int) -> None:
    layout = ParameterLayout({"weight": (20, 30), "bias": (20,), "scale": ()})
    images = _images(GraSSProjector(16, mask_factor=factor), layout)
    kept = images.abs().sum(1)
    assert torch.equal(kept.nonzero().flatten(), grass._subset(16 * factor, 621, 0, "final"))
    assert torch.equal((images != 0).sum(1), (kept > 0).long())  # one feature each
    torch.testing.assert_close(kept[kept > 0], torch.full((16 * factor,), math.sqrt(621 / (16 * factor))).double())


@pytest.mark.parametrize("kind", MASKED)
def test_where_all_is_kept_it_is_sjlt(kind: type[Projector]) -> None:
    layout = ParameterLayout({"weight": (6, 9), "bias": (6,), "scale": ()})
    assert torch.equal(_images(kind(24), layout), _images(SJLTProjector(24), layout))


@pytest.mark.parametrize("kind", [GraSSProjector, FactGraSSProjector, partial(FactGraSSProjector, per_layer=True)])
@pytest.mark.parametrize("proj_dim", [61, 80])
def test_as_many_features_as_entries_are_the_entries(kind: type[Projector], proj_dim: int) -> None:
    layout = ParameterLayout({"a.weight": (6, 9), "a.bias": (6,), "scale": ()})
    projection = kind(proj_dim).bind(layout, "final")
    assert torch.equal(_images(kind(proj_dim), layout)[:, :61], torch.eye(61).double())
    assert projection.dim == 61
    assert projection.layers == {"a": slice(0, 60), "": slice(60, 61)}


@pytest.mark.parametrize("kind", [GraSSProjector, FactGraSSProjector])
def test_few_kept_entries_are_not_hashed(kind: type[Projector]) -> None:
    layout = ParameterLayout({"w": (30, 40)})
    images = _images(kind(150, mask_factor=1), layout)
    kept = (images != 0).any(1)
    assert (kept.sum() == 150) if kind is GraSSProjector else (kept.sum() == 144)
    assert torch.equal((images != 0).sum(1), kept.long())
    scale = 1200 / int(kept.sum())
    torch.testing.assert_close(images @ images.T, scale * kept.double().diag())


def test_stores_of_maps_that_hashed_few_entries_are_refused() -> None:
    config = GraSSProjector(16).config
    assert projector_from_config(config).config == config
    with pytest.raises(ValueError, match="the store was written with 'grass'"):
        projector_from_config({**config, "kind": "grass"})
    with pytest.raises(ValueError, match="the store was written with 'factgrass'"):
        projector_from_config({**config, "kind": "factgrass"})


def test_factgrass_keeps_rows_and_columns() -> None:
    layout = ParameterLayout({"a": (12, 5, 4), "b": (100,), "c": (2, 30), "d": (40, 1)})
    # A side of 5 gives 25 + 25 + 10 + 25 = 85 entries; 6 would give 36 + 36 + 12 + 36 = 120.
    images = _images(FactGraSSProjector(100, mask_factor=1), layout).abs().sum(1)
    slots = flat_slots(layout)
    for name, shape, scale in (("a", (5, 5), 240 / 25), ("c", (2, 5), 60 / 10)):
        kept = images[slots[name]].reshape(layout.shapes[name][0], -1)
        rows, columns = kept.any(1), kept.any(0)
        assert (rows.sum(), columns.sum()) == shape
        expected = torch.outer(rows.double(), columns.double()) * math.sqrt(scale)
        torch.testing.assert_close(kept, expected)
    for name, size in (("b", 100), ("d", 40)):
        kept = images[slots[name]]
        assert (kept > 0).sum() == 25
        torch.testing.assert_close(kept[kept > 0], torch.full((25,), math.sqrt(size / 25)).double())


def _factored() -> dict[str, tuple[ParameterGradient, tuple[int, ...]]]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(3, *shape, generator=generator).double()

    ids = torch.randint(40, (3, 60), generator=generator)
    return {
        "linear": (OuterSum(draw(4, 40), draw(4, 30)), (40, 30)),
        "table": (GatherSum(ids, draw(60, 30), 40), (40, 30)),
        "conv": (ConvSum(draw(8, 12), draw(20, 10), (3,), (1,), (1,), 1), (20, 8, 3)),
        "grouped": (ConvSum(draw(8, 12), draw(20, 10), (3,), (1,), (1,), 2), (20, 4, 3)),
    }


@pytest.mark.parametrize("form", _factored())
@pytest.mark.parametrize("kind", MASKED)
@pytest.mark.parametrize("proj_dim", [2, 20, 60, 500])  # few entries, which are gathered, and many
def test_factors_give_what_the_whole_gradient_gives(kind: type[Projector], form: str, proj_dim: int) -> None:
    gradient, shape = _factored()[form]
    projection = kind(proj_dim).bind(ParameterLayout({"w": shape}), "final")
    found, expected = torch.zeros(3, proj_dim).double(), torch.zeros(3, proj_dim).double()
    projection.accumulate(found, "w", gradient)
    projection.accumulate(expected, "w", gradient.materialise().reshape(3, *shape))
    assert expected.any()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["linear", "table"])
@pytest.mark.parametrize(("kind", "proj_dim"), [(GraSSProjector, 2), (FactGraSSProjector, 200)])
def test_the_matrix_is_not_formed(
    kind: type[Projector], proj_dim: int, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradient, shape = _factored()[form]
    project = type(gradient).project

    def watched(self: OuterSum | GatherSum, left: Tensor | None, right: Tensor | None) -> Tensor:
        assert self.columns.shape[2] < shape[1]
        return project(self, left, right)

    monkeypatch.setattr(type(gradient), "project", watched)
    features = torch.zeros(3, proj_dim).double()
    kind(proj_dim).bind(ParameterLayout({"w": shape}), "final").accumulate(features, "w", gradient)
    assert features.any()


class Masked:
    """Expected sums over a random subset of ``m`` of the entries, each product scaled by ``p / m``."""

    def __init__(self, x: Tensor, y: Tensor, kept: int) -> None:
        p = len(x)
        one, two = kept / p, kept * (kept - 1) / (p * (p - 1))  # that an entry is kept, and two of them

        def moment(total: Tensor) -> float:
            """Of a double sum whose diagonal is the fourth moment."""
            return ((p / kept) ** 2 * (two * (total - fourth) + one * fourth)).item()

        fourth = x**2 @ y**2
        self.product_squared = moment((x @ y) ** 2)
        self.norms = moment((x @ x) * (y @ y))
        self.fourth = (p / kept) ** 2 * one * fourth.item()


def _check(projector: type[Projector], k: int, shape: tuple[int, ...], x: Tensor, y: Tensor, variance: float) -> None:
    layout, gradient = ParameterLayout({"w": shape}), torch.stack([x, y]).reshape(2, *shape)
    products = torch.empty(DRAWS).double()
    for seed in range(DRAWS):
        features = torch.zeros(2, k).double()
        projector(k, seed, mask_factor=2).bind(layout, "final").accumulate(features, "w", gradient)
        products[seed] = features[0] @ features[1]
    assert abs(products.mean().item() - (x @ y).item()) < 4 * (variance / DRAWS) ** 0.5
    assert products.var().item() == pytest.approx(variance, rel=0.15)  # its tails are heavy


@pytest.mark.parametrize(("shape", "kind"), [((200,), GraSSProjector), ((200,), FactGraSSProjector)])
def test_a_masked_vector_is_unbiased_with_the_known_variance(shape: tuple[int, ...], kind: type[Projector]) -> None:
    x, y = torch.randn(2, 200, generator=torch.Generator().manual_seed(0)).double()
    y += x
    k, kept = 18, 36  # six squared, which FactGraSS keeps too
    masked = Masked(x, y, kept)
    p, product, z = 200, (x @ y).item(), x * y
    of_mask = p**2 * (1 - kept / p) * z.var().item() / kept  # the docstring's form
    assert masked.product_squared - product**2 == pytest.approx(of_mask)
    of_sjlt = (masked.norms + masked.product_squared - 2 * masked.fourth) / k
    everything = ((x @ x) * (y @ y)).item() + product**2 - 2 * (z @ z).item()
    assert of_sjlt == pytest.approx(everything * p * (kept - 1) / (k * kept * (p - 1)))
    _check(kind, k, shape, x, y, of_mask + of_sjlt)


def test_a_masked_matrix_is_unbiased_with_the_known_variance() -> None:
    # Of gradients of rank one, expectations over rows and columns multiply.
    generator = torch.Generator().manual_seed(0)
    e, f = torch.randn(2, 12, generator=generator).double()
    a, c = torch.randn(2, 15, generator=generator).double()
    f, c, k = f + e, c + a, 18  # 36 entries: six rows and six columns
    rows, columns = Masked(e, f, 6), Masked(a, c, 6)
    product = ((e @ f) * (a @ c)).item()
    variance = rows.product_squared * columns.product_squared - product**2
    variance += (
        rows.norms * columns.norms + rows.product_squared * columns.product_squared - 2 * rows.fourth * columns.fourth
    ) / k
    _check(FactGraSSProjector, k, (12, 15), torch.outer(e, a).flatten(), torch.outer(f, c).flatten(), variance)


@pytest.mark.parametrize("kind", MASKED)
@pytest.mark.parametrize("factor", [0, -1])
def test_mask_factor_that_is_not_positive(kind: type[Projector], factor: int) -> None:
    with pytest.raises(ValueError, match=rf"`mask_factor` of .+ to be an integer >= 1, but got {factor}\."):
        kind(8, mask_factor=factor)


def test_factgrass_with_too_few_entries_for_the_parameters() -> None:
    layout = ParameterLayout(dict.fromkeys("abcde", (3, 3)))
    with pytest.raises(ValueError, match=r"`mask_factor \* proj_dim` to be at least 5, .* but got 4\. Raise them"):
        FactGraSSProjector(2, mask_factor=2).bind(layout, "final")
    assert (_images(FactGraSSProjector(5, mask_factor=1), layout) != 0).sum() == 5


@pytest.mark.parametrize("kind", MASKED)
def test_config_holds_the_mask_factor(kind: type[Projector]) -> None:
    assert kind(8, seed=2, mask_factor=3).config == {"kind": kind.kind, "proj_dim": 8, "seed": 2, "mask_factor": 3}
