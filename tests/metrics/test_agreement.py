"""Rank agreement against scipy, pair counting and random orders of ties."""

from __future__ import annotations

import math
import pickle
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau, spearmanr
from torch import Tensor

from lightning_attr.metrics import RankAgreement, kendall, overlap, rank_agreement
from lightning_attr.metrics.agreement import _inversions

N_TRAIN, N_TARGET = 50, 70  # more targets than one block of work


def _case(ties: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(N_TRAIN, N_TARGET, generator=generator, dtype=torch.float64)
    second = first + torch.randn(N_TRAIN, N_TARGET, generator=generator, dtype=torch.float64)
    return (first.mul(2).round(), second.mul(1.5).round()) if ties else (first, second)


@pytest.mark.parametrize("ties", [False, True])
def test_correlations_equal_scipy(ties: bool) -> None:
    first, second = _case(ties)
    result = rank_agreement(first, second, bootstrap=0)
    for name, reference in (("kendall", kendalltau), ("spearman", spearmanr)):
        expected = [reference(first[:, j], second[:, j]).statistic for j in range(N_TARGET)]
        np.testing.assert_allclose(result.per_target[name], expected, atol=1e-12)
        assert result.mean[name].item() == pytest.approx(np.mean(expected), abs=1e-12)
        assert result.low[name].isnan()


@pytest.mark.parametrize("n", [2, 3, 5, 8, 9, 64, 200])
def test_kendall_of_any_length_equals_scipy(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    a, b = (torch.randint(-n, n, (n,), generator=generator) for _ in range(2))
    assert kendall(a, b).item() == pytest.approx(kendalltau(a, b).statistic, abs=1e-12, nan_ok=True)


def test_kendall_counts_pairs() -> None:
    a, b = (values[:12, 0] for values in _case(ties=True))
    signs = [((a[i] - a[j]).sign(), (b[i] - b[j]).sign()) for i, j in combinations(range(12), 2)]
    expected = sum(x * y for x, y in signs) / math.sqrt(sum(x * x for x, _ in signs) * sum(y * y for _, y in signs))
    assert kendall(a, b).item() == pytest.approx(float(expected), abs=1e-12)


def test_kendall_at_its_limits() -> None:
    values = torch.arange(9)
    assert kendall(values, values * 2) == 1
    assert kendall(values, -values) == -1
    assert kendall(values, torch.ones(9)).isnan()
    assert kendall(values[:1], values[:1]).isnan()
    with pytest.raises(ValueError, match="to have the same length, but got 9 and 3"):
        kendall(values, values[:3])


@pytest.mark.parametrize("n", [1, 2, 7, 16])
def test_inversions_are_counted_by_pairs(n: int) -> None:
    ranks = torch.randint(n, (4, n), generator=torch.Generator().manual_seed(n))
    expected = [sum(int(row[i] > row[j]) for i, j in combinations(range(n), 2)) for row in ranks]
    assert _inversions(ranks).tolist() == expected


def test_overlap_of_the_top_k_equals_sets() -> None:
    first, second = _case()
    result = rank_agreement(first, second, k=7, bootstrap=0)
    for j in range(N_TARGET):
        a, b = (set(scores[:, j].topk(7).indices.tolist()) for scores in (first, second))
        assert result.per_target["overlap"][j].item() == pytest.approx(len(a & b) / 7)
        assert result.per_target["jaccard"][j].item() == pytest.approx(len(a & b) / len(a | b))


def test_overlap_of_ties_is_the_expectation() -> None:
    first, second = _case(ties=True)
    result = rank_agreement(first, second, k=10, bootstrap=0)
    expected = [overlap(first[:, j], -second[:, j], fraction=10 / N_TRAIN) for j in range(N_TARGET)]
    np.testing.assert_allclose(result.per_target["overlap"], torch.stack(expected), atol=1e-12)
    constant = torch.zeros(N_TRAIN, 1)
    with pytest.warns(UserWarning, match="undefined"):
        chance = rank_agreement(first[:, :1], constant, k=10)
    assert chance.mean["overlap"].item() == pytest.approx(10 / N_TRAIN)


def test_agreement_is_symmetric_and_blind_to_rising_transforms() -> None:
    first, second = _case()
    expected, turned, moved = (
        rank_agreement(*pair, bootstrap=0).per_target
        for pair in ((first, second), (second, first), (first.exp(), second * 3 + 7))
    )
    for name, values in expected.items():
        np.testing.assert_allclose(turned[name], values, atol=1e-12)
        np.testing.assert_allclose(moved[name], values, atol=1e-12)


def test_the_method_itself_agrees_wholly_and_its_negative_not_at_all() -> None:
    first, _ = _case()
    assert all(value == pytest.approx(1) for value in rank_agreement(first, first).mean.values())
    turned = rank_agreement(first, -first).mean
    assert [round(float(value), 12) for value in turned.values()] == [-1, -1, 0, 0]


def test_constant_scores_are_counted_and_left_out_of_the_correlations() -> None:
    first, second = _case()
    first[:, 3], second[:, 5] = 0.1, 0.0
    with pytest.warns(
        UserWarning, match="rank correlation of 2 of 70 targets is undefined, as a method's scores are constant"
    ):
        result = rank_agreement(first, second, bootstrap=50)
    assert result.undefined == 2
    for name in ("kendall", "spearman"):
        assert result.per_target[name].isnan().nonzero().flatten().tolist() == [3, 5]
        assert result.mean[name] == result.per_target[name].nanmean()
        assert result.low[name] < result.mean[name] < result.high[name]
    assert not result.per_target["overlap"].isnan().any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"first": torch.ones(4)}, r"`first` to be a non-empty matrix, but got shape \(4,\)\."),
        ({"second": torch.ones(N_TRAIN, 2)}, r"one shape \(n_train, n_target\), but got \(50, 70\) and \(50, 2\)\."),
        ({"second": torch.full((N_TRAIN, N_TARGET), math.nan)}, "`second` to be finite, but got 3500 NaN"),
        ({"k": 0}, r"`k` to be an integer from 1 to 50, but got 0\."),
        ({"k": 51}, r"`k` to be an integer from 1 to 50, but got 51\."),
        ({"confidence": 0}, r"`confidence` to be a number in \(0, 1\)"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    first, second = _case()
    with pytest.raises(ValueError, match=message):
        rank_agreement(**({"first": first, "second": second} | change))


def test_class_equals_function_over_several_updates() -> None:
    first, second = _case()
    metric = RankAgreement(k=7, bootstrap=50, seed=3)
    metric.update(first[:, :20], second[:, :20])
    metric.update(first[:, 20:], second[:, 20:])
    expected = rank_agreement(first, second, k=7, bootstrap=50, seed=3)
    assert metric.compute() == expected.mean
    summary = metric.summary()
    assert summary[:3] == expected[:3]
    assert pickle.loads(pickle.dumps(metric)).compute() == metric.compute()
    with pytest.raises(ValueError, match=r"`k` of .+ to be an integer >= 1, but got 0\."):
        RankAgreement(k=0)


def test_processes_are_concatenated() -> None:
    first, second = _case()
    other = RankAgreement()
    other.update(first[:, 20:], second[:, 20:])
    metric = RankAgreement(
        dist_sync_fn=lambda state, group: [state, other.statistics[0]], distributed_available_fn=lambda: True
    )
    metric.update(first[:, :20], second[:, :20])
    assert metric.compute() == rank_agreement(first, second).mean


def test_plot_shows_the_summary_or_a_history() -> None:
    metric = RankAgreement(k=7, bootstrap=20)
    metric.update(*_case())
    _, ax = metric.plot()
    assert [tick.get_text() for tick in ax.get_xticklabels()] == [
        "Kendall", "Spearman", "top 7\nshared", "top 7\nJaccard",
    ]  # fmt: skip
    assert [text.get_text() for text in ax.texts] == [f"{float(value):.2f}" for value in metric.compute().values()]
    _, ax = metric.plot([metric.compute(), metric.compute()])
    assert ax.get_legend_handles_labels()[1][:2] == ["kendall", "spearman"]
