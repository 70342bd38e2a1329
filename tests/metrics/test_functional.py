"""Pure metrics against scipy, scikit-learn and obvious loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu, rankdata, spearmanr
from sklearn.metrics import roc_auc_score
from torch import Tensor

from lightning_attr.metrics import (
    effective_proponents,
    functional,
    noisy_label_auroc,
    noisy_label_recall,
    noisy_label_recall_area,
    noisy_label_recall_curve,
    overlap,
    share_harmful,
    share_helpful,
    spearman,
)
from lightning_attr.metrics.functional import score_blocks
from lightning_attr.metrics.ranks import midranks


def _values(kind: str, n: int = 60) -> Tensor:
    values = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return {"distinct": values, "ties": values.round(), "float32": values.float(), "constant": torch.ones(n)}[kind]


def _mask(n: int = 60) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(1)) < 0.3


KINDS = ["distinct", "ties", "float32"]


@pytest.mark.parametrize("kind", [*KINDS, "constant"])
def test_midranks_match_scipy(kind: str) -> None:
    values = _values(kind).reshape(3, 20)
    np.testing.assert_array_equal(midranks(values), rankdata(values, axis=1))


def test_midranks_of_a_transposed_view() -> None:
    values = _values("ties").reshape(20, 3)
    np.testing.assert_array_equal(midranks(values.T), rankdata(values.T, axis=1))


@pytest.mark.parametrize("kind", KINDS)
def test_spearman_matches_scipy(kind: str) -> None:
    a, b = _values(kind), _values(kind).roll(1).abs()
    assert spearman(a, b).item() == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)


def test_spearman_of_monotone_and_constant_vectors() -> None:
    a = _values("distinct")
    assert spearman(a, a.exp()) == 1
    assert spearman(a, -a) == -1
    assert spearman(a, torch.ones(60)).isnan()


def test_spearman_rejects_bad_vectors() -> None:
    with pytest.raises(ValueError, match=r"Expected arguments `a` and `b` to have the same length, but got 3 and 4\."):
        spearman(torch.ones(3), torch.ones(4))
    with pytest.raises(ValueError, match=r"Expected argument `b` to be finite, but got 1 NaN or infinite values\."):
        spearman(torch.ones(3), torch.tensor([1, math.inf, 2]))


@pytest.mark.parametrize("kind", KINDS)
def test_auroc_matches_scipy_and_sklearn(kind: str) -> None:
    values, mask = _values(kind), _mask()
    u = mannwhitneyu(values[mask], values[~mask]).statistic
    assert noisy_label_auroc(values, mask).item() == pytest.approx(u / (mask.sum() * (~mask).sum()).item(), abs=1e-12)
    assert noisy_label_auroc(values, mask).item() == pytest.approx(roc_auc_score(mask, values), abs=1e-12)


def test_auroc_of_constant_values_is_exactly_one_half() -> None:
    assert noisy_label_auroc(_values("constant"), _mask()).item() == 0.5


def test_auroc_of_perfect_and_inverted_order() -> None:
    assert noisy_label_auroc(_mask().float(), _mask()) == 1
    assert noisy_label_auroc(-_mask().float(), _mask()) == 0


def test_auroc_is_invariant_to_monotone_maps_and_order() -> None:
    values, mask = _values("ties"), _mask()
    expected = noisy_label_auroc(values, mask)
    assert noisy_label_auroc(values.exp() * 3 - 7, mask) == expected
    order = torch.randperm(60, generator=torch.Generator().manual_seed(2))
    assert noisy_label_auroc(values[order], mask[order]) == expected
    assert noisy_label_auroc(-values, mask).item() == pytest.approx(1 - expected.item(), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_masks_of_zeros_and_ones_in_any_dtype(dtype: torch.dtype) -> None:
    values, mask = _values("distinct"), _mask()
    assert noisy_label_auroc(values, mask.to(dtype)) == noisy_label_auroc(values, mask)


def _recall_over_tie_orders(values: list[float], mask: list[bool], count: int) -> float:
    recalls = []
    for order in itertools.permutations(range(len(values))):
        inspected = sorted(order, key=lambda i: -values[i])[:count]  # stable: ties keep the permuted order
        recalls.append(sum(mask[i] for i in inspected) / sum(mask))
    return sum(recalls) / len(recalls)


@pytest.mark.parametrize("count", range(1, 7))
def test_recall_is_the_expectation_over_tie_orders(count: int) -> None:
    values, mask = [2.0, 1.0, 1.0, 1.0, 0.0, 0.0], [False, True, True, False, True, False]
    expected = _recall_over_tie_orders(values, mask, count)
    tensors = torch.tensor(values), torch.tensor(mask)
    assert noisy_label_recall(*tensors, fraction=count / 6).item() == pytest.approx(expected, abs=1e-12)
    assert noisy_label_recall_curve(*tensors)[1][count].item() == pytest.approx(expected, abs=1e-12)


def test_recall_inspects_at_least_one_and_rounds_to_the_nearest() -> None:
    values, mask = torch.tensor([3.0, 2, 1, 0]), torch.tensor([True, True, False, False])
    assert noisy_label_recall(values, mask, fraction=0.01) == 0.5
    assert noisy_label_recall(values, mask, fraction=0.4) == 1
    assert noisy_label_recall(values, mask, fraction=1.0) == 1


@pytest.mark.parametrize("kind", [*KINDS, "constant"])
def test_curve_runs_from_origin_to_one_and_passes_through_every_recall(kind: str) -> None:
    values, mask = _values(kind), _mask()
    inspected, recall = noisy_label_recall_curve(values, mask)
    assert inspected.shape == recall.shape == (61,)
    assert (recall[0], inspected[0], inspected[-1]) == (0, 0, 1)
    assert recall[-1].item() == pytest.approx(1, abs=1e-12)
    expected = [noisy_label_recall(values, mask, fraction=k / 60).item() for k in range(1, 61)]
    np.testing.assert_allclose(recall[1:], expected, atol=1e-12)


@pytest.mark.parametrize("kind", [*KINDS, "constant"])
def test_recall_area_is_linear_in_auroc(kind: str) -> None:
    values, mask = _values(kind), _mask()
    share = mask.double().mean()
    expected = (1 - share) * noisy_label_auroc(values, mask) + share / 2
    assert noisy_label_recall_area(values, mask).item() == pytest.approx(expected.item(), abs=1e-12)


NOISE_METRICS = [noisy_label_auroc, noisy_label_recall, noisy_label_recall_curve, noisy_label_recall_area]


@pytest.mark.parametrize("metric", NOISE_METRICS)
@pytest.mark.parametrize(
    ("values", "mask", "message"),
    [
        (torch.ones(3), torch.zeros(3), r"mark some samples and leave others clean, but got 0 marked out of 3\."),
        (torch.ones(3), torch.ones(3), r"mark some samples and leave others clean, but got 3 marked out of 3\."),
        (
            torch.ones(3),
            torch.tensor([True]),
            r"`self_influence` and `noise_mask` to have the same length, but got 3 and",
        ),
        (
            torch.ones(3),
            torch.tensor([0, 2, 1]),
            r"hold only 0 and 1, but got torch.int64 values from 0 to 2\. Pass one",
        ),
        (torch.ones(3, 1), torch.zeros(3), r"`self_influence` to be a non-empty vector, but got shape \(3, 1\)\."),
        (torch.ones(0), torch.zeros(0), r"`self_influence` to be a non-empty vector, but got shape \(0,\)\."),
        (torch.tensor([1.0, math.nan]), torch.tensor([0, 1]), r"`self_influence` to be finite, but got 1 NaN"),
    ],
)
def test_noise_metrics_reject_bad_input(metric: object, values: Tensor, mask: Tensor, message: str) -> None:
    assert callable(metric)
    with pytest.raises(ValueError, match=message):
        metric(values, mask)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5, math.nan])
def test_fraction_out_of_range(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"Expected argument `fraction` to be a number in \(0, 1\], but got"):
        noisy_label_recall(torch.ones(2), torch.tensor([0, 1]), fraction=fraction)
    with pytest.raises(ValueError, match=r"Expected argument `fraction` to be a number in \(0, 1\], but got"):
        overlap(torch.ones(2), torch.ones(2), fraction=fraction)


def _scores() -> Tensor:
    return torch.randn(37, 5, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("block_elements", [1, 11, 10**6])
def test_score_figures_match_loops_for_any_block_size(block_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "_BLOCK_ELEMENTS", block_elements)
    scores = _scores()
    scores[4] = 0
    rows = scores.double().tolist()
    assert share_helpful(scores).item() == pytest.approx(sum(sum(row) > 0 for row in rows) / 37)
    assert share_harmful(scores).item() == pytest.approx(sum(sum(row) < 0 for row in rows) / 37)
    assert share_helpful(scores) + share_harmful(scores) == pytest.approx(36 / 37)
    ratios = []
    for column in zip(*rows, strict=True):
        positive = [s for s in column if s > 0]
        ratios.append(sum(positive) ** 2 / sum(s * s for s in positive))
    assert effective_proponents(scores).item() == pytest.approx(sum(ratios) / 5, abs=1e-12)


def test_effective_proponents_counts_equal_shares_and_ignores_scale() -> None:
    scores = torch.tensor([[5.0, 0.0, -1.0], [5.0, 1.0, -1.0], [5.0, 0.0, -1.0]])
    assert effective_proponents(scores) == (3 + 1 + 0) / 3
    scales = torch.tensor([1e-20, 7.0, 1.0])
    assert effective_proponents(scores * scales).item() == pytest.approx(4 / 3, abs=1e-12)


def test_memory_mapped_scores_are_read_in_small_float64_blocks(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functional, "_BLOCK_ELEMENTS", 20)
    scores = torch.from_file(f"{tmp_path}/scores", shared=True, size=37 * 5, dtype=torch.float32).reshape(37, 5)
    scores.copy_(_scores())
    blocks = [(rows, block.clone()) for rows, block in score_blocks(scores)]
    assert {block.dtype for _, block in blocks} == {torch.float64}
    assert max(block.numel() for _, block in blocks) == 20
    assert torch.equal(torch.cat([block for _, block in blocks]), _scores().double())
    assert torch.equal(torch.cat([scores[rows] for rows, _ in blocks]), _scores())
    assert len({block.data_ptr() for _, block in score_blocks(scores)}) == 1


def test_float64_scores_are_left_alone() -> None:
    scores = _scores().double()
    before = scores.clone()
    effective_proponents(scores)
    assert torch.equal(scores, before)


@pytest.mark.parametrize("figure", [share_helpful, share_harmful, effective_proponents])
def test_score_figures_reject_bad_scores(figure: object) -> None:
    assert callable(figure)
    with pytest.raises(ValueError, match=r"`scores` to be a non-empty matrix, but got shape \(3,\)\."):
        figure(torch.ones(3))
    with pytest.raises(ValueError, match=r"`scores` to be a non-empty matrix, but got shape \(0, 2\)\."):
        figure(torch.ones(0, 2))
    with pytest.raises(ValueError, match=r"`scores` to be finite, but got 1 NaN or infinite values\."):
        figure(torch.tensor([[1.0, math.nan]]))


def test_overlap_of_agreeing_opposed_and_unrelated_orders() -> None:
    value = torch.arange(100.0)
    assert overlap(-value, value, fraction=0.1) == 1
    assert overlap(value, value, fraction=0.1) == 0
    self_influence = -value
    self_influence[[0, 1]] = -200  # two of the ten lowest are not among the ten most self-influential
    assert overlap(self_influence, value, fraction=0.1).item() == pytest.approx(0.8)


def test_overlap_of_constant_values_is_the_fraction() -> None:
    assert overlap(torch.ones(50), torch.arange(50.0), fraction=0.2).item() == pytest.approx(0.2)


def test_overlap_rejects_different_lengths() -> None:
    with pytest.raises(
        ValueError, match=r"`self_influence` and `data_value` to have the same length, but got 2 and 3\."
    ):
        overlap(torch.ones(2), torch.ones(3))
