"""Mean reciprocal rank and Recall@k against sorting, random orders of ties, and torchmetrics."""

from __future__ import annotations

import math
import pickle
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.functional.retrieval import retrieval_recall, retrieval_reciprocal_rank

from lightning_attr.metrics import MeanReciprocalRank, RecallAtK, functional, mean_reciprocal_rank, recall_at_k

N_TRAIN, N_TARGET = 40, 9


def _case() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(N_TRAIN, N_TARGET, generator=generator, dtype=torch.float64)
    relevant = torch.rand(N_TRAIN, N_TARGET, generator=generator) < 0.1
    relevant[0] |= ~relevant.any(0)
    return scores, relevant


@pytest.mark.parametrize("block_elements", [1, 10**6])
def test_both_equal_torchmetrics_without_ties(block_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "_BLOCK_ELEMENTS", block_elements)
    scores, relevant = _case()
    scores = scores.exp()  # torchmetrics takes relevant samples of negative score for irrelevant
    pairs = list(zip(scores.T, relevant.T, strict=True))
    expected = [float(retrieval_reciprocal_rank(s, r)) for s, r in pairs]
    result = mean_reciprocal_rank(scores, relevant, bootstrap=0)
    np.testing.assert_allclose(result.per_target, expected, atol=1e-7)  # torchmetrics computes in float32
    assert result.mean.item() == pytest.approx(np.mean(expected), abs=1e-7)
    assert result.low.isnan()
    for k in (1, 7, N_TRAIN):
        found = [float(retrieval_recall(s, r, top_k=k)) for s, r in pairs]
        np.testing.assert_allclose(recall_at_k(scores, relevant, k).per_target, found, atol=1e-7)


def test_reciprocal_rank_equals_sorting_in_float64() -> None:
    scores, relevant = _case()
    order = scores.argsort(0, descending=True)
    first = relevant.gather(0, order).int().argmax(0)
    np.testing.assert_array_equal(mean_reciprocal_rank(scores, relevant).per_target, 1 / (first.double() + 1))


@pytest.mark.parametrize("seed", range(12))
def test_ties_are_the_mean_over_every_order(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores, relevant = torch.randint(3, (6, 1), generator=generator).double(), torch.zeros(6, 1, dtype=torch.bool)
    relevant[torch.randperm(6, generator=generator)[: 1 + seed % 4]] = True
    ranks, recalls = [], []
    for permutation in permutations(range(6)):
        order = sorted(permutation, key=lambda i: -scores[i, 0].item())  # stable: ties keep the permutation's order
        hits = relevant[list(order), 0]
        ranks.append(1 / (1 + int(hits.int().argmax())))
        recalls.append(int(hits[:2].sum()) / int(hits.sum()))
    assert mean_reciprocal_rank(scores, relevant).mean.item() == pytest.approx(np.mean(ranks), abs=1e-12)
    assert recall_at_k(scores, relevant, k=2).mean.item() == pytest.approx(np.mean(recalls), abs=1e-12)


def test_constant_scores_are_random_retrieval() -> None:
    scores, relevant = torch.zeros(50, 1), torch.arange(50).unsqueeze(1) == 7
    expected = np.mean(1 / np.arange(1, 51))
    assert mean_reciprocal_rank(scores, relevant).mean.item() == pytest.approx(expected, abs=1e-12)
    assert recall_at_k(scores, relevant, k=5).mean.item() == pytest.approx(0.1, abs=1e-12)


def test_index_lists_equal_the_mask() -> None:
    scores, relevant = _case()
    lists = [column.nonzero().flatten() for column in relevant.T]
    as_ints = [indices.tolist() for indices in lists]
    for function in (mean_reciprocal_rank, recall_at_k):
        expected = function(scores, relevant.int()).per_target
        assert torch.equal(function(scores, lists).per_target, expected)
        assert torch.equal(function(scores, as_ints).per_target, expected)


def test_interval_holds_the_mean_and_depends_on_the_seed() -> None:
    a, b, c = (mean_reciprocal_rank(*_case(), bootstrap=100, seed=seed) for seed in (0, 0, 1))
    assert (a.low, a.high) == (b.low, b.high)
    assert a.low != c.low
    assert a.low < a.mean < a.high


def test_targets_without_or_with_only_relevant_samples_are_counted_and_left_out() -> None:
    scores, relevant = _case()
    relevant[:, 2], relevant[:, 5] = False, True
    for function, name in ((mean_reciprocal_rank, "reciprocal rank"), (recall_at_k, "recall at 10")):
        with pytest.warns(
            UserWarning, match=f"{name} of 2 of 9 targets is undefined, as no training sample or every one is relevant"
        ):
            result = function(scores, relevant)
        assert result.undefined == 2
        assert result.per_target.isnan().nonzero().flatten().tolist() == [2, 5]
        assert result.mean == result.per_target.nanmean()
        assert result.low < result.mean < result.high


def test_no_defined_target_gives_nan() -> None:
    with pytest.warns(UserWarning, match="of 2 of 2 targets is undefined"):
        result = mean_reciprocal_rank(torch.ones(3, 2), [[], [0, 1, 2]])
    assert result.mean.isnan()
    assert result.low.isnan()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.ones(N_TRAIN)}, r"`scores` to be a non-empty matrix, but got shape \(40,\)\."),
        ({"scores": torch.full((N_TRAIN, N_TARGET), math.nan)}, "`scores` to be finite, but got 360 NaN"),
        (
            {"relevant": torch.ones(5, N_TARGET)},
            r"\(n_train, n_target\) = \(40, 9\) as `scores`, .* got shape \(5, 9\)",
        ),
        ({"relevant": torch.full((N_TRAIN, N_TARGET), 2)}, "`relevant` to be bool or hold only 0 and 1"),
        ({"relevant": [[0]] * 3}, "relevant samples of each of the 9 targets, but got 3 lists"),
        ({"relevant": [[0]] * 8 + [[3, 40]]}, "indices from 0 to 39, but those of target 8 run from 3 to 40"),
        ({"relevant": [[-1]] + [[0]] * 8}, "indices from 0 to 39, but those of target 0 run from -1 to -1"),
        ({"bootstrap": -1}, "`bootstrap` to be an integer >= 0"),
    ],
)
@pytest.mark.parametrize("function", [mean_reciprocal_rank, recall_at_k])
def test_bad_input(function: Any, change: dict[str, Any], message: str) -> None:
    scores, relevant = _case()
    with pytest.raises(ValueError, match=message):
        function(**({"scores": scores, "relevant": relevant} | change))


