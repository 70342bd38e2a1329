"""Bootstrap intervals against loops over resamples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr

from lightning_attr.metrics.bootstrap import (
    Ranking,
    Values,
    check_bootstrap,
    correlation,
    count_undefined,
    mean_interval,
    two_way_interval,
)
from lightning_attr.metrics.ranks import midranks

N_TARGET, M = 7, 24
COUNTS = torch.tensor([0, 3, 1, 0, 2, 1, 1, 0, 0, 2, 1, 1])
KINDS = {"spearman": (Ranking, spearmanr), "pearson": (Values, pearsonr)}


def _pair(scale: float = 1.0, m: int = M) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(N_TARGET, m, generator=generator, dtype=torch.float64)
    return [first, first + scale * torch.randn(N_TARGET, m, generator=generator, dtype=torch.float64)]


def test_weighted_ranking_equals_ranking_of_the_repeated_columns() -> None:
    values = torch.randn(3, 12, generator=torch.Generator().manual_seed(0)).mul(2).round()
    ranks = Ranking(values).centered(COUNTS.double())
    repeated = midranks(values.repeat_interleave(COUNTS, dim=1)) - (12 + 1) / 2
    np.testing.assert_allclose(ranks.repeat_interleave(COUNTS, dim=1), repeated, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_weighted_correlation_equals_scipy_on_the_repeated_columns(kind: str) -> None:
    a, b = _pair(m=12)
    centering, reference = KINDS[kind]
    weighted = correlation(centering(a), centering(b), COUNTS.double())
    repeated = [values.repeat_interleave(COUNTS, dim=1) for values in (a, b)]
    expected = [reference(x, y).statistic for x, y in zip(*repeated, strict=True)]
    np.testing.assert_allclose(weighted, expected, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_correlation_with_a_constant_row_is_nan_whatever_it_rounds_to(kind: str) -> None:
    a, b = _pair()
    a[2], b[4] = 0.1, 1e17 / 3
    centering, _ = KINDS[kind]
    missing = correlation(centering(a), centering(b), torch.ones(M).double()).isnan()
    assert missing.nonzero().flatten().tolist() == [2, 4]


@pytest.mark.parametrize("kind", KINDS)
def test_two_way_interval_matches_a_loop_that_correlates_every_resample(kind: str) -> None:
    a, b = _pair(scale=2.0)
    centering, reference = KINDS[kind]
    original = np.array([reference(a[j], b[j]).statistic for j in range(N_TARGET)])
    generator, means, by_columns, by_targets = torch.Generator().manual_seed(5), [], [], []
    for _ in range(50):
        columns = torch.randint(M, (M,), generator=generator)
        targets = torch.randint(N_TARGET, (N_TARGET,), generator=generator).numpy()
        resampled = np.array([reference(a[j, columns], b[j, columns]).statistic for j in range(N_TARGET)])
        means.append(resampled[targets].mean())
        by_columns.append(resampled.mean())
        by_targets.append(original[targets].mean())
    pairs = np.var(np.array(means) - by_columns - by_targets) * M / (M - 1) * N_TARGET / (N_TARGET - 1)
    parts = np.var(by_columns) * M / (M - 1), np.var(by_targets) * N_TARGET / (N_TARGET - 1)
    wanted = max(sum(parts) - pairs, *parts)
    assert 0.5 < wanted / np.var(means) < 0.95
    point = 0.3
    expected = (np.quantile(means, [0.05, 0.95]) - np.mean(means)) * np.sqrt(wanted / np.var(means)) + point
    interval = two_way_interval(
        torch.tensor(point).double(), centering(a), centering(b), (N_TARGET, M), bootstrap=50, confidence=0.9, seed=5
    )
    np.testing.assert_allclose(interval, expected, atol=1e-12)


def test_mean_interval_matches_a_loop_over_resamples_of_the_defined_targets() -> None:
    values = torch.tensor([0.1, torch.nan, 0.9, 0.4, torch.nan, 0.2], dtype=torch.float64)
    defined = values[~values.isnan()]
    generator = torch.Generator().manual_seed(3)
    means = [defined[torch.randint(4, (4,), generator=generator)].mean().item() for _ in range(40)]
    interval = mean_interval(values, bootstrap=40, confidence=0.8, seed=3)
    np.testing.assert_allclose(interval, np.quantile(means, [0.1, 0.9]), atol=1e-12)


def test_no_resamples_or_no_defined_target_give_no_interval() -> None:
    assert torch.stack(mean_interval(torch.ones(3).double(), 0, 0.9, 0)).isnan().all()
    assert torch.stack(mean_interval(torch.full((3,), torch.nan).double(), 10, 0.9, 0)).isnan().all()


@pytest.mark.slow
def test_mean_interval_covers_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for trial in range(1000):
        values = torch.empty(100, dtype=torch.float64).exponential_(generator=generator)
        low, high = mean_interval(values, bootstrap=200, confidence=0.9, seed=trial)
        hits += int(low <= 1 <= high)
    assert 0.87 <= hits / 1000 <= 0.93


def test_undefined_targets_are_counted_and_warned_of_above_one_percent() -> None:
    values = torch.zeros(100)
    values[7] = torch.nan
    assert count_undefined(values, "rank", "nothing is relevant") == 1
    values[8] = torch.nan
    message = "The rank of 2 of 100 targets is undefined, as nothing is relevant; they are left out of the mean"
    with pytest.warns(UserWarning, match=message):
        assert count_undefined(values, "rank", "nothing is relevant") == 2


@pytest.mark.parametrize(
    ("bootstrap", "confidence", "message"),
    [
        (-1, 0.9, r"`bootstrap` to be an integer >= 0, but got -1\."),
        (10, 0.0, r"`confidence` to be a number in \(0, 1\), but got 0\.0\."),
        (10, 1.0, r"`confidence` to be a number in \(0, 1\), but got 1\.0\."),
    ],
)
def test_bad_arguments(bootstrap: int, confidence: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_bootstrap(bootstrap, confidence, 0)
