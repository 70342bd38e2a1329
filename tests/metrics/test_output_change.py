"""Query loss difference and tail-patch against sums written out and a model that takes the step."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_attr.metrics import QueryLossDifference, TailPatch, query_loss_difference, tail_patch

N_TARGET = 30


def _case() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(N_TARGET, generator=generator)
    return {
        "before": before,
        "method": before - 1 + 0.5 * torch.randn(3, N_TARGET, generator=generator),
        "random": before - 0.2 + 0.5 * torch.randn(5, N_TARGET, generator=generator),
    }


def test_query_loss_difference_by_hand() -> None:
    case = _case()
    before, method, random = (values.double().numpy() for values in case.values())
    rise = before - method.mean(0)  # the loss is the negative output
    chance = before - random.mean(0)
    result = query_loss_difference(**case)
    np.testing.assert_allclose(result.method, rise, atol=1e-12)
    np.testing.assert_allclose(result.random, chance, atol=1e-12)
    np.testing.assert_allclose(result.per_target, rise - chance, atol=1e-12)
    assert result.mean.item() == pytest.approx((rise - chance).mean(), abs=1e-12)
    assert 0 < result.low < result.mean < result.high


def test_tail_patch_is_the_opposite_change() -> None:
    case = _case()
    loss, output = query_loss_difference(**case, bootstrap=0), tail_patch(**case, bootstrap=0)
    assert output.mean == -loss.mean
    assert torch.equal(output.method, -loss.method)
    assert output.low.isnan()


def test_tail_patch_of_one_gradient_step_favours_the_target_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(20, 5, generator=generator, dtype=torch.float64)
    labels = torch.randn(20, generator=generator, dtype=torch.float64)
    theta = torch.zeros(5, dtype=torch.float64)

    def outputs(weights: Tensor) -> Tensor:
        return -(features @ weights - labels).square()  # negative losses

    def after_a_step_on(samples: Tensor) -> Tensor:
        steps = [theta - 0.01 * 2 * (features[i] @ theta - labels[i]) * features[i] for i in samples.tolist()]
        return torch.stack([outputs(weights)[j] for j, weights in enumerate(steps)])

    own = after_a_step_on(torch.arange(20))
    others = torch.stack([after_a_step_on(torch.arange(20).roll(shift)) for shift in (1, 5, 9)])
    result = tail_patch(outputs(theta), own, others)
    assert result.low > 0
    assert (result.method > 0).all()


def test_seeds_before_are_averaged() -> None:
    case = _case()
    shifted = torch.stack([case["before"] - 1, case["before"] + 1])
    expected = query_loss_difference(**case).per_target
    np.testing.assert_allclose(query_loss_difference(**case | {"before": shifted}).per_target, expected, atol=1e-6)


def test_the_output_before_does_not_move_the_difference() -> None:
    case = _case()
    moved = query_loss_difference(**case | {"before": torch.zeros(N_TARGET)}).per_target
    np.testing.assert_allclose(moved, query_loss_difference(**case).per_target, atol=1e-6)


@pytest.mark.parametrize("function", [query_loss_difference, tail_patch])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"before": torch.ones(2, 2, 2)}, r"`before` to be a non-empty vector, but got shape \(2, 2, 2\)\."),
        ({"method": torch.ones(3, 4)}, r"`method` to have as many targets as `before`, 30, but got shape \(3, 4\)\."),
        ({"random": torch.ones(29)}, r"`random` to have as many targets as `before`, 30, but got shape \(29,\)\."),
        ({"random": torch.ones(0, N_TARGET)}, r"`random` to be a non-empty vector, but got shape \(0, 30\)\."),
        ({"method": torch.full((2, N_TARGET), math.nan)}, "`method` to be finite, but got 60 NaN"),
        ({"before": torch.full((N_TARGET,), math.inf)}, "`before` to be finite, but got 30 NaN"),
        ({"bootstrap": -1}, "`bootstrap` to be an integer >= 0"),
    ],
)
def test_bad_input(function: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(**(_case() | change))


@pytest.mark.parametrize(("cls", "function"), [(QueryLossDifference, query_loss_difference), (TailPatch, tail_patch)])
def test_classes_equal_functions_over_several_updates(cls: Any, function: Any) -> None:
    case = _case()
    metric = cls(bootstrap=50, confidence=0.8, seed=3)
    metric.update(**{name: values[..., :10] for name, values in case.items()})
    metric.update(**{name: values[..., 10:] for name, values in case.items()})
    expected = function(**case, bootstrap=50, confidence=0.8, seed=3)
    assert metric.compute() == expected.mean
    assert all(torch.equal(a, b) for a, b in zip(metric.summary(), expected, strict=True))
    assert pickle.loads(pickle.dumps(metric)).compute() == metric.compute()


def test_processes_are_concatenated() -> None:
    case = _case()
    other = TailPatch()
    other.update(**{name: values[..., 10:] for name, values in case.items()})
    metric = TailPatch(
        dist_sync_fn=lambda state, group: [state, other.changes[0]], distributed_available_fn=lambda: True
    )
    metric.update(**{name: values[..., :10] for name, values in case.items()})
    assert metric.compute() == tail_patch(**case).mean


@pytest.mark.parametrize("cls", [QueryLossDifference, TailPatch])
def test_plot_shows_the_summary_or_a_history(cls: Any) -> None:
    metric = cls(bootstrap=20)
    metric.update(**_case())
    _, ax = metric.plot()
    labels = ax.get_legend_handles_labels()[1]
    assert labels[2].startswith(f"mean difference {float(metric.compute()):.3f} (")
    assert ax.get_xlabel() == f"{metric.label}, random samples"
    _, ax = metric.plot([metric.compute(), metric.compute()])
    assert ax.get_ylabel() == cls.__name__
