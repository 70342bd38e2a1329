"""Candidates in the order of a second method, before those of the first: in memory and in files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_attr import AttributionResult, ScoreMatrix
from lightning_attr.errors import AttributionError, CorruptedStoreError
from lightning_attr.results import RerankedScores, TopScores
from lightning_attr.results.reranked_scores import CandidateScores, reranked
from lightning_attr.results.top_scores import TopScoresSum

N, M, C = 23, 4, 5


def _values(seed: int) -> Tensor:
    return torch.randn(N, M, generator=torch.Generator().manual_seed(seed))


def _found(first: ScoreMatrix | TopScores, step: int = 10) -> RerankedScores:
    dear, candidates = _values(1), CandidateScores.of(first, C)
    for start in range(0, N, step):
        rows = range(start, min(start + step, N))
        if not candidates.wanted.isdisjoint(rows):
            candidates.add(rows, slice(2, None), dear[start : rows.stop, 2:])
            candidates.add(rows, slice(0, 2), dear[start : rows.stop, :2])
    return reranked(first, candidates.total())


def _kept(k: int = 8) -> TopScores:
    found = TopScoresSum(N, M, k)
    found.add(range(N), slice(0, M), _values(0))
    return found.total()


def _result(scores: ScoreMatrix | TopScores) -> AttributionResult:
    return AttributionResult(scores, torch.ones(N), torch.ones(N))


@pytest.mark.parametrize("step", [1, 7, N])
def test_candidates_come_first_in_their_own_order_and_the_others_behind_them(step: int) -> None:
    first, dear = ScoreMatrix(_values(0)), _values(1)
    found = _found(first, step)
    for name, descending in (("topk", True), ("bottomk", False)):
        quick, quick_scores = getattr(first, name)(N)
        rows, scores = getattr(found, name)(N)
        for j in range(M):
            best = sorted(quick[j, :C].tolist(), key=lambda i, j=j: dear[i, j].item(), reverse=descending)
            assert rows[j].tolist() == best + quick[j, C:].tolist()
            torch.testing.assert_close(scores[j, :C], dear[best, j])
            torch.testing.assert_close(scores[j, C:], quick_scores[j, C:])
        for k in (1, C, C + 1):
            assert torch.equal(getattr(found, name)(k)[0], rows[:, :k])
    assert found.depth == N
    assert found.shape == (N, M)


def test_the_mask_says_which_scores_are_the_second_methods() -> None:
    first = ScoreMatrix(_values(0))
    mask = _found(first).reranked
    expected = torch.zeros(N, M, dtype=torch.bool)
    for j in range(M):
        expected[first.topk(C)[0][j], j] = expected[first.bottomk(C)[0][j], j] = True
    assert torch.equal(mask, expected)
    result = _result(_found(first))
    assert torch.equal(result.reranked, expected)
    assert _result(first).reranked is None


def test_sums_are_the_first_methods_alone_and_there_is_no_one_matrix() -> None:
    first = ScoreMatrix(_values(0))
    result = _result(_found(first))
    torch.testing.assert_close(result.data_value, first.data_value)
    assert result.metrics == pytest.approx(_result(first).metrics)
    assert torch.equal(result.scores.first.values, first.values)
    with pytest.raises(AttributionError, match=r"(?s)the 5 strongest .*scores\.first\.values"):
        result.scores.values  # noqa: B018 - a property that raises
    with pytest.raises(AttributionError):
        result.predicted_effect([0])
    with pytest.raises(AttributionError):
        result.select(0.5, objective="coreset")
    assert torch.equal(result.select(0.5), _result(first).select(0.5))


def test_of_the_extremes_of_a_first_method_there_are_no_more_than_it_kept() -> None:
    found = _found(_kept(8))
    assert found.depth == 8
    assert torch.equal(found.topk(8)[0][:, C:], _kept(8).topk(8)[0][:, C:])
    with pytest.raises(ValueError, match=r"`k` of RerankedScores.topk to be an integer from 1 to 8, but got 9"):
        found.topk(9)


@pytest.mark.parametrize(
    "first", [ScoreMatrix(_values(0), provenance={"method": "quick"}), _kept()], ids=["all", "top"]
)
def test_saved_and_loaded(first: ScoreMatrix | TopScores, tmp_path: Path) -> None:
    result = _result(_found(first))
    result.save(tmp_path)
    loaded = AttributionResult.load(tmp_path)
    assert isinstance(loaded.scores, RerankedScores)
    for one, other in zip(loaded.scores.topk(8), result.scores.topk(8), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(loaded.reranked, result.reranked)
    assert loaded.scores.provenance == result.scores.provenance
    assert loaded.scores.provenance["rerank"] == {"candidates": C}
    assert loaded.metrics == pytest.approx(result.metrics)
    _result(ScoreMatrix(_values(0))).save(tmp_path)  # over it
    assert isinstance(AttributionResult.load(tmp_path).scores, ScoreMatrix)


def test_first_scores_of_another_result_are_refused(tmp_path: Path) -> None:
    _found(ScoreMatrix(_values(0))).save(tmp_path / "one")
    _found(ScoreMatrix(_values(2))).save(tmp_path / "other")
    shutil.rmtree(tmp_path / "one" / "first")
    shutil.copytree(tmp_path / "other" / "first", tmp_path / "one" / "first")
    with pytest.raises(CorruptedStoreError, match=r"holds other scores than .* was saved with"):
        RerankedScores.load(tmp_path / "one")


def test_nan_is_refused() -> None:
    candidates = CandidateScores.of(ScoreMatrix(_values(0)), C)
    with pytest.raises(ValueError, match="scores"):
        candidates.add(range(N), slice(0, M), torch.full((N, M), float("nan")))
