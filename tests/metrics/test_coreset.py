"""Greedy coresets against a search over all samples at each step, and predicted effects against plain sums."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_attr.metrics import coreset, greedy_coreset, predicted_effect

N, M = 14, 5


def scores_of(seed: int = 0, n: int = N, m: int = M) -> Tensor:
    return torch.randn(n, m, generator=torch.Generator().manual_seed(seed)) + 0.3


def loss_of(scores: Tensor, chosen: list[int], count: int) -> float:
    """The predicted loss of a choice, written out."""
    n, m = scores.shape
    totals = sorted(sum(max(float(scores[i, j]), 0.0) for i in range(n)) for j in range(m))
    scale = 8.0 * n / (count * totals[(m - 1) // 2])
    return sum(math.log1p(math.exp(-scale * sum(float(scores[i, j]) for i in chosen))) for j in range(m)) / m


def searched(scores: Tensor, count: int, allowed: Tensor | None = None) -> list[int]:
    """Each step tries every sample that is left."""
    chosen: list[int] = []
    for _ in range(count):
        left = [i for i in range(len(scores)) if i not in chosen and (allowed is None or bool(allowed[i]))]
        chosen.append(min(left, key=lambda i: loss_of(scores, [*chosen, i], count)))
    return chosen


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("block", [2**22, 3 * M, 1])
def test_greedy_is_the_search_over_all_samples(seed: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coreset, "_BLOCK_ELEMENTS", block)
    scores = scores_of(seed)
    assert greedy_coreset(scores, 6).tolist() == searched(scores, 6)


def test_the_first_of_the_choice_is_the_best_single_sample() -> None:
    scores = scores_of(3)
    alone = [loss_of(scores, [i], 1) for i in range(N)]
    assert greedy_coreset(scores, 1).tolist() == [alone.index(min(alone))]


def test_near_duplicates_gain_little_and_harmful_samples_nothing() -> None:
    kinds = torch.eye(3).repeat_interleave(10, dim=0) * torch.tensor([3.0, 2.0, 1.0])
    kinds[::10] *= 1.01
    harmful = -kinds[:5]
    chosen = greedy_coreset(torch.cat([kinds, harmful]), 3)
    assert sorted(chosen.tolist()) == [0, 10, 20]
    assert torch.cat([kinds, harmful]).mean(1).topk(3).indices.max() < 10  # the ranking takes one kind alone


def test_quotas_bound_the_choice_of_each_group() -> None:
    scores, groups = scores_of(), torch.arange(N) % 3
    chosen = greedy_coreset(scores, 6, groups, torch.tensor([2, 3, 1]))
    assert groups[chosen].bincount().tolist() == [2, 3, 1]
    none_of_two = greedy_coreset(scores, 6, groups, torch.tensor([6, 6, 0]))
    assert none_of_two.tolist() == searched(scores, 6, groups != 2)


def test_a_large_choice_looks_at_a_part_and_stays_near(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = scores_of(n=200, m=20)
    whole = loss_of(scores, greedy_coreset(scores, 20).tolist(), 20)
    monkeypatch.setattr(coreset, "_EVALUATIONS", 60 * 20 * 20)  # 60 of 200 a step
    part = greedy_coreset(scores, 20)
    assert torch.equal(part, greedy_coreset(scores, 20))
    assert len(part.unique()) == 20
    assert loss_of(scores, part.tolist(), 20) < 1.2 * whole
    assert loss_of(scores, list(range(20)), 20) > 5 * whole


def test_scores_that_help_nothing_are_chosen_all_the_same() -> None:
    assert sorted(greedy_coreset(-torch.ones(3, 2), 3).tolist()) == [0, 1, 2]
    assert greedy_coreset(torch.zeros(3, 2), 2).tolist() == [0, 1]


def test_coreset_errors() -> None:
    scores = scores_of()
    with pytest.raises(ValueError, match=f"Expected argument `count` of greedy_coreset to be an integer .*{N}"):
        greedy_coreset(scores, N + 1)
    with pytest.raises(ValueError, match="to leave room for 6 samples, but they admit 5"):
        greedy_coreset(scores, 6, torch.zeros(N, dtype=torch.int64), torch.tensor([5]))
    with pytest.raises(ValueError, match="same length, but got 14 and 3"):
        greedy_coreset(scores, 2, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="non-empty matrix"):
        greedy_coreset(scores[0], 1)


def test_predicted_effect_is_a_sum_over_what_is_left_out() -> None:
    scores, kept, slopes = scores_of().double(), torch.arange(N) % 4 > 0, torch.rand(M, dtype=torch.float64)
    outputs = [-sum(float(scores[i, j]) for i in range(N) if not kept[i]) for j in range(M)]
    losses = [-float(q) * output for q, output in zip(slopes, outputs, strict=True)]
    effect = predicted_effect(scores, kept, slopes)
    for mean, error, values in (
        (effect.loss, effect.loss_error, losses),
        (effect.output, effect.output_error, outputs),
    ):
        expected = sum(values) / M
        assert float(mean) == pytest.approx(expected)
        spread = sum((value - expected) ** 2 for value in values) / (M - 1)
        assert float(error) == pytest.approx((spread / M) ** 0.5)


def test_predicted_effect_of_everything_is_none_and_of_one_target_has_no_error() -> None:
    assert [float(x) for x in predicted_effect(scores_of(), torch.ones(N))] == [0, 0, 0, 0]
    assert predicted_effect(scores_of(m=1), torch.zeros(N)).loss_error.isnan()


def test_effect_errors() -> None:
    with pytest.raises(ValueError, match="`kept` to be bool or hold only 0 and 1"):
        predicted_effect(scores_of(), torch.arange(N))
    with pytest.raises(ValueError, match="to have the same length, but got 5 and 4"):
        predicted_effect(scores_of(), torch.ones(N), torch.ones(4))
