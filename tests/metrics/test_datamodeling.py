"""Linear datamodeling score against scipy, loops over resamples and synthetic truth."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from lightning_attr.metrics import LinearDatamodelingScore, functional, linear_datamodeling_score

N_TRAIN, N_TARGET, M = 30, 7, 24


def _case(seeds: int = 1, noise: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, half-size subsets and outputs that are linear in the subset up to noise."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(N_TRAIN, N_TARGET, generator=generator)
    masks = torch.stack([torch.randperm(N_TRAIN, generator=generator) < N_TRAIN // 2 for _ in range(M)])
    outputs = masks.float() @ scores + noise * torch.randn(seeds, M, N_TARGET, generator=generator)
    return scores, masks, outputs


def _reference(scores: Tensor, masks: Tensor, outputs: Tensor) -> list[float]:
    predicted = masks.double() @ scores.double()
    measured = outputs.double().reshape(-1, M, N_TARGET).mean(0)
    return [spearmanr(predicted[:, j], measured[:, j]).statistic for j in range(N_TARGET)]


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("block_elements", [1, 10**6])
def test_score_matches_scipy(seeds: int, block_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "_BLOCK_ELEMENTS", block_elements)
    case = _case(seeds)
    score = linear_datamodeling_score(*case, bootstrap=0)
    np.testing.assert_allclose(score.per_target, _reference(*case), atol=1e-12)
    assert score.mean.item() == pytest.approx(np.mean(_reference(*case)), abs=1e-12)
    assert score.undefined == 0
    assert score.low.isnan()
    assert score.high.isnan()


def test_ties_match_scipy() -> None:
    scores, masks, outputs = _case()
    case = scores.round(), masks, (outputs / 3).round()
    np.testing.assert_allclose(linear_datamodeling_score(*case, bootstrap=0).per_target, _reference(*case), atol=1e-12)


def test_outputs_without_seeds_equal_one_seed() -> None:
    scores, masks, outputs = _case()
    a, b = linear_datamodeling_score(scores, masks, outputs), linear_datamodeling_score(scores, masks, outputs[0])
    assert torch.equal(torch.stack(a[:3]), torch.stack(b[:3]))
    assert a.ceiling.isnan()
    assert b.ceiling.isnan()


def test_exact_linear_outputs_score_one_and_opposite_scores_minus_one() -> None:
    scores, masks, _ = _case()
    outputs = masks.double() @ scores.double()
    assert linear_datamodeling_score(scores, masks, outputs).mean.item() == pytest.approx(1, abs=1e-12)
    assert linear_datamodeling_score(-scores, masks, outputs).mean.item() == pytest.approx(-1, abs=1e-12)


def _per_target(scores: Tensor, masks: Tensor, outputs: Tensor) -> Tensor:
    return linear_datamodeling_score(scores, masks, outputs, bootstrap=0).per_target


def test_invariance_to_positive_scale_and_offset_of_each_column() -> None:
    scores, masks, outputs = _case()
    scale, offset = torch.rand(N_TARGET, dtype=torch.float64) + 0.1, torch.randn(N_TARGET, dtype=torch.float64)
    moved = _per_target(scores * scale + offset, masks, outputs)
    np.testing.assert_allclose(moved, _per_target(scores, masks, outputs), atol=1e-12)


def test_an_offset_of_the_scores_matters_when_subsets_differ_in_size() -> None:
    scores, masks, outputs = _case()
    masks = masks.clone()
    masks[::3] |= torch.rand(N_TRAIN, generator=torch.Generator().manual_seed(1)) < 0.3
    assert not torch.allclose(_per_target(scores + 1, masks, outputs), _per_target(scores, masks, outputs))
    scaled = _per_target(scores * 3, masks, outputs)
    np.testing.assert_allclose(scaled, _per_target(scores, masks, outputs), atol=1e-12)


@pytest.mark.parametrize("transform", [torch.exp, torch.sigmoid, lambda y: 5 * y + 2, lambda y: y**3])
def test_invariance_to_rising_transforms_of_single_outputs(transform: Callable[[Tensor], Tensor]) -> None:
    scores, masks, outputs = _case()
    moved = _per_target(scores, masks, transform(outputs.double() / 10))
    np.testing.assert_allclose(moved, _per_target(scores, masks, outputs), atol=1e-12)


def test_invariance_to_order_of_subsets_samples_and_seeds() -> None:
    scores, masks, outputs = _case(seeds=3)
    expected = linear_datamodeling_score(scores, masks, outputs, bootstrap=0)
    subsets, samples = torch.randperm(M), torch.randperm(N_TRAIN)
    moved = linear_datamodeling_score(
        scores[samples], masks[subsets][:, samples], outputs[[2, 0, 1]][:, subsets], bootstrap=0
    )
    np.testing.assert_allclose(moved.per_target, expected.per_target, atol=1e-12)
    np.testing.assert_allclose(moved.ceiling, expected.ceiling, atol=0.05)  # other pairs of seeds make its halves
    columns = torch.randperm(N_TARGET)
    shuffled = _per_target(scores[:, columns], masks, outputs[:, :, columns])
    np.testing.assert_allclose(shuffled, expected.per_target[columns], atol=1e-12)


def test_the_complement_of_the_subsets_turns_the_sign() -> None:
    scores, masks, outputs = _case()
    np.testing.assert_allclose(_per_target(scores, ~masks, outputs), -_per_target(scores, masks, outputs), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_scores_are_undefined_not_ranked_by_rounding(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    masks = torch.stack([torch.randperm(1000, generator=generator) < 500 for _ in range(100)])
    scores = torch.full((1000, 3), 0.1, dtype=dtype)  # sums of 0.1 differ by rounding, as the order of addition does
    scores[:, -1] = torch.linspace(0, 1, 1000)
    with pytest.warns(UserWarning, match="correlation of 2 of 3 targets is undefined"):
        score = linear_datamodeling_score(scores, masks, torch.randn(100, 3, generator=generator), bootstrap=20)
    assert score.undefined == 2
    assert score.per_target[:-1].isnan().all()
    assert score.mean == score.per_target[-1]
    assert score.low <= score.mean <= score.high


def test_all_targets_undefined() -> None:
    scores, masks, outputs = _case()
    with pytest.warns(UserWarning, match="correlation of 7 of 7 targets is undefined"):
        score = linear_datamodeling_score(scores, masks, torch.ones_like(outputs))
    assert score.undefined == 7
    assert score.mean.isnan()
    assert score.low.isnan()


def test_random_scores_score_zero() -> None:
    _, masks, outputs = _case()
    scores = torch.randn(N_TRAIN, N_TARGET, generator=torch.Generator().manual_seed(9))
    score = linear_datamodeling_score(scores, masks, outputs, bootstrap=0)
    assert abs(score.mean) < 3 / math.sqrt((M - 1) * N_TARGET)


def test_interval_depends_on_the_seed_only() -> None:
    case = _case(noise=6.0)
    a, b, c = (linear_datamodeling_score(*case, bootstrap=100, seed=seed) for seed in (0, 0, 1))
    assert (a.low, a.high) == (b.low, b.high)
    assert a.low != c.low
    assert a.low < a.mean < a.high
    narrow = linear_datamodeling_score(*case, bootstrap=100, confidence=0.5)
    assert a.low < narrow.low < narrow.high < a.high


@pytest.mark.slow
def test_bootstrap_covers_the_population_score() -> None:
    generator = torch.Generator().manual_seed(0)
    m, n_target, hits, n_trials = 100, 20, 0, 400
    truth = 6 / math.pi * math.asin(1 / math.sqrt(2) / 2)  # Spearman of normals with Pearson correlation 1 / sqrt(2)
    for trial in range(n_trials):
        signal, common, own = (
            torch.randn(m, k, generator=generator, dtype=torch.float64) for k in (n_target, 1, n_target)
        )
        outputs = signal + math.sqrt(0.5) * (common + own)  # retraining noise is shared between targets
        # With one training sample for each subset, summed scores are the scores themselves.
        score = linear_datamodeling_score(signal, torch.eye(m), outputs, bootstrap=200, seed=trial)
        hits += int(score.low <= truth <= score.high)
    assert 0.92 <= hits / n_trials <= 0.98


@pytest.mark.parametrize("seeds", [2, 3, 4, 5])
def test_ceiling_is_what_exact_scores_reach(seeds: int) -> None:
    generator = torch.Generator().manual_seed(seeds)
    signal = torch.randn(100, 60, generator=generator, dtype=torch.float64)
    outputs = signal + torch.randn(seeds, 100, 60, generator=generator, dtype=torch.float64)
    score = linear_datamodeling_score(signal, torch.eye(100), outputs, bootstrap=0)
    assert score.ceiling.item() == pytest.approx(score.mean.item(), abs=0.02)


def test_ceiling_of_two_seeds_by_hand() -> None:
    scores, masks, outputs = _case(seeds=2)
    reliability = np.mean([spearmanr(outputs[0, :, j], outputs[1, :, j]).statistic for j in range(N_TARGET)])
    expected = math.sqrt(2 * reliability / (1 + reliability))
    assert linear_datamodeling_score(scores, masks, outputs, bootstrap=0).ceiling.item() == pytest.approx(expected)


def test_ceiling_of_disagreeing_seeds_is_zero() -> None:
    scores, masks, outputs = _case()
    seeds = torch.cat([outputs, -outputs, outputs.roll(1, 1)])
    opposed = torch.cat([seeds[:2], -seeds[:1]])
    assert linear_datamodeling_score(scores, masks, opposed, bootstrap=0).ceiling == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.ones(N_TRAIN)}, r"`scores` to be a non-empty matrix, but got shape \(30,\)\."),
        ({"masks": torch.ones(M, 5)}, r"`masks` to have shape \(m, n_train\) with n_train = 30 .* but got \(24, 5\)\."),
        ({"masks": torch.ones(1, N_TRAIN)}, r"`masks` to hold at least 2 subsets, but got 1\."),
        (
            {"masks": torch.arange(M * N_TRAIN).reshape(M, -1)},
            r"`masks` to be bool or hold only 0 and 1, but got torch.int64",
        ),
        (
            {"outputs": torch.ones(N_TARGET, M)},
            r"shape \(m, n_target\) = \(24, 7\) or \(s, m, n_target\), but got \(7, 24\)\.",
        ),
        ({"outputs": torch.ones(0, M, N_TARGET)}, r"`outputs` to have shape .* but got \(0, 24, 7\)\."),
        (
            {"outputs": torch.full((M, N_TARGET), math.nan)},
            r"`outputs` to be finite, but got 168 NaN or infinite values\.",
        ),
        ({"scores": torch.full((N_TRAIN, N_TARGET), math.inf)}, r"`scores` to be finite, but got 210 NaN"),
        ({"bootstrap": -1}, r"`bootstrap` to be an integer >= 0, but got -1\."),
        ({"confidence": 1.0}, r"`confidence` to be a number in \(0, 1\), but got 1\.0\."),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    scores, masks, outputs = _case()
    arguments: dict[str, Any] = {"scores": scores, "masks": masks, "outputs": outputs} | change
    with pytest.raises(ValueError, match=message):
        linear_datamodeling_score(**arguments)


def test_class_equals_function() -> None:
    case = _case(seeds=2)
    metric = LinearDatamodelingScore(bootstrap=50, confidence=0.8, seed=3)
    metric.update(*case)
    expected = linear_datamodeling_score(*case, bootstrap=50, confidence=0.8, seed=3)
    assert metric.compute() == expected.mean
    summary = metric.summary()
    assert torch.equal(torch.stack(summary[:4]), torch.stack(expected[:4]))
    assert torch.equal(summary.per_target, expected.per_target)


@pytest.mark.parametrize("seeds", [1, 2])
def test_two_updates_equal_one(seeds: int) -> None:
    scores, masks, outputs = _case(seeds)
    once, twice = LinearDatamodelingScore(), LinearDatamodelingScore()
    once.update(scores, masks, outputs)
    twice.update(scores, masks[:5], outputs[:, :5])
    twice.update(scores, masks[5:].int(), outputs[:, 5:])
    assert twice.compute() == once.compute()
    assert twice.summary().high == once.summary().high


def test_forward_accumulates() -> None:
    scores, masks, outputs = _case()
    metric, whole = LinearDatamodelingScore(), LinearDatamodelingScore()
    metric(scores, masks[:12], outputs[:, :12])
    metric(scores, masks[12:], outputs[:, 12:])
    whole.update(scores, masks, outputs)
    assert metric.compute() == whole.compute()


def test_update_rejects_other_scores_and_other_seeds() -> None:
    scores, masks, outputs = _case()
    metric = LinearDatamodelingScore()
    metric.update(scores, masks, outputs)
    swapped = scores[torch.cat([torch.tensor([1, 0]), torch.arange(2, N_TRAIN)])]
    with pytest.raises(ValueError, match="`scores` to be the same in every update of LinearDatamodelingScore"):
        metric.update(swapped, masks, outputs)
    with pytest.raises(
        ValueError, match=r"as many seeds and targets as in earlier updates, \(1, 7\), but got \(2, 7\)\."
    ):
        metric.update(scores, masks, outputs.repeat(2, 1, 1))
    assert len(metric.outputs) == len(metric.predicted) == 1
    metric.reset()
    metric.update(swapped, masks, outputs)


def test_constructor_rejects_bad_arguments() -> None:
    with pytest.raises(ValueError, match="`bootstrap` to be an integer >= 0"):
        LinearDatamodelingScore(bootstrap=-5)


def test_pickle_and_state_dict_keep_the_state() -> None:
    metric = LinearDatamodelingScore()
    metric.update(*_case())
    assert pickle.loads(pickle.dumps(metric)).compute() == metric.compute()
    metric.persistent(True)
    assert set(metric.state_dict()) == {"predicted", "outputs", "checksum"}


def test_processes_are_concatenated() -> None:
    scores, masks, outputs = _case()
    whole, other = LinearDatamodelingScore(), LinearDatamodelingScore()
    whole.update(scores, masks, outputs)
    other.update(scores, masks[10:], outputs[:, 10:])
    states = [other.predicted[0], other.outputs[0], other.checksum[0]] * 2  # gathered for compute, again for summary
    gathered = iter(states)
    metric = LinearDatamodelingScore(
        dist_sync_fn=lambda state, group: [state, next(gathered)], distributed_available_fn=lambda: True
    )
    metric.update(scores, masks[:10], outputs[:, :10])
    assert metric.compute() == whole.compute()
    assert metric.summary().low == whole.summary().low
    assert len(metric.predicted[0]) == 10


def test_plot_shows_the_summary_or_a_history() -> None:
    metric = LinearDatamodelingScore(bootstrap=20)
    metric.update(*_case(seeds=2))
    fig, ax = metric.plot()
    assert ax.figure is fig
    summary = metric.summary()
    mean, low, high, ceiling = (f"{float(value):.3f}" for value in summary[:4])
    assert ax.get_legend_handles_labels()[1] == [f"mean {mean} ({low} to {high})", f"ceiling {ceiling}"]
    _, ax = metric.plot([metric.compute(), metric.compute()])
    assert ax.get_ylabel() == "LinearDatamodelingScore"
