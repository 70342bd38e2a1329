"""Sets to remove, and the curve of what their removal did."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_attr import ScoreMatrix
from lightning_attr.errors import AttributionError
from lightning_attr.evaluation import GroundTruth, brittleness, proponent_sets
from lightning_attr.results.top_scores import TopScoresSum

N, M = 12, 5
SCORES = ScoreMatrix(torch.randn(N, M, generator=torch.Generator().manual_seed(0)).sort(0).values)


def truth_of(sets: list[list[int]], outputs: Tensor, kind: str = "without") -> GroundTruth:
    masks = torch.ones(1 + len(sets), N, dtype=torch.bool)
    for row, indices in enumerate(sets, start=1):
        masks[row, indices] = False
    return GroundTruth(Path("truth"), kind, masks, outputs, torch.zeros(outputs.shape[:2], dtype=torch.int64), {})


def test_sets_are_the_top_proponents() -> None:
    indices = torch.randperm(100)[:N]
    scores = ScoreMatrix(SCORES.values[torch.randperm(N)], train_indices=indices)
    sets = proponent_sets(scores, targets=[3, 1], counts=[1, 3])
    for target, own in zip([3, 1], (sets[:2], sets[2:]), strict=True):
        order = indices[scores.values[:, target].argsort(descending=True)].tolist()
        assert own == [order[:1], order[:3]]


def test_only_positive_scores_are_removed() -> None:
    scores = ScoreMatrix(torch.tensor([[1.0], [-1.0], [2.0], [0.0]]))
    assert proponent_sets(scores, [0], [1, 4]) == [[2], [2, 0]]
    with pytest.raises(ValueError, match="no score of target 0 is positive"):
        proponent_sets(ScoreMatrix(-torch.ones(3, 1)), [0], [1])


def test_top_scores_will_do() -> None:
    found = TopScoresSum(N, M, k=3)
    found.add(range(N), slice(0, M), SCORES.values)
    assert proponent_sets(found.total(), [0, 4], [1, 3]) == proponent_sets(SCORES, [0, 4], [1, 3])
    with pytest.raises(ValueError, match="`topk` of this result"):
        proponent_sets(found.total(), [0], [4])


@pytest.mark.parametrize("counts", [[], [0, 1], [2, 1], [1, 1]])
def test_counts_are_ascending(counts: list[int]) -> None:
    with pytest.raises(ValueError, match=r"`counts` of .* a list of ascending positive integers, but got"):
        proponent_sets(SCORES, [0], counts)


@pytest.mark.parametrize("target", [-1, M])
def test_targets_are_columns(target: int) -> None:
    with pytest.raises(
        ValueError, match=rf"`targets\[0\]` of proponent_sets to be an integer from 0 to {M - 1}, but got {target}"
    ):
        proponent_sets(SCORES, [target], [1])


def test_each_target_is_looked_at_after_its_own_removals() -> None:
    targets, counts = [3, 1], [1, 2, 3]
    sets = proponent_sets(SCORES, targets, counts)
    outputs = torch.ones(2, 1 + len(sets), M)  # nothing flips
    outputs[:, 1 + 1, 3] = -1.0  # target 3 without 2
    outputs[:, 1 + 2, 3] = -1.0  # and without 3
    outputs[:, 1 + 3 + 2, 1] = -1.0  # target 1 without 3
    outputs[:, 1:4, 1] = -1.0  # what the removals of target 3 do to target 1 does not count
    other = torch.ones_like(outputs)
    other[:, 1 + 3, 1] = -1.0
    curve = brittleness(truth_of(sets, outputs), targets, counts, random=truth_of([[11]] * 6, other))
    assert curve.counts.tolist() == counts
    assert curve.success["method"].tolist() == [0.0, 0.5, 1.0]
    assert curve.smallest["method"].tolist() == [2.0, 3.0]
    assert curve.success["random"].tolist() == [0.5, 0.0, 0.0]


def test_targets_wrong_before_are_left_out() -> None:
    sets = proponent_sets(SCORES, [0, 1], [1])
    outputs = torch.ones(1, 3, M)
    outputs[:, 0, 0] = -1.0
    assert brittleness(truth_of(sets, outputs), [0, 1], [1]).undefined == 1


def test_other_sets_are_refused() -> None:
    sets = proponent_sets(SCORES, [0, 1], [1, 2])
    outputs = torch.ones(1, 5, M)
    with pytest.raises(ValueError, match=r"`ground_truth` with 1 x 2 removed sets, .* but truth has 4"):
        brittleness(truth_of(sets, outputs), [0], [1, 2])
    with pytest.raises(ValueError, match=r"`random` with 2 x 2 removed sets, .* but truth has 3"):
        brittleness(truth_of(sets, outputs), [0, 1], [1, 2], random=truth_of(sets[:3], outputs[:, :4]))
    with pytest.raises(ValueError, match=r"those of target 1 have \[2, 1\] and are not nested"):
        brittleness(truth_of([*sets[:2], *sets[:1:-1]], outputs), [0, 1], [1, 2])
    with pytest.raises(ValueError, match=r"at most \[1, 2\] .* those of target 0 have \[1, 3\] and are nested"):
        brittleness(truth_of([[0], [0, 1, 2], *sets[2:]], outputs), [0, 1], [1, 2])
    with pytest.raises(AttributionError, match=r'random subsets .kind "lds".'):
        brittleness(truth_of(sets, outputs, "lds"), [0, 1], [1, 2])
