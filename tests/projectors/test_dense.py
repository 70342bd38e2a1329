"""Dense projections: entries, tiles and what is kept of them."""

from __future__ import annotations

import pytest
import torch

from lightning_attr.gradients.factored import OuterSum
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.projectors import GaussianProjector, RademacherProjector, dense
from lightning_attr.randomness.streams import rademacher

KINDS = [RademacherProjector, GaussianProjector]
LAYOUT = ParameterLayout({"a": (3, 7), "b": (4,)})


def _features(projector: RademacherProjector, layout: ParameterLayout = LAYOUT, batches: int = 1) -> torch.Tensor:
    projection = projector.bind(layout, "final")
    for _ in range(batches):
        features = torch.zeros(2, projection.dim).double()
        for i, (name, shape) in enumerate(layout.shapes.items()):
            gradient = torch.randn(2, *shape, generator=torch.Generator().manual_seed(i)).double()
            projection.accumulate(features, name, gradient)
    return features


@pytest.mark.parametrize("kind", KINDS)
def test_keeping_tiles_or_not_gives_the_same_features(
    kind: type[RademacherProjector], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "_KEYED", 5)
    monkeypatch.setattr(dense, "_TILE", 5)  # several tiles a parameter, the last one cut
    kept = kind(8).bind(LAYOUT, "final")
    drawn = kind(8, cache_bytes=0).bind(LAYOUT, "final")
    some = kind(8, cache_bytes=20 if kind is RademacherProjector else 400).bind(LAYOUT, "final")
    for _ in range(2):
        found = []
        for projection in (kept, drawn, some):
            features = torch.zeros(2, 8).double()
            for name, shape in LAYOUT.shapes.items():
                gradient = torch.linspace(-1, 1, 2 * torch.Size(shape).numel()).double().reshape(2, *shape)
                projection.accumulate(features, name, gradient)
            found.append(features)
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])
    assert (len(kept.cache), len(drawn.cache)) == (6, 0)
    assert 0 < len(some.cache) < 6


@pytest.mark.parametrize("kind", KINDS)
def test_later_batches_see_the_same_projection(kind: type[RademacherProjector]) -> None:
    assert torch.equal(_features(kind(8)), _features(kind(8), batches=3))


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_of_several_tiles(kind: type[RademacherProjector]) -> None:
    layout = ParameterLayout({"w": (2, 4500)})
    projection = kind(4).bind(layout, "final")
    gradient = torch.zeros(3, 2, 4500)
    gradient[0, 0, 0] = gradient[1, 0, 4096] = gradient[2, 1, 4499] = 1  # one entry in each of the tiles
    features = torch.zeros(3, 4)
    projection.accumulate(features, "w", gradient)
    assert len(projection.cache) == 3
    assert features.abs().sum(1).min() > 0
    assert len({tuple(row.tolist()) for row in features}) == 3  # drawn apart


def _signs(size: int, dim: int, name: str = "w") -> torch.Tensor:
    """The matrix as it is documented: drawn for every 1024 parameters."""
    starts = range(0, size, 1024)
    return torch.cat([rademacher((min(1024, size - i), dim), 0, "final", name, i) for i in starts])


