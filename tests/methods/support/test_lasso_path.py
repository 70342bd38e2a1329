"""Solutions of the lasso along their strengths: the conditions for a minimum, between turns and at them."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_attr.methods.support.lasso_path import follow


@pytest.mark.parametrize(("m", "n"), [(20, 8), (10, 40), (25, 25)])
@pytest.mark.parametrize("seed", range(4))
def test_conditions_hold_all_the_way(m: int, n: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    z = random.normal(size=(m, n))
    z[:, : n // 2] += random.normal(size=(m, 1))  # correlated columns, whose weights change their minds
    y = random.normal(size=m)
    largest = float(np.abs(z.T @ y).max()) / m
    penalties = largest * np.logspace(0.1, -4, 40)
    weights = follow(np.ascontiguousarray(z.T), y / m, m, penalties)
    assert not weights[:, 0].any()
    for penalty, w in zip(penalties, weights.T, strict=True):
        pull = z.T @ (y - z @ w) / m
        assert np.abs(pull).max() <= penalty * (1 + 1e-6) or penalty > largest
        np.testing.assert_allclose(pull[w != 0], penalty * np.sign(w[w != 0]), rtol=1e-6)
    came = (weights[:, 1:] != 0) & (weights[:, :-1] == 0)
    assert came.sum() >= min(m, n) - 1


def test_weights_may_leave() -> None:
    random = np.random.default_rng(0)
    z, y = random.normal(size=(10, 40)), random.normal(size=10)
    penalties = np.abs(z.T @ y).max() / 10 * np.logspace(0, -4, 200)
    weights = follow(np.ascontiguousarray(z.T), y / 10, 10, penalties)
    assert ((weights[:, 1:] == 0) & (weights[:, :-1] != 0)).any()


def test_nothing_to_explain() -> None:
    assert not follow(np.ones((3, 4)), np.zeros(4), 4, np.array([1.0, 0.0])).any()
