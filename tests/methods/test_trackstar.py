"""TrackStar against its definition with every matrix written out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from method_cases import record, scored
from torch import Tensor

from lightning_attr.methods import GradCos, SnapshotFeatures, TrackStar
from lightning_attr.projectors import IdentityProjector, RademacherProjector

N, M, K = 30, 7, 6
LAYERS = {"a": slice(0, 2), "b": slice(2, 6)}


def features(seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        {
            "features": torch.randn(n, K, generator=generator).double(),
            "out_to_loss": torch.randn(n, generator=generator).double(),
        }
        for n in (N, M)
    )  # type: ignore[return-value]


def snapshot(seed: int = 0) -> SnapshotFeatures:
    return replace(SnapshotFeatures.of(*features(seed)), layers=LAYERS)


def inverse_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ values.rsqrt().diag() @ vectors.T


def expected(seed: int, mixing: float, damping: float, per_layer: bool) -> Tensor:
    train, targets = features(seed)
    losses, queries = (-part["out_to_loss"][:, None] * part["features"] for part in (train, targets))
    rows, columns = [], []
    for layer in LAYERS.values() if per_layer else [slice(0, K)]:
        g, u = losses[:, layer], queries[:, layer]
        r = mixing * u.T @ u / M + (1 - mixing) * g.T @ g / N
        root = inverse_root(r + damping * r.diagonal().mean() * torch.eye(len(r)).double())
        rows.append(g @ root)
        columns.append(targets["features"][:, layer] @ root)
    return -F.normalize(torch.cat(rows, 1)) @ F.normalize(torch.cat(columns, 1)).T


@pytest.mark.parametrize("per_layer", [True, False])
@pytest.mark.parametrize("mixing", [0.0, 0.3, 1.0])
def test_it_is_its_definition(mixing: float, per_layer: bool) -> None:
    method = TrackStar(mixing=mixing, damping=0.2, per_layer=per_layer, snapshots="all")
    snapshots = [snapshot(0), snapshot(1)]
    method.prepare(snapshots)
    (block,) = method.score(snapshots)
    both = (expected(0, mixing, 0.2, per_layer) + expected(1, mixing, 0.2, per_layer)) / 2
    torch.testing.assert_close(block.scores, both)
    signs = [part[0]["out_to_loss"].sign() for part in (features(0), features(1))]
    torch.testing.assert_close(block.self_influence, sum(signs) / 2)
    assert method.config["scale"] == "rank_only"


def test_all_targets_have_a_part_whichever_are_scored_at_once() -> None:
    whole = snapshot()
    method = TrackStar()
    method.prepare([whole])
    (block,) = method.score([whole])
    part = replace(whole, targets={name: values[2:3] for name, values in whole.targets.items()})
    torch.testing.assert_close(next(method.score([part])).scores, block.scores[:, 2:3])


def test_with_much_damping_it_is_the_cosine() -> None:
    whole = snapshot()
    (cosines,), (block,) = GradCos().score([whole]), TrackStar(per_layer=False, damping=1e9).score([whole])
    torch.testing.assert_close(block.scores, cosines.scores, rtol=1e-6, atol=1e-8)


def test_without_targets_training_samples_alone_decide_and_zeros_stay_zero() -> None:
    train, targets = features()
    train["features"][3] = 0.0
    none = {name: values[:0] for name, values in targets.items()}
    (block,) = TrackStar(per_layer=False).score([SnapshotFeatures.of(train, none)])
    assert block.self_influence[3] == 0
    assert block.self_influence[:3].abs().eq(1).all()


def test_adam_divides_gradients_by_their_root_moments(tmp_path: Path) -> None:
    path = record(tmp_path / "store")
    found = scored(TrackStar(IdentityProjector(), preconditioner="adam", per_layer=False, damping=1e9), path).scores
    plain = scored(GradCos(exact=True), path).scores
    assert not torch.allclose(found.values, plain.values, atol=1e-2)
    assert TrackStar(preconditioner="adam").projector_config["kind"] == "adam_normalised"
    assert TrackStar(preconditioner="adam").needs_optimizer_state
    assert not TrackStar().needs_optimizer_state


def test_a_projection_that_mixes_layers_is_refused_for_a_matrix_a_layer(tmp_path: Path) -> None:
    path = record(tmp_path / "store")
    with pytest.raises(ValueError, match="keep the layers apart for `per_layer=True`, but RademacherProjector"):
        scored(TrackStar(RademacherProjector(8)), path)
