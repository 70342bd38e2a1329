"""Dense projections: entries, tiles and what is kept of them."""

from __future__ import annotations

import pytest
import torch

from lightning_attr.layout import ParameterLayout
from lightning_attr.projectors import GaussianProjector, RademacherProjector, dense

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
    layout = ParameterLayout({"w": (2, 1250)})
    projection = kind(4).bind(layout, "final")
    gradient = torch.zeros(3, 2, 1250)
    gradient[0, 0, 0] = gradient[1, 0, 1024] = gradient[2, 1, 1249] = 1  # one entry in each of the tiles
    features = torch.zeros(3, 4)
    projection.accumulate(features, "w", gradient)
    assert len(projection.cache) == 3
    assert features.abs().sum(1).min() > 0
    assert len({tuple(row.tolist()) for row in features}) == 3  # drawn apart


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
