"""Precision of noisy-label detection against scikit-learn and random orders."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import precision_recall_curve
from torch import Tensor

from lightning_attr.metrics import noisy_label_precision, noisy_label_precision_curve, noisy_label_recall_curve


def _samples(ties: bool, n: int = 60) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(n, generator=generator, dtype=torch.float64)
    return values.mul(2).round() if ties else values, torch.rand(n, generator=generator) < 0.3


@pytest.mark.parametrize("ties", [False, True])
def test_precision_and_recall_equal_scikit_learn_at_every_threshold(ties: bool) -> None:
    values, noisy = _samples(ties)
    precision, recall, thresholds = precision_recall_curve(noisy.numpy(), values.numpy())
    taken = [int((values >= threshold).sum()) for threshold in thresholds]  # samples inspected, ties with their last
    ours, (_, found) = noisy_label_precision_curve(values, noisy), noisy_label_recall_curve(values, noisy)
    np.testing.assert_allclose(ours[0][[n - 1 for n in taken]], np.array(taken) / 60)
    np.testing.assert_allclose(ours[1][[n - 1 for n in taken]], precision[:-1], atol=1e-14)
    np.testing.assert_allclose(found[taken], recall[:-1], atol=1e-14)


def test_ties_are_the_mean_over_random_orders() -> None:
    values, noisy = torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0]), torch.tensor([False, True, False, True, True])
    generator, total = torch.Generator().manual_seed(0), torch.zeros(5, dtype=torch.float64)
    for _ in range(3000):
        order = (values + 0.1 * torch.rand(5, generator=generator)).argsort(descending=True)
        total += noisy[order].cumsum(0) / torch.arange(1, 6)
    np.testing.assert_allclose(noisy_label_precision_curve(values, noisy)[1], total / 3000, atol=0.02)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("fraction", [0.05, 0.25, 1.0])
def test_precision_is_a_point_of_the_curve(ties: bool, fraction: float) -> None:
    values, noisy = _samples(ties)
    _, precision = noisy_label_precision_curve(values, noisy.int())
    at = round(fraction * 60) - 1
    assert noisy_label_precision(values, noisy, fraction).item() == pytest.approx(precision[at].item(), abs=1e-14)


def test_constant_values_are_as_precise_as_chance() -> None:
    _, noisy = _samples(ties=False)
    _, precision = noisy_label_precision_curve(torch.ones(60), noisy)
    np.testing.assert_allclose(precision, np.full(60, noisy.double().mean()), atol=1e-14)


@pytest.mark.parametrize(
    ("values", "mask", "message"),
    [
        (torch.ones(3), torch.tensor([1, 0]), "to have the same length, but got 3 and 2"),
        (torch.tensor([math.nan, 1.0]), torch.tensor([1, 0]), "`self_influence` to be finite, but got 1 NaN"),
        (torch.ones(3), torch.ones(3), "to mark some samples and leave others clean, but got 3 marked out of 3"),
        (torch.ones(3), torch.zeros(3), "to mark some samples and leave others clean, but got 0 marked out of 3"),
        (torch.ones(3), torch.tensor([0, 1, 2]), "`noise_mask` to be bool or hold only 0 and 1"),
    ],
)
def test_bad_input(values: Tensor, mask: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        noisy_label_precision_curve(values, mask)
    with pytest.raises(ValueError, match=message):
        noisy_label_precision(values, mask)


def test_bad_fraction() -> None:
    with pytest.raises(ValueError, match=r"`fraction` to be a number in \(0, 1\], but got 1\.5\."):
        noisy_label_precision(*_samples(ties=False), fraction=1.5)
