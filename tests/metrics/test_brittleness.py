"""Brittleness against loops over targets."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor

from lightning_attr.metrics import BrittlenessCurve, brittleness_curve

COUNTS, N_TARGET = [5, 10, 20], 40


def _case(seeds: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shift = torch.tensor([0.5, 0.0, -0.5]).unsqueeze(1)
    arms = {"method": shift, "random": shift + 1.5, "same_class": shift + 0.8}
    before = torch.randn(N_TARGET, generator=generator) + 1
    return {"before": before} | {
        name: move + torch.randn(seeds, 3, N_TARGET, generator=generator) for name, move in arms.items()
    }


@pytest.mark.parametrize("seeds", [1, 4, 5])
def test_curves_by_loops(seeds: int) -> None:
    case = _case(seeds)
    curve = brittleness_curve(COUNTS, **case)
    right = [j for j in range(N_TARGET) if case["before"][j] > 0]
    assert curve.undefined == N_TARGET - len(right) > 0
    assert curve.counts.tolist() == COUNTS
    for arm in ("method", "random", "same_class"):
        flips = {j: [int((case[arm][:, i, j] <= 0).sum()) > seeds / 2 for i in range(3)] for j in right}
        np.testing.assert_allclose(curve.success[arm], np.mean(list(flips.values()), axis=0), atol=1e-12)
        for j in range(N_TARGET):
            if j not in flips:
                assert curve.smallest[arm][j].isnan()
            else:
                assert curve.smallest[arm][j] == min((COUNTS[i] for i in range(3) if flips[j][i]), default=math.inf)


def test_intervals_are_wilsons() -> None:
    curve = brittleness_curve(COUNTS, **_case())
    n = N_TARGET - curve.undefined
    for i in range(3):
        share = curve.success["method"][i].item()
        expected = binomtest(round(share * n), n).proportion_ci(method="wilson")
        ends = [curve.low["method"][i].item(), curve.high["method"][i].item()]
        assert ends == pytest.approx([expected.low, expected.high], abs=1e-12)


def test_flips_that_are_not_monotone_count_at_their_smallest() -> None:
    after = torch.tensor([[-1.0], [1.0], [-1.0]])
    curve = brittleness_curve(COUNTS, torch.ones(1), after)
    assert curve.success["method"].tolist() == [1, 0, 1]
    assert curve.smallest["method"].tolist() == [5]
    assert set(curve.success) == {"method"}


def test_half_of_the_retrainings_is_no_majority_and_zero_is_wrong() -> None:
    after = torch.tensor([[[1.0, 0.0]], [[-1.0, 0.0]]])
    assert brittleness_curve([1], torch.ones(2), after).smallest["method"].tolist() == [math.inf, 1]


def test_booleans_say_who_is_right() -> None:
    case = _case()
    signs = {name: values > 0 for name, values in case.items()}
    expected, curve = brittleness_curve(COUNTS, **case), brittleness_curve(torch.tensor(COUNTS), **signs)
    assert torch.equal(curve.success["method"], expected.success["method"])
    assert curve.undefined == expected.undefined


def test_seeds_before_vote_too() -> None:
    before = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    assert brittleness_curve([1], before, -torch.ones(1, 2)).smallest["method"].nan_to_num(7).tolist() == [1, 7]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": [10, 5, 20]}, r"`counts` to hold ascending positive integers, but got \[10, 5, 20\]\."),
        ({"counts": [0, 5, 20]}, r"ascending positive integers, but got \[0, 5, 20\]\."),
        ({"counts": [0.1, 0.5, 0.7]}, "ascending positive integers"),
        ({"counts": []}, r"ascending positive integers, but got \[\]\."),
        ({"before": torch.ones(1, 1, 1)}, r"`before` to have shape \(n_target,\) or .* but got \(1, 1, 1\)\."),
        ({"method": torch.ones(2, N_TARGET)}, r"`method` to have shape \(k, n_target\) = \(3, 40\) .* got \(2, 40\)\."),
        ({"random": torch.ones(3, 4)}, r"`random` to have shape \(k, n_target\) = \(3, 40\) .* but got \(3, 4\)\."),
        ({"same_class": torch.full((3, N_TARGET), math.nan)}, "`same_class` to be finite, but got 120 NaN"),
        ({"before": torch.full((N_TARGET,), math.nan)}, "`before` to be finite, but got 40 NaN"),
        ({"before": -torch.ones(N_TARGET)}, "to have a positive output before any removal, but all 40 of arm `method`"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        brittleness_curve(**({"counts": COUNTS} | _case() | change))


def _filled(case: dict[str, Tensor], *parts: slice, **options: Any) -> BrittlenessCurve:
    metric = BrittlenessCurve(COUNTS, **options)
    for part in parts:
        for arm in ("random", "method", "same_class"):
            metric.update(case["before"][part], case[arm][..., part], arm)
    return metric


def test_class_equals_function_over_several_updates() -> None:
    case = _case()
    metric, expected = _filled(case, slice(0, 9), slice(9, None)), brittleness_curve(COUNTS, **case)
    result, summary = metric.compute(), metric.summary()
    assert list(result) == ["counts", "method", "random", "same_class"]
    for arm, success in expected.success.items():
        assert torch.equal(result[arm], success)
        assert torch.equal(summary.low[arm], expected.low[arm])
        assert torch.equal(summary.smallest[arm].nan_to_num(-1), expected.smallest[arm].nan_to_num(-1))
    assert summary.undefined == expected.undefined
    assert torch.equal(pickle.loads(pickle.dumps(metric)).compute()["method"], result["method"])


def test_class_rejects_bad_arguments_and_needs_the_method() -> None:
    with pytest.raises(ValueError, match="`counts` to hold ascending positive integers"):
        BrittlenessCurve([3, 3])
    case, metric = _case(), BrittlenessCurve(COUNTS)
    with pytest.raises(ValueError, match=r"`arm` of .+ to be .+, but got 'loss'\."):
        metric.update(case["before"], case["method"], "loss")
    with pytest.raises(ValueError, match=r"`after` to have shape \(k, n_target\) = \(3, 40\)"):
        metric.update(case["before"], case["method"][:, :2])
    assert metric.flipped == metric.arm == []
    metric.update(case["before"], case["random"], "random")
    with pytest.raises(ValueError, match=r"Expected an arm `method`, but got \['random'\]\."):
        metric.compute()


def test_processes_are_concatenated() -> None:
    case = _case()
    other = _filled(case, slice(9, None))
    gathered = iter([torch.cat(other.flipped), torch.cat(other.arm)])
    metric = _filled(
        case,
        slice(0, 9),
        dist_sync_fn=lambda state, group: [state, next(gathered)],
        distributed_available_fn=lambda: True,
    )
    assert torch.equal(metric.compute()["random"], brittleness_curve(COUNTS, **case).success["random"])


def test_plot_draws_every_arm() -> None:
    metric = _filled(_case(), slice(None))
    _, ax = metric.plot()
    assert ax.get_legend_handles_labels()[1] == ["method", "random", "same class"]
    _, again = metric.plot(metric.summary(), ax=ax)
    assert again is ax
