"""Scoring tile by tile: any tiles, blocks, processes and either form of the result against one plain product."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cases import BlobClassifier, blobs, loader_of, quiet_trainer
from lightning_attr import AttributionResult, FeatureStore, ScoreMatrix, attribute
from lightning_attr.attribution import scoring
from lightning_attr.attribution.scoring import score, score_self_influence
from lightning_attr.methods import TRAK, AttributionMethod, GradCos, GradDot, SnapshotFeatures
from lightning_attr.projectors import IdentityProjector
from lightning_attr.results.top_scores import TopScores
from lightning_attr.store.manifest import Fingerprint

N, M, K, TOP = 53, 11, 6, 4
METHODS = [TRAK(sampling=False), TRAK(damping=0.1, newton_weights=False), GradDot(), GradCos()]


def _columns(rows: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.rand(rows, generator=generator)
    return {"features": torch.randn(rows, K, generator=generator), "out_to_loss": q, "newton_weight": q * (1 - q)}


def _snapshots(method: AttributionMethod, ranges: Sequence[range] = (range(N),), **more: Any) -> list[SnapshotFeatures]:
    def snapshot(seed: int) -> SnapshotFeatures:
        train = _columns(N, seed)

        def blocks() -> Any:
            return ((rows, {name: values[rows] for name, values in train.items()}) for rows in ranges)

        return SnapshotFeatures(blocks, _columns(M, seed + 10), **more)

    return list(method.select([snapshot(0), snapshot(1), snapshot(2)]))


def _dense(method: AttributionMethod) -> tuple[Tensor, Tensor]:
    """All rows and targets in one block."""
    (block,) = method.score(_snapshots(method))
    return block.scores, block.self_influence


def _check(found: ScoreMatrix | TopScores, self_influence: Tensor, method: AttributionMethod) -> None:
    """Compare with the scores of one block, whichever of them there are."""
    expected, own = _dense(method)
    whole = ScoreMatrix(expected)
    torch.testing.assert_close(self_influence, own, rtol=1e-5, atol=1e-6)
    assert found.shape == (N, M)
    for ours, theirs in ((found.topk(TOP), whole.topk(TOP)), (found.bottomk(TOP), whole.bottomk(TOP))):
        assert torch.equal(ours[0], theirs[0])
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.data_value, expected.double().mean(1).float(), rtol=1e-5, atol=1e-6)
    positive = expected.double().clamp(min=0)
    effective = (positive.sum(0).square() / positive.square().sum(0)).mean().item()
    assert found.effective_proponents == pytest.approx(effective, rel=1e-5)
    if isinstance(found, ScoreMatrix):
        torch.testing.assert_close(found.values, expected, rtol=1e-5, atol=1e-6)


# Tiles and blocks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("topk", [None, TOP])
@pytest.mark.parametrize("width", [1, 3, M, 100])
@pytest.mark.parametrize("height", [1, 7, 100])
def test_tiles_change_nothing(
    method: AttributionMethod, topk: int | None, width: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "_MOST_TARGETS", width)
    monkeypatch.setattr(scoring, "_TILE_ELEMENTS", height * max(min(width, M), K * len(_snapshots(method))))
    _check(*score(method, _snapshots(method), N, topk), method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("topk", [None, TOP])
def test_blocks_of_any_size_and_order_change_nothing(method: AttributionMethod, topk: int | None) -> None:
    ranges = [range(50, N), range(2), range(2, 3), range(3, 50)]
    _check(*score(method, _snapshots(method, ranges), N, topk), method)


@pytest.mark.parametrize("topk", [None, TOP])
def test_tiles_are_as_small_as_the_limits_say(topk: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()

    class Watching(TRAK):
        def score(self, snapshots: Any) -> Any:
            for block in super().score(snapshots):
                seen.add(tuple(block.scores.shape))
                yield block

    monkeypatch.setattr(scoring, "_TARGET_ELEMENTS", 4 * 3 * K)  # four targets at three snapshots
    monkeypatch.setattr(scoring, "_TILE_ELEMENTS", 10 * 3 * K)
    score(Watching(), _snapshots(Watching()), N, topk)
    assert seen == {(10, 4), (3, 4), (10, 3), (3, 3)}


@pytest.mark.parametrize("method", METHODS)
def test_permuting_rows_permutes_the_extremes(method: AttributionMethod) -> None:
    order = torch.randperm(N)
    plain = _snapshots(method)
    mixed = [
        SnapshotFeatures.of({name: values[order] for name, values in next(own.blocks())[1].items()}, own.targets)
        for own in plain
    ]
    one, _ = score(method, plain, N, TOP)
    two, _ = score(method, mixed, N, TOP)
    assert torch.equal(order[two.topk(TOP)[0]], one.topk(TOP)[0])
    torch.testing.assert_close(two.data_value, one.data_value[order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_self_influence_needs_no_targets(method: AttributionMethod) -> None:
    snapshot = _snapshots(method)[-1]
    no_targets = SnapshotFeatures(snapshot.blocks, {"features": torch.zeros(0, K)})
    (block,) = method.score([snapshot])
    found = score_self_influence(method, no_targets, N)
    torch.testing.assert_close(found, block.self_influence, rtol=1e-6, atol=1e-7)


# Processes --------------------------------------------------------------------------------------------------------


class Group:
    """Sums tensors over threads that stand in for processes."""

    def __init__(self, world: int) -> None:
        self.barrier = threading.Barrier(world, timeout=30)
        self.parts: list[Tensor] = [torch.empty(0)] * world

    def member(self, rank: int) -> Callable[[Tensor], Tensor]:
        def reduce(tensor: Tensor) -> Tensor:
            self.parts[rank] = tensor.clone()
            self.barrier.wait()
            total = torch.stack(self.parts).sum(0)
            self.barrier.wait()
            return tensor.copy_(total)

        return reduce


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("topk", [None, TOP])
@pytest.mark.parametrize("shares", [[[range(30)], [range(30, N)]], [[range(10), range(12, N)], [range(10, 12)], []]])
def test_processes_score_as_one(method: AttributionMethod, topk: int | None, shares: list[list[range]]) -> None:
    """A process may have fewer rows than `topk`, or none at all."""
    group, results = Group(len(shares)), {}

    def run(rank: int) -> None:
        snapshots = _snapshots(method, shares[rank], reduce=group.member(rank))
        results[rank] = score(method, snapshots, N, topk, share=(rank, len(shares)))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(shares))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == len(shares)
    for found, self_influence in results.values():
        _check(found, self_influence, method)


# From a store, and memory -----------------------------------------------------------------------------------------


def _store(folder: Path, rows: int, dim: int) -> FeatureStore:
    store = FeatureStore.create(folder, Fingerprint(rows, None, {"w": (2,)}, None))
    store.add_snapshot("final", {"w": torch.ones(2)}, epoch=0, global_step=1, learning_rate=1.0)
    for shard in store.missing("final"):
        count = len(store.rows(shard))
        store.write_shard("final", shard, {"features": torch.randn(count, dim), "out_to_loss": torch.rand(count)})
    return store


def test_a_result_of_the_strongest_scores_equals_that_of_all(tmp_path: Path) -> None:
    store = _store(tmp_path, 1300, 8)
    snapshot = SnapshotFeatures(lambda: store.blocks("final"), {"features": torch.randn(9, 8)})
    method, more = GradDot(IdentityProjector()), {"loss": torch.rand(1300), "noise_mask": torch.rand(1300) < 0.1}
    results = [AttributionResult(*score(method, [snapshot], 1300, topk), **more) for topk in (None, 20)]
    dense, top = results
    assert isinstance(top.scores, TopScores)
    assert top.metrics == pytest.approx(dense.metrics, rel=1e-9)
    torch.testing.assert_close(top.data_value, dense.data_value, rtol=1e-6, atol=1e-7)
    assert torch.equal(top.self_influence, dense.self_influence)
    assert torch.equal(top.select(0.3), dense.select(0.3))
    assert torch.equal(top.scores.bottomk(20)[1], dense.scores.bottomk(20)[1])


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation makes."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, Tensor):
                self.size = max(self.size, tensor.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize("topk", [None, 3])
def test_only_the_whole_matrix_is_large(topk: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    n, m = 3000, 2000
    monkeypatch.setattr(scoring, "_MOST_TARGETS", 500)
    monkeypatch.setattr(scoring, "_TILE_ELEMENTS", 100 * 500)
    store = _store(tmp_path, n, 8)
    snapshot = SnapshotFeatures(lambda: store.blocks("final"), {"features": torch.randn(m, 8)})
    with Largest() as largest:
        scores, self_influence = score(GradDot(IdentityProjector()), [snapshot], n, topk)
        AttributionResult(scores, self_influence, loss=torch.zeros(n))
    assert largest.size >= n * m * 4 if topk is None else largest.size <= 8 * 100 * 500


# With a Trainer ---------------------------------------------------------------------------------------------------


def test_attribute_keeps_the_strongest() -> None:
    train, targets = blobs(20), blobs(7, seed=1)
    arguments = {"train_dataloaders": loader_of(train), "target_dataloaders": loader_of(targets), "method": TRAK(16)}
    trainer, mask = quiet_trainer(), torch.arange(20) % 4 == 0
    dense, top = (
        trainer.attribute(model=BlobClassifier(), **arguments, noise_mask=mask, topk=topk) for topk in (None, 5)
    )
    assert torch.equal(top.scores.topk(5)[0], dense.scores.topk(5)[0])
    assert torch.equal(top.scores.bottomk(2)[1], dense.scores.bottomk(2)[1])
    assert torch.equal(top.self_influence, dense.self_influence)
    torch.testing.assert_close(top.data_value, dense.data_value)
    assert top.metrics == pytest.approx(dense.metrics, rel=1e-6)
    assert top.scores.provenance == {**dense.scores.provenance, "topk": 5}
    with pytest.raises(ValueError, match=r"`topk` of attribute to be an integer from 1 to 20, .* but got 21"):
        trainer.attribute(model=BlobClassifier(), **arguments, topk=21)


# Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topk", [None, 1])
def test_no_rows(topk: int | None) -> None:
    empty = SnapshotFeatures(lambda: iter(()), _columns(M, 1))
    with pytest.raises(ValueError, match="at least one training sample to score, but the store has no rows"):
        score(TRAK(), [empty], 0, topk)


def test_scores_that_are_not_finite() -> None:
    train = _columns(N, 0)
    train["out_to_loss"][5] = float("nan")
    snapshot = SnapshotFeatures.of(train, _columns(M, 1))
    with pytest.raises(ValueError, match=f"`scores` to be finite, but got {M} NaN or infinite values"):
        score(GradDot(), [snapshot], N, topk=2)


# The data value ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topk", [None, TOP])
@pytest.mark.parametrize("width", [3, 100])
def test_the_data_value_weighs_targets_by_the_slopes_of_their_losses(
    topk: int | None, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "_MOST_TARGETS", width)
    slopes = torch.linspace(-1, 2, M)
    found, _ = score(GradDot(), _snapshots(GradDot()), N, topk, slopes=slopes)
    expected = (_dense(GradDot())[0].double() * slopes.double()).mean(1)
    torch.testing.assert_close(found.data_value, expected.float(), rtol=1e-5, atol=1e-6)


def test_the_data_value_is_the_rise_of_the_mean_loss() -> None:
    """Of a linear regression: against training again without each sample."""
    torch.manual_seed(0)
    x, targets = torch.randn(400, 3).double(), torch.randn(50, 3).double()
    truth = torch.randn(3).double()
    y, measured = x @ truth + torch.randn(400).double(), targets @ truth + torch.randn(50).double()

    def fitted(kept: Tensor) -> Tensor:
        return torch.linalg.solve(x[kept].T @ x[kept], x[kept].T @ y[kept])

    def loss(weights: Tensor) -> Tensor:
        return (targets @ weights - measured).square().mean() / 2

    whole = fitted(torch.ones(400, dtype=torch.bool))
    train = {"features": x, "out_to_loss": y - x @ whole, "newton_weight": torch.ones(400).double()}
    snapshot = SnapshotFeatures.of(train, {"features": targets})
    method = TRAK(damping=0.0, loo_correction=True)
    found, _ = score(method, [snapshot], 400, slopes=measured - targets @ whole)
    rises = torch.stack([loss(fitted(torch.arange(400) != i)) for i in range(400)]) - loss(whole)
    assert torch.corrcoef(torch.stack([found.data_value.double(), rises]))[0, 1] > 0.99
    torch.testing.assert_close(found.data_value.double(), rises, rtol=0.1, atol=2e-4)


@pytest.mark.parametrize("topk", [None, TOP])
def test_attributing_takes_the_slopes_of_the_last_snapshot(topk: int | None) -> None:
    trainer = quiet_trainer()
    loaders = {"train_dataloaders": loader_of(blobs(20)), "target_dataloaders": loader_of(blobs(8, seed=1))}
    module = BlobClassifier()
    found = attribute(trainer, model=module, method=GradDot(IdentityProjector()), topk=topk, **loaders)
    x, y = blobs(8, seed=1).tensors
    with torch.no_grad():
        slopes = 1 - module(x).softmax(1)[torch.arange(8), y]
    whole = attribute(trainer, model=module, method=GradDot(IdentityProjector()), **loaders)
    expected = (whole.scores.values * slopes).mean(1)
    torch.testing.assert_close(found.data_value, expected, rtol=1e-4, atol=1e-6)


def test_what_a_function_measures_is_valued_as_it_is() -> None:
    loaders = {"train_dataloaders": loader_of(blobs(20)), "target_dataloaders": loader_of(blobs(8, seed=1))}
    found = attribute(
        quiet_trainer(),
        model=BlobClassifier(),
        method=GradDot(IdentityProjector()),
        target_function=lambda module, batch: module(batch[0])[:, 0],
        **loaders,
    )
    torch.testing.assert_close(found.data_value, found.scores.values.mean(1), rtol=1e-5, atol=1e-6)


def test_slopes_are_saved_and_checked(tmp_path: Path) -> None:
    scores = ScoreMatrix(torch.randn(4, 3), target_slopes=torch.tensor([1.0, 0.0, -2.0]))
    scores.save(tmp_path)
    assert torch.equal(ScoreMatrix.load(tmp_path).data_value, scores.data_value)
    with pytest.raises(ValueError, match=r"`target_slopes` of ScoreMatrix to be a tensor of shape \(3,\)"):
        ScoreMatrix(torch.randn(4, 3), target_slopes=torch.ones(4))
