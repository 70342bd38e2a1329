"""Leave-one-out correlation against scipy and a model whose retraining is known."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

from lightning_attr.metrics import LeaveOneOutCorrelation, leave_one_out_correlation
from lightning_attr.metrics.correlation import signal_to_noise

N, N_TARGET = 40, 6


def _case(seeds: int = 1, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(N, N_TARGET, generator=generator, dtype=torch.float64)
    return scores, scores + noise * torch.randn(seeds, N, N_TARGET, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("seeds", [1, 3])
def test_both_correlations_match_scipy(seeds: int) -> None:
    scores, differences = _case(seeds)
    result = leave_one_out_correlation(scores, differences, bootstrap=0)
    mean = differences.mean(0)
    for score, reference in ((result.pearson, pearsonr), (result.spearman, spearmanr)):
        expected = [reference(scores[:, j], mean[:, j]).statistic for j in range(N_TARGET)]
        np.testing.assert_allclose(score.per_target, expected, atol=1e-12)
        assert score.mean.item() == pytest.approx(np.mean(expected), abs=1e-12)
        assert score.undefined == 0
        assert score.low.isnan()
    np.testing.assert_array_equal(result.signal_to_noise, signal_to_noise(differences))


def test_ties_match_scipy() -> None:
    scores, differences = (values.mul(1.5).round() for values in _case())
    result = leave_one_out_correlation(scores, differences, bootstrap=0)
    expected = [spearmanr(scores[:, j], differences[0, :, j]).statistic for j in range(N_TARGET)]
    np.testing.assert_allclose(result.spearman.per_target, expected, atol=1e-12)


def test_influence_on_a_mean_reaches_one() -> None:
    values = torch.randn(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    without = torch.stack([torch.cat([values[:i], values[i + 1 :]]).mean() for i in range(30)])
    differences = (values.mean() - without).unsqueeze(1)
    influence = (values - values.mean()).unsqueeze(1) / 30
    result = leave_one_out_correlation(influence, differences, bootstrap=0)
    assert result.pearson.mean.item() == pytest.approx(1, abs=1e-12)
    assert result.spearman.mean.item() == pytest.approx(1, abs=1e-12)
    assert leave_one_out_correlation(-influence, differences).pearson.mean.item() == pytest.approx(-1, abs=1e-12)


def test_invariances() -> None:
    scores, differences = _case(seeds=2)
    expected = leave_one_out_correlation(scores, differences, bootstrap=0)
    # The output of the full model shifts all differences of a target and seed alike: without it nothing changes.
    shift = torch.randn(2, 1, N_TARGET, dtype=torch.float64)
    moved = leave_one_out_correlation(scores * 3 - 2, differences + shift, bootstrap=0)
    order = torch.randperm(N)
    shuffled = leave_one_out_correlation(scores[order], differences[:, order], bootstrap=0)
    for other in (moved, shuffled):
        np.testing.assert_allclose(other.pearson.per_target, expected.pearson.per_target, atol=1e-10)
        np.testing.assert_allclose(other.spearman.per_target, expected.spearman.per_target, atol=1e-12)
        np.testing.assert_allclose(other.signal_to_noise, expected.signal_to_noise, rtol=1e-9)


def test_constant_targets_are_counted_and_left_out() -> None:
    scores, differences = _case(seeds=2)
    differences[:, :, 1], scores[:, 4] = 0.1, 0.3
    with pytest.warns(
        UserWarning, match="correlation of 2 of 6 targets is undefined, .* constant over the left-out samples"
    ):
        result = leave_one_out_correlation(scores, differences, bootstrap=20)
    for score in (result.pearson, result.spearman):
        assert score.undefined == 2
        assert score.per_target.isnan().nonzero().flatten().tolist() == [1, 4]
        assert score.mean.item() == pytest.approx(score.per_target[[0, 2, 3, 5]].mean().item())
        assert score.low < score.mean < score.high


@pytest.mark.slow
def test_intervals_cover_the_population_correlations() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = {"pearson": 1 / math.sqrt(2), "spearman": 6 / math.pi * math.asin(1 / math.sqrt(2) / 2)}
    hits = dict.fromkeys(truth, 0)
    n_trials = 300  # 600 trials of 300 resamples gave 0.937 (Pearson) and 0.940 (Spearman)
    for trial in range(n_trials):
        signal, common, own = (torch.randn(100, k, generator=generator, dtype=torch.float64) for k in (20, 1, 20))
        differences = signal + math.sqrt(0.5) * (common + own)  # the left-out sample's model moves all targets
        result = leave_one_out_correlation(signal, differences, bootstrap=200, seed=trial)
        for kind, value in truth.items():
            score = getattr(result, kind)
            hits[kind] += int(score.low <= value <= score.high)
    for kind, count in hits.items():
        assert 0.92 <= count / n_trials <= 0.98, kind


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.ones(N)}, r"`scores` to be a non-empty matrix, but got shape \(40,\)\."),
        ({"scores": torch.full((N, N_TARGET), math.nan)}, "`scores` to be finite, but got 240 NaN"),
        ({"scores": torch.ones(1, N_TARGET)}, r"at least 2 left-out samples, but got 1\."),
        (
            {"differences": torch.ones(N_TARGET, N)},
            r"shape \(n_left_out, n_target\) = \(40, 6\) as `scores`, or \(s, .*\), but got \(6, 40\)\.",
        ),
        ({"differences": torch.ones(0, N, N_TARGET)}, r"`differences` to have shape .* but got \(0, 40, 6\)\."),
        ({"differences": torch.full((N, N_TARGET), math.inf)}, "`differences` to be finite, but got 240 NaN"),
        ({"bootstrap": -1}, "`bootstrap` to be an integer >= 0"),
        ({"confidence": 2.0}, r"`confidence` to be a number in \(0, 1\)"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    scores, differences = _case()
    arguments: dict[str, Any] = {"scores": scores, "differences": differences} | change
    with pytest.raises(ValueError, match=message):
        leave_one_out_correlation(**arguments)


def test_class_equals_function_over_several_updates() -> None:
    scores, differences = _case(seeds=2)
    metric = LeaveOneOutCorrelation(bootstrap=50, confidence=0.8, seed=3)
    metric.update(scores[:1], differences[:, :1])
    metric.update(scores[1:], differences[:, 1:])
    expected = leave_one_out_correlation(scores, differences, bootstrap=50, confidence=0.8, seed=3)
    assert metric.compute() == {"pearson": expected.pearson.mean, "spearman": expected.spearman.mean}
    summary = metric.summary()
    for ours, theirs in ((summary.pearson, expected.pearson), (summary.spearman, expected.spearman)):
        assert torch.equal(torch.stack(ours[:4]), torch.stack(theirs[:4]))
    np.testing.assert_allclose(summary.signal_to_noise, expected.signal_to_noise)
    assert pickle.loads(pickle.dumps(metric)).compute() == metric.compute()


def test_update_rejects_other_seeds_and_one_sample_is_too_few() -> None:
    scores, differences = _case(seeds=2)
    metric = LeaveOneOutCorrelation()
    metric.update(scores[:1], differences[:, :1])
    with pytest.raises(ValueError, match=r"at least 2 left-out samples, but got 1\."):
        metric.compute()
    with pytest.raises(ValueError, match=r"as many seeds and targets as in earlier updates, \(2, 6\), but got \(1, 6"):
        metric.update(scores, differences[0])
    assert len(metric.scores) == len(metric.differences) == 1


def test_processes_are_concatenated() -> None:
    scores, differences = _case(seeds=2)
    whole, other = LeaveOneOutCorrelation(), LeaveOneOutCorrelation()
    whole.update(scores, differences)
    other.update(scores[10:], differences[:, 10:])
    gathered = iter([other.scores[0], other.differences[0]])
    metric = LeaveOneOutCorrelation(
        dist_sync_fn=lambda state, group: [state, next(gathered)], distributed_available_fn=lambda: True
    )
    metric.update(scores[:10], differences[:, :10])
    assert metric.compute() == whole.compute()


def test_plot_shows_the_summary_or_a_history() -> None:
    metric = LeaveOneOutCorrelation(bootstrap=20)
    metric.update(*_case(seeds=2))
    _, ax = metric.plot()
    summary = metric.summary()
    labels = ax.get_legend_handles_labels()[1]
    assert labels[0].startswith(f"Pearson {float(summary.pearson.mean):.3f} (")
    assert labels[1].startswith(f"Spearman {float(summary.spearman.mean):.3f} (")
    assert labels[2] == f"ceiling of Spearman's {float(summary.spearman.ceiling):.3f}"
    _, ax = metric.plot([metric.compute(), metric.compute()])
    assert ax.get_legend_handles_labels()[1][:2] == ["pearson", "spearman"]
