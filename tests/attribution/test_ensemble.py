"""Runs and pilots are scored apart and summed in units of their spread, in any tiles and processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_attr.attribution import ensemble, scoring
from lightning_attr.attribution.ensemble import Ensemble, parts_of
from lightning_attr.attribution.scoring import score
from lightning_attr.errors import AttributionError
from lightning_attr.methods import TRAK, AttributionMethod, GradDot, SnapshotFeatures
from lightning_attr.store.manifest import Snapshot

N, M, K = 23, 7, 5
PARTS = [(1.0, 1), (1.0, 1), (2.0, 3)]


def columns(rows: int, seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.rand(rows, generator=generator, dtype=dtype)
    features = (seed + 1) * torch.randn(rows, K, generator=generator, dtype=dtype)
    return {"features": features, "out_to_loss": q, "newton_weight": q * (1 - q)}


def snapshots(ranges: Sequence[range] = (range(N),), **more: Any) -> list[SnapshotFeatures]:
    def one(seed: int) -> SnapshotFeatures:
        train = columns(N, seed)
        blocks = lambda: ((rows, {name: v[rows] for name, v in train.items()}) for rows in ranges)  # noqa: E731
        return SnapshotFeatures(blocks, columns(M, seed + 10), **more)

    return [one(seed) for seed in range(5)]


class Plain(GradDot):
    """Sums over all its snapshots."""

    def score(self, snapshots: Sequence[SnapshotFeatures]) -> Any:
        for blocks in zip(*(super(Plain, self).score([snapshot]) for snapshot in snapshots), strict=True):
            yield type(blocks[0])(blocks[0].rows, sum(b.scores for b in blocks), sum(b.self_influence for b in blocks))


def by_hand(method: AttributionMethod) -> tuple[Tensor, Tensor]:
    every, found, own = snapshots(), [], []
    for part in (every[:1], every[1:2], every[2:]):
        (block,) = method.score(part)
        found.append(block.scores)
        own.append(block.self_influence)
    weights = torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64) / torch.stack([f.std(correction=0) for f in found])
    weights /= weights.sum()
    return torch.einsum("p,pnm->nm", weights, torch.stack(found)), torch.einsum("p,pn->n", weights, torch.stack(own))


@pytest.mark.parametrize("method", [TRAK(), TRAK(newton_weights=False), Plain()], ids=["trak", "published", "plain"])
@pytest.mark.parametrize("blocks", [(range(N),), (range(9), range(9, N))])
def test_parts_are_summed_in_units_of_their_spread(method: Any, blocks: Any) -> None:
    scores, self_influence = score(Ensemble(method, PARTS), snapshots(blocks), N)
    expected, own = by_hand(method)
    torch.testing.assert_close(scores.values.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(self_influence.double(), own, rtol=1e-5, atol=1e-6)


def test_weights_of_the_first_targets_serve_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ensemble, "_ELEMENTS", N * 3 * 4)  # four targets at a time
    monkeypatch.setattr(scoring, "_TILE_ELEMENTS", 5 * 5 * K)
    whole = Ensemble(Plain(), PARTS)
    scores, _ = score(whole, snapshots(), N)
    parts = [snapshots()[:1], snapshots()[1:2], snapshots()[2:]]
    found = torch.stack([next(iter(Plain().score(part))).scores for part in parts])
    weights = torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64) / found[:, :, :4].flatten(1).std(1, correction=0)
    weights /= weights.sum()
    assert whole.weights == pytest.approx(weights.tolist())
    torch.testing.assert_close(scores.values.double(), torch.einsum("p,pnm->nm", weights, found), rtol=1e-5, atol=1e-5)


def test_the_spread_is_that_of_all_processes() -> None:
    rows = (range(9), range(9, N))
    gathered: list[Tensor] = []
    for own in rows:
        first = Ensemble(Plain(), PARTS)
        list(first.score(snapshots([own], reduce=lambda sums: gathered.append(sums.clone()) or sums)))
    totals = [gathered[i] + gathered[i + 3] for i in range(3)]
    sums = iter(totals)
    found = Ensemble(Plain(), PARTS)
    list(found.score(snapshots([rows[0]], reduce=lambda _: next(sums))))
    whole = Ensemble(Plain(), PARTS)
    list(whole.score(snapshots()))
    assert found.weights == pytest.approx(whole.weights)


def test_a_part_without_any_scores_changes_nothing() -> None:
    empty = SnapshotFeatures.of({name: torch.zeros_like(v) for name, v in columns(N, 0).items()}, columns(M, 10))
    one = snapshots()[1]
    found = Ensemble(Plain(), [(1.0, 1), (1.0, 1)])
    (block,) = found.score([empty, one])
    assert found.weights == [0.5, 0.5]
    assert block.scores.isfinite().all()


def test_which_snapshots_score() -> None:
    def snapshot(key: str, pilot: int | None = None) -> Snapshot:
        return Snapshot(key, 0, 1, 0.1, f"snapshots/{key}", "", key, pilot=pilot)

    every = [snapshot("run0/a"), snapshot("run0/b"), snapshot("run0/pilot=0000", 0), snapshot("run1/a")]
    last = GradDot().select
    assert [[s.key for s in part.snapshots] for part in parts_of(every, 0, last)] == [["run1/a"]]
    parts = parts_of(every, 1, last)
    assert [part.name for part in parts] == ["run0/pilot=0000", "run0", "run1"]
    assert [[s.key for s in part.snapshots] for part in parts] == [["run0/pilot=0000"], ["run0/b"], ["run1/a"]]
    with pytest.raises(AttributionError, match=r"Expected 2 pilots, but the store has 1 that can be scored"):
        parts_of(every, 2, last)
