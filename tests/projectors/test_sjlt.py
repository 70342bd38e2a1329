"""The sparse projection: where entries go, its variance, and what is kept of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.projectors import SJLTProjector, sjlt

DRAWS = 4000
LAYOUT = ParameterLayout({"w": (30,)})


def _images(projector: SJLTProjector, layout: ParameterLayout = LAYOUT) -> Tensor:
    """The images of the unit vectors, ``(parameters, dim)``."""
    ((name, shape),) = layout.shapes.items()
    features = torch.zeros(layout.numel, projector.proj_dim).double()
    projector.bind(layout, "final").accumulate(features, name, torch.eye(layout.numel).double().reshape(-1, *shape))
    return features


@pytest.mark.parametrize(("proj_dim", "nonzeros"), [(16, 1), (16, 4), (17, 5), (5, 5)])
def test_an_entry_goes_to_one_feature_of_each_interval(proj_dim: int, nonzeros: int) -> None:
    images = _images(SJLTProjector(proj_dim, nonzeros=nonzeros))
    for i in range(nonzeros):
        interval = images[:, i * proj_dim // nonzeros : (i + 1) * proj_dim // nonzeros]
        assert torch.equal((interval != 0).sum(1), torch.ones(30, dtype=torch.int64))
    torch.testing.assert_close(images.abs().amax(1), torch.full((30,), nonzeros**-0.5).double())
    assert {-1.0, 1.0} == set(images[images != 0].sign().tolist())


@pytest.mark.parametrize("dim", [3, 8, 100])
def test_no_feature_and_no_sign_is_favoured(dim: int) -> None:
    index, signs = sjlt._draw(60_000, dim, 1, (0, "final", "w", 0))
    assert (index.dtype, signs.dtype) == (torch.int32, torch.int8)
    counts = torch.zeros(2, dim)
    counts.index_put_(((signs[0] > 0).long(), index[0].long()), torch.ones(60_000), accumulate=True)
    expected = 60_000 / (2 * dim)
    chi_squared = ((counts - expected) ** 2 / expected).sum().item()
    freedom = 2 * dim - 1  # signs and features together: that they are independent, too
    assert abs(chi_squared - freedom) < 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("nonzeros", [1, 2])
def test_unbiased_with_the_variance_of_signs(nonzeros: int) -> None:
    x, y = torch.randn(2, 200, generator=torch.Generator().manual_seed(0)).double()
    y += 0.5 * x
    x[0] = y[0] = 6  # a large entry in common, which tells it from normal numbers
    k, layout = 16, ParameterLayout({"w": (200,)})
    products = torch.empty(DRAWS).double()
    for seed in range(DRAWS):
        features = torch.zeros(2, k).double()
        SJLTProjector(k, seed, nonzeros).bind(layout, "final").accumulate(features, "w", torch.stack([x, y]))
        products[seed] = features[0] @ features[1]
    product = (x @ y).item()
    variance = ((x @ x) * (y @ y) + product**2 - 2 * (x**2 @ y**2)).item() / k
    assert abs(products.mean().item() - product) < 4 * (variance / DRAWS) ** 0.5
    assert products.var().item() == pytest.approx(variance, rel=0.08)  # 3 standard errors


def test_tiles_are_drawn_apart_and_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sjlt, "_TILE", 7)  # several tiles, the last one cut
    images = _images(SJLTProjector(64))
    for start in range(0, 30, 7):
        index, signs = sjlt._draw(min(7, 30 - start), 64, 1, (0, "final", "w", start))
        expected = torch.zeros(len(index[0]), 64).double()
        expected[torch.arange(len(index[0])), index[0].long()] = signs[0].double()
        assert torch.equal(images[start : start + 7], expected)
    assert not torch.equal(images[:7], images[7:14])


def test_keeping_tiles_or_not_gives_the_same_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sjlt, "_TILE", 7)
    rows = torch.randn(3, 30)
    found = []
    for cache_bytes, tiles in ((2**20, 5), (0, 0), (100, 2)):  # a full tile takes 7 x 2 x 5 bytes, the last one 20
        sketch = sjlt.Sketch(8, (0, "final"), nonzeros=2, cache_bytes=cache_bytes)
        for _ in range(2):
            features = torch.zeros(3, 8)
            sketch.add(features, "w", rows)
            found.append(features)
        assert len(sketch.cache) == tiles
    assert all(torch.equal(features, found[0]) for features in found)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_rows_do_not_depend_on_their_batch_to_the_last_bit(batch: int) -> None:
    rows = torch.randn(64, 5000, generator=torch.Generator().manual_seed(0))
    sketch = sjlt.Sketch(16, (0, "final"))
    whole, part = torch.zeros(64, 16), torch.zeros(batch, 16)
    sketch.add(whole, "w", rows)
    sketch.add(part, "w", rows[7 : 7 + batch])
    assert torch.equal(part, whole[7 : 7 + batch])


def test_strides_change_nothing() -> None:
    rows = torch.randn(6, 3).T
    found = [torch.zeros(3, 16), torch.zeros(3, 32)[:, ::2]]
    for features, same in zip(found, (rows, rows.contiguous()), strict=True):
        sjlt.Sketch(16, (0, "final")).add(features, "w", same)
    assert torch.equal(*found)


def test_parameters_of_equal_shape_have_projections_of_their_own() -> None:
    one, other = (_images(SJLTProjector(64), ParameterLayout({name: (30,)})) for name in "ab")
    assert not torch.equal(one, other)


def test_the_stream_is_pinned() -> None:
    index, signs = sjlt._draw(4, 2048, 2, (0, "final", "w", 0))
    assert index.tolist() == [[688, 438, 819, 811], [1687, 1223, 1311, 1560]]
    assert signs.tolist() == [[1, 1, -1, 1], [1, 1, -1, -1]]


@pytest.mark.parametrize("nonzeros", [0, -1, 9])
def test_nonzeros_out_of_range(nonzeros: int) -> None:
    with pytest.raises(ValueError, match=rf"`nonzeros` .* from 1 to 8, but got {nonzeros}\. `proj_dim` is the most"):
        SJLTProjector(8, nonzeros=nonzeros)


def test_config_holds_what_changes_the_map() -> None:
    assert SJLTProjector(8, seed=2, nonzeros=3, cache_bytes=0).config == {
        "kind": "sjlt",
        "proj_dim": 8,
        "seed": 2,
        "nonzeros": 3,
    }