@pytest.fixture
def integers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in integers, on every processor."""
    if not dense._multiplies_bytes():
        monkeypatch.setattr(dense, "_integer_product", lambda bits, factors: bits.int() @ factors.int().T)
        monkeypatch.setattr(dense, "_multiplies_bytes", lambda: True)


@pytest.fixture(params=["integers", "floats"])
def in_integers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param == "integers":
        request.getfixturevalue("integers")
    else:
        monkeypatch.setattr(dense, "_multiplies_bytes", lambda: False)
    return bool(request.param == "integers")


@pytest.mark.parametrize("dim", [1, 8, 20, 1030])  # up to several blocks of bytes, the last one cut
@pytest.mark.parametrize("shape", [(), (7,), (1, 4097), (3, 50, 61)])
def test_rademacher_features_are_products_with_the_signs(shape: tuple[int, ...], dim: int, in_integers: bool) -> None:
    size = torch.Size(shape).numel()
    gradient = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0))
    gradient *= torch.logspace(-20, 20, 5).view(5, *(1 for _ in shape))  # each sample has scales of its own
    expected = gradient.double().reshape(5, -1) @ _signs(size, dim).double() / dim**0.5
    projection = RademacherProjector(dim).bind(ParameterLayout({"w": shape}), "final")
    for dtype, tolerance in ((torch.float32, 2e-4 if in_integers else 1e-6), (torch.float64, 1e-13)):
        features = torch.zeros(5, dim, dtype=dtype)
        projection.accumulate(features, "w", gradient)
        error = (features.double() - expected).norm(dim=1) / gradient.double().reshape(5, -1).norm(dim=1)
        assert error.max() < tolerance


@pytest.mark.parametrize("shape", [(1,), (10,), (3, 50, 61)])
@pytest.mark.usefixtures("integers")
def test_rademacher_features_in_integers_do_not_depend_on_the_batch(shape: tuple[int, ...]) -> None:
    gradient = torch.randn(33, *shape, generator=torch.Generator().manual_seed(0))
    projection = RademacherProjector(20).bind(ParameterLayout({"w": shape}), "final")
    whole = torch.zeros(33, 20)
    projection.accumulate(whole, "w", gradient)
    for size in (1, 2, 5, 32):
        features = torch.zeros(33, 20)
        for part, rows in zip(features.split(size), gradient.split(size), strict=True):
            projection.accumulate(part, "w", rows)
        assert torch.equal(features, whole)


def test_nan_inf_and_zero_stay_what_they_are(in_integers: bool) -> None:
    gradient = torch.ones(5, 4097)
    gradient[1], gradient[2, 7], gradient[3, 4096], gradient[4] = 0, torch.nan, torch.inf, 1e-40
    features = torch.zeros(5, 8)
    RademacherProjector(8).bind(ParameterLayout({"w": (4097,)}), "final").accumulate(features, "w", gradient)
    assert features.isfinite().all(1).tolist() == [True, True, False, False, True]
    assert not features[2:4].isfinite().any()
    assert torch.equal(features[1], torch.zeros(8))
    assert features[4].abs().max() < 1e-37  # too small to be rounded to 16 bits of its own scale


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_formed_in_pieces_are_those_formed_at_once(
    kind: type[RademacherProjector], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    factors = OuterSum(torch.randn(3, 6, 70, generator=generator), torch.randn(3, 6, 256, generator=generator))
    projection = kind(20).bind(ParameterLayout({"w": (70, 256)}), "final")
    whole, pieces = torch.zeros(3, 20).double(), torch.zeros(3, 20).double()
    projection.accumulate(whole, "w", factors.materialise())
    monkeypatch.setattr(dense, "_PIECE", dense._TILE)
    assert [start for start, _ in dense._pieces(factors, (70, 256))] == [0, 4096, 8192, 12288, 16384]
    projection.accumulate(pieces, "w", factors)
    torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-5)


def test_rademacher_entries_are_signs() -> None:
    layout = ParameterLayout({"w": (50,)})
    features = torch.zeros(50, 16)
    RademacherProjector(16).bind(layout, "final").accumulate(features, "w", torch.eye(50))
    assert torch.equal(features.abs(), torch.full((50, 16), 0.25))
    torch.testing.assert_close(features.norm(dim=1), torch.ones(50))


def test_gaussian_entries_have_the_right_spread() -> None:
    layout = ParameterLayout({"w": (2000,)})
    features = torch.zeros(2000, 16)
    GaussianProjector(16).bind(layout, "final").accumulate(features, "w", torch.eye(2000))
    assert features.std().item() == pytest.approx(0.25, rel=0.02)
    assert (4 * features).pow(4).mean().item() == pytest.approx(3, rel=0.1)  # a normal kurtosis


def test_parameters_of_equal_shape_have_projections_of_their_own() -> None:
    projection = RademacherProjector(64).bind(ParameterLayout({"a": (3,), "b": (3,)}), "final")
    found = [torch.zeros(1, 64), torch.zeros(1, 64)]
    for name, features in zip("ab", found, strict=True):
        projection.accumulate(features, name, torch.ones(1, 3))
    assert not torch.equal(*found)