@pytest.mark.parametrize("k", [0, -1, N_TRAIN + 1])
def test_k_out_of_range(k: int) -> None:
    with pytest.raises(ValueError, match=rf"`k` to be an integer from 1 to 40, but got {k}\."):
        recall_at_k(*_case(), k=k)


def test_constructor_rejects_a_bad_k() -> None:
    with pytest.raises(ValueError, match=r"`k` of .+ to be an integer >= 1, but got 0\."):
        RecallAtK(k=0)


def test_classes_equal_functions_over_several_updates() -> None:
    scores, relevant = _case()
    for metric, expected in (
        (MeanReciprocalRank(bootstrap=50, seed=3), mean_reciprocal_rank(scores, relevant, bootstrap=50, seed=3)),
        (RecallAtK(k=7, bootstrap=50, seed=3), recall_at_k(scores, relevant, k=7, bootstrap=50, seed=3)),
    ):
        metric.update(scores[:, :4], relevant[:, :4])
        metric.update(scores[:, 4:], relevant[:, 4:])
        assert metric.compute() == expected.mean
        summary = metric.summary()
        assert torch.equal(torch.stack(summary[:3]), torch.stack(expected[:3]))
        assert torch.equal(summary.per_target, expected.per_target)
        assert pickle.loads(pickle.dumps(metric)).compute() == metric.compute()


def test_processes_are_concatenated() -> None:
    scores, relevant = _case()
    other = MeanReciprocalRank()
    other.update(scores[:, 4:], relevant[:, 4:])
    metric = MeanReciprocalRank(
        dist_sync_fn=lambda state, group: [state, other.per_target[0]], distributed_available_fn=lambda: True
    )
    metric.update(scores[:, :4], relevant[:, :4])
    assert metric.compute() == mean_reciprocal_rank(scores, relevant).mean


@pytest.mark.parametrize(
    ("metric", "label"), [(MeanReciprocalRank(), "reciprocal rank"), (RecallAtK(7), "recall at 7")]
)
def test_plot_shows_the_summary_or_a_history(metric: MeanReciprocalRank | RecallAtK, label: str) -> None:
    metric.reset()
    metric.update(*_case())
    _, ax = metric.plot()
    assert ax.get_xlabel() == label
    assert ax.get_legend_handles_labels()[1][0].startswith(f"mean {float(metric.compute()):.3f} (")
    _, ax = metric.plot([metric.compute(), metric.compute()])
    assert ax.get_ylabel() == type(metric).__name__
