"""Projected influence against the formula with every matrix written out, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_attr import AttributionMixin
from lightning_attr.features.featurizer import Featurizer, plan
from lightning_attr.methods import TRAK, FactGraSS, LoGra, ProjectedInfluence, SnapshotFeatures
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.projectors import (
    FactGraSSProjector,
    FactoredSJLTProjector,
    GraSSProjector,
    IdentityProjector,
    KroneckerProjector,
    Projector,
    RademacherProjector,
)

N, M, K = 30, 4, 9
LAYERS = {"first": slice(0, 4), "second": slice(4, 9)}


def columns(rows: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.rand(rows, generator=generator).double()
    features = torch.randn(rows, K, generator=generator).double()
    return {"features": features, "out_to_loss": q, "newton_weight": q * (1 - q)}


def snapshot(seed: int = 0) -> SnapshotFeatures:
    train, targets = columns(N, seed), columns(M, seed + 100)
    blocks = [range(11), range(11, N)]
    return SnapshotFeatures(
        lambda: ((rows, {name: values[rows.start : rows.stop] for name, values in train.items()}) for rows in blocks),
        targets,
        layers=LAYERS,
    )


def scored(method: Any, *snapshots: SnapshotFeatures) -> tuple[Tensor, Tensor]:
    blocks = list(method.score(list(snapshots)))
    return torch.cat([block.scores for block in blocks]), torch.cat([block.self_influence for block in blocks])


def reference(curvature: str, layers: Mapping[str, slice], damping: float, relative: str | None = None) -> Any:
    """With explicit inverses of the mean curvature of each layer."""
    train, targets = columns(N, 0), columns(M, 100)
    weights = train["newton_weight"] if curvature == "ggn" else train["out_to_loss"].square()
    inverse = torch.zeros(K, K).double()
    for layer in layers.values():
        phi = train["features"][:, layer]
        mean = phi.T @ (weights[:, None] * phi) / N
        inverse[layer, layer] = torch.linalg.inv(
            mean + damping * mean.diagonal().mean() * torch.eye(len(mean)).double()
        )
    g = -train["out_to_loss"][:, None] * train["features"]
    change = g @ inverse / N
    divisor = torch.ones(N).double()
    if relative is not None:
        divisor = change.norm(dim=1) if relative == "theta" else (change * g).sum(1).sqrt()
    scores = -change @ targets["features"].T / divisor[:, None]
    return scores, -(change * train["features"]).sum(1) / divisor


@pytest.mark.parametrize("curvature", ["ggn", "empirical_fisher"])
@pytest.mark.parametrize("per_layer", [True, False])
@pytest.mark.parametrize("relative", [None, "theta", "loss"])
def test_the_formula(curvature: str, per_layer: bool, relative: str | None) -> None:
    layers = LAYERS if per_layer else {"": slice(0, K)}
    method = ProjectedInfluence(curvature=curvature, per_layer=per_layer, damping=0.3, relative=relative)
    for found, expected in zip(scored(method, snapshot()), reference(curvature, layers, 0.3, relative), strict=True):
        torch.testing.assert_close(found, expected)
    assert method.config["scale"] == ("measurement" if relative is None else "rank_only")


def test_trak_with_a_kernel_a_layer_is_the_same_curvature() -> None:
    for found, expected in zip(
        scored(TRAK(damping=0.3, per_layer=True), snapshot()), reference("ggn", LAYERS, 0.3), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_one_layer_is_the_whole_kernel() -> None:
    whole = SnapshotFeatures(snapshot().blocks, snapshot().targets, layers={"": slice(0, K)})
    for a, b in zip(scored(TRAK(per_layer=True), whole), scored(TRAK(), whole), strict=True):
        assert torch.equal(a, b)


def test_snapshots() -> None:
    method = ProjectedInfluence(snapshots="all")
    assert method.select("abc") == "abc"
    assert ProjectedInfluence().select("abc") == "c"
    alone = [scored(method, snapshot(seed)) for seed in range(3)]
    weights = torch.stack([1 / one[1].abs().mean() for one in alone])
    weights /= weights.sum()  # each has an equal part
    for i, found in enumerate(scored(method, *[snapshot(seed) for seed in range(3)])):
        expected = sum(weight * one[i] for weight, one in zip(weights, alone, strict=True))
        torch.testing.assert_close(found, expected)


# Layers of projections --------------------------------------------------------------------------------------------


class ConvNet(AttributionMixin, nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


LAYOUT = ParameterLayout.of(ConvNet())


@pytest.mark.parametrize(
    "projector",
    [IdentityProjector(), KroneckerProjector(60), KroneckerProjector(4), FactGraSSProjector(30, per_layer=True)],
)
def test_a_layer_has_its_own_columns(projector: Projector) -> None:
    projection = projector.bind(LAYOUT, "final")
    assert projection.layers is not None
    assert set(projection.layers) == {"0", "1", "4"}
    assert sum(own.stop - own.start for own in projection.layers.values()) == projection.dim
    for name, shape in LAYOUT.shapes.items():
        features = torch.zeros(5, projection.dim)
        projection.accumulate(features, name, torch.randn(5, *shape))
        own = projection.layers[name.rpartition(".")[0]]
        others = torch.ones(projection.dim, dtype=torch.bool)
        others[own] = False
        assert not features[:, others].any()


@pytest.mark.parametrize(
    "projector", [FactGraSSProjector(30), GraSSProjector(30), FactoredSJLTProjector(30), RademacherProjector(30)]
)
@pytest.mark.parametrize("kind", [ProjectedInfluence, lambda p: TRAK(projector=p, per_layer=True)])
def test_projectors_that_mix_layers(projector: Projector, kind: Any) -> None:
    assert projector.bind(LAYOUT, "final").layers is None
    with pytest.raises(ValueError, match=f"keep the layers apart for `per_layer=True`, but {type(projector).__name__}"):
        kind(projector).bind(LAYOUT, "final")
    with pytest.raises(ValueError, match="keep the layers apart"):
        list(kind(projector).score([SnapshotFeatures.of(columns(N, 0), columns(M, 1))]))
    ProjectedInfluence(projector, per_layer=False).bind(LAYOUT, "final")


def test_factgrass_layer_by_layer_is_unbiased_and_within_its_dimension() -> None:
    x = torch.randn(16, 10, generator=torch.Generator().manual_seed(0))
    found = []
    layout = ParameterLayout({"0.weight": (16, 10), "1.weight": (3,)})
    for seed in range(300):
        projection = FactGraSSProjector(40, seed, mask_factor=1, per_layer=True).bind(layout, "final")
        assert projection.dim <= 40
        features = torch.zeros(1, projection.dim)
        projection.accumulate(features, "0.weight", x[None])
        found.append(features.square().sum())
    squares = torch.stack(found)
    assert (squares.mean() - x.square().sum()).abs() < 4 * squares.std() / 300**0.5
    with pytest.raises(ValueError, match="`proj_dim` to be at least 2, one for each layer, but got 1"):
        FactGraSSProjector(1, per_layer=True).bind(layout, "final")


# Presets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [LoGra(proj_dim=24, seed=1), FactGraSS(proj_dim=24, seed=1)])
def test_presets_on_a_convolutional_network(method: ProjectedInfluence) -> None:
    module = ConvNet().eval()
    batch = torch.randn(12, 1, 4, 4), torch.arange(12) % 3
    projection = method.bind(LAYOUT, "final")
    featurize = Featurizer(module, plan(module, batch, 12), projection)
    train, targets = featurize(batch, range(12)), featurize((batch[0][:2], batch[1][:2]), range(2))
    own = SnapshotFeatures(lambda: iter([(range(12), train)]), targets, layers=projection.layers)
    scores, _ = scored(method, own)
    phi, q = train["features"].double(), train["out_to_loss"].double()
    expected = torch.zeros(12, 2).double()
    for layer in projection.layers.values():
        g = q[:, None] * phi[:, layer]
        gram = g.T @ g
        ridge = 0.1 * gram.diagonal().mean() * torch.eye(len(gram)).double()
        expected += g @ torch.linalg.inv(gram + ridge) @ targets["features"][:, layer].double().T
    torch.testing.assert_close(scores.double(), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_config_of_presets() -> None:
    config = LoGra(64, damping=0.2, seed=3).config
    assert config == {
        "method": "LoGra", "scale": "measurement", "damping": 0.2, "per_layer": True, "curvature": "empirical_fisher",
        "relative": None, "snapshots": "last", "projector": {"kind": "kronecker", "proj_dim": 64, "seed": 3},
    }  # fmt: skip
    assert FactGraSS(64).config["projector"]["per_layer"] is True


# Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"curvature": "hessian"}, "`curvature` of .+ to be 'ggn' or 'empirical_fisher', but got 'hessian'"),
        ({"damping": -1.0}, "`damping` of .+ to be a finite number >= 0, or 'auto', but got -1.0"),
        ({"relative": "rank"}, "`relative` of .+ to be 'theta', 'loss' or None, but got 'rank'"),
        ({"snapshots": "first"}, "`snapshots` of .+ to be 'last' or 'all', but got 'first'"),
    ],
)
def test_bad_arguments(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProjectedInfluence(**settings)


def test_a_singular_curvature_without_damping() -> None:
    train = columns(3, 0)
    features = SnapshotFeatures(lambda: iter([(range(3), train)]), columns(M, 1), layers=LAYERS)
    with pytest.raises(ValueError, match=r"singular with `damping=0\.0`\. Raise the damping"):
        scored(ProjectedInfluence(damping=0.0), features)


def test_relatif_of_a_sample_that_is_fitted_is_zero_not_nan() -> None:
    train = columns(N, 0)
    train["out_to_loss"][4] = 0
    features = SnapshotFeatures(lambda: iter([(range(N), train)]), columns(M, 1), layers=LAYERS)
    for relative in ("theta", "loss"):
        scores, own = scored(ProjectedInfluence(relative=relative), features)
        assert not scores[4].any()
        assert own[4] == 0
        assert scores.isfinite().all()
