"""Reliability of measurements: signal to noise and ceilings against definitions and synthetic truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_attr.metrics.correlation import correlation_score, linear_ceiling, rank_ceiling, signal_to_noise


def _measured(seeds: int, m: int = 100, n_target: int = 60, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seeds)
    signal = torch.randn(m, n_target, generator=generator, dtype=torch.float64)
    return signal, signal + noise * torch.randn(seeds, m, n_target, generator=generator, dtype=torch.float64)


def test_signal_to_noise_is_the_f_statistic_of_rows() -> None:
    _, measured = _measured(3, m=8, n_target=5)
    for j, value in enumerate(signal_to_noise(measured)):
        table = measured[:, :, j].numpy()
        rows, seeds, mean = table.mean(0), table.mean(1), table.mean()
        between = 3 * ((rows - mean) ** 2).sum() / 7
        within = sum((table[r, i] - rows[i] - seeds[r] + mean) ** 2 for r in range(3) for i in range(8)) / 14
        assert value.item() == pytest.approx(between / within)


def test_signal_to_noise_of_known_variances() -> None:
    _, measured = _measured(4, m=400, noise=2.0)
    assert signal_to_noise(measured).mean().item() == pytest.approx(1 + 4 * 1 / 4, rel=0.05)
    noise = torch.randn(4, 400, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert signal_to_noise(noise).mean().item() == pytest.approx(1, rel=0.05)


def test_signal_to_noise_leaves_out_what_a_seed_adds_to_all_rows() -> None:
    _, measured = _measured(3)
    shifted = measured + torch.tensor([1.0, 20.0, -7.0]).reshape(3, 1, 1)
    np.testing.assert_allclose(signal_to_noise(shifted), signal_to_noise(measured), rtol=1e-9)


def test_signal_to_noise_at_its_limits() -> None:
    signal, measured = _measured(2, m=10, n_target=3)
    assert signal_to_noise(measured[:1]).isnan().all()
    assert signal_to_noise(torch.full((2, 10, 3), 0.1).double()).isnan().all()
    assert (signal_to_noise(signal.expand(2, 10, 3)) > 1e20).all()


@pytest.mark.parametrize("seeds", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["pearson", "spearman"])
def test_ceiling_is_what_the_exact_expectation_reaches(kind: str, seeds: int) -> None:
    signal, measured = _measured(seeds)
    score = correlation_score(signal, measured, kind, bootstrap=0, confidence=0.95, seed=0)  # type: ignore[arg-type]
    assert score.ceiling.item() == pytest.approx(score.mean.item(), abs=0.02)


def test_ceilings_of_noise_are_low_and_of_one_seed_unknown() -> None:
    noise = torch.randn(4, 100, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert linear_ceiling(noise) < 0.15
    assert rank_ceiling(noise) < 0.15
    assert linear_ceiling(torch.stack([noise[0], -noise[0]])) == 0
    assert linear_ceiling(noise[:1]).isnan()
    assert rank_ceiling(noise[:1]).isnan()


def test_linear_ceiling_by_hand() -> None:
    _, measured = _measured(3, m=30, n_target=4)
    expected = math.sqrt(float((1 - 1 / signal_to_noise(measured)).mean()))
    assert linear_ceiling(measured).item() == pytest.approx(expected)
