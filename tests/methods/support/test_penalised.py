"""Penalised regressions, against scikit-learn and normal equations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn.linear_model import Lasso as ScikitLasso
from sklearn.linear_model import Ridge as ScikitRidge
from torch import Tensor

from lightning_attr.methods.support import lasso_path as homotopy
from lightning_attr.methods.support import penalised
from lightning_attr.methods.support.penalised import Lasso, Ridge

SHAPES = pytest.mark.parametrize(("m", "n"), [(40, 7), (15, 30), (12, 12)])
STRENGTHS = torch.tensor([0.9, 0.3, 0.05, 0.01], dtype=torch.float64)


def problem(m: int, n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(m)
    z = (torch.rand(m, n, generator=generator) < 0.5).double()
    y = z @ torch.randn(n, 4, generator=generator).double() + torch.randn(m, 4, generator=generator).double()
    return z - z.mean(0), y - y.mean(0)


@SHAPES
def test_lasso_is_that_of_scikit_learn(m: int, n: int) -> None:
    z, y = problem(m, n)
    found = Lasso(z).solve(y, STRENGTHS)
    largest = (z.T @ y).abs().amax(0) / m
    for j in range(4):
        alpha = float(STRENGTHS[j] * largest[j])
        expected = ScikitLasso(alpha=alpha, fit_intercept=False, tol=1e-12, max_iter=100_000).fit(z, y[:, j])
        torch.testing.assert_close(found[:, j], torch.from_numpy(expected.coef_), rtol=1e-4, atol=1e-5)
    assert 0 < (found[:, 0] != 0).sum() < (found[:, 3] != 0).sum()


@SHAPES
def test_lasso_satisfies_its_conditions(m: int, n: int) -> None:
    z, y = problem(m, n)
    w = Lasso(z).solve(y, STRENGTHS)
    penalty = STRENGTHS * (z.T @ y).abs().amax(0) / m
    pull = z.T @ (y - z @ w) / m
    assert (pull.abs() <= penalty * (1 + 1e-4)).all()
    torch.testing.assert_close(pull[w != 0], (penalty * w.sign())[w != 0], rtol=1e-3, atol=1e-5)


def test_the_largest_penalty_leaves_no_weight_and_a_bit_less_leaves_one() -> None:
    z, y = problem(40, 7)
    assert not Lasso(z).solve(y, torch.ones(4)).any()
    assert ((Lasso(z).solve(y, torch.full((4,), 0.999)) != 0).sum(0) == 1).all()


@SHAPES
@pytest.mark.parametrize("strength", [100.0, 1.0, 1e-3])
def test_ridge_is_that_of_scikit_learn(m: int, n: int, strength: float) -> None:
    z, y = problem(m, n)
    found = Ridge(z).solve(y, torch.full((4,), strength))
    alpha = strength * float((z.T @ z).diagonal().mean())
    expected = ScikitRidge(alpha=alpha, fit_intercept=False, solver="svd").fit(z, y).coef_.T
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-8, atol=1e-10)


@SHAPES
def test_ridge_of_no_strength_is_least_squares_of_least_norm(m: int, n: int) -> None:
    z, y = problem(m, n)
    torch.testing.assert_close(Ridge(z).solve(y, torch.zeros(4)), torch.linalg.pinv(z) @ y)


@pytest.mark.parametrize("solver", [Lasso, Ridge])
def test_constant_inputs_and_outputs_have_no_weight(solver: type[Lasso] | type[Ridge]) -> None:
    z, y = problem(40, 7)
    z[:, 2], y[:, 1] = 0, 0
    found = solver(z).solve(y, torch.full((4,), 0.1))
    assert found.isfinite().all()
    assert found[2].abs().max() < 1e-14
    assert not found[:, 1].any()
    torch.testing.assert_close(found[:, 0], solver(z).solve(y[:, :1], torch.full((1,), 0.1))[:, 0])


def test_a_lasso_that_does_not_end_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(penalised, "_SHORT", 0)
    monkeypatch.setattr(penalised, "_MOST_SWEEPS", 1)
    with pytest.raises(ArithmeticError, match="4 of 4 outputs are not fitted after 1 sweeps"):
        Lasso(problem(15, 30)[0]).solve(problem(15, 30)[1], torch.full((4,), 1e-3))


@SHAPES
@pytest.mark.parametrize("solver", [Lasso, Ridge])
def test_a_path_has_the_solution_of_each_strength(solver: type[Lasso | Ridge], m: int, n: int) -> None:
    z, y = problem(m, n)
    found = solver(z).path(y, STRENGTHS)
    assert found.shape == (n, 4, 4)
    for k, strength in enumerate(STRENGTHS):
        expected = solver(z).solve(y, strength.expand(4))
        torch.testing.assert_close(found[:, :, k], expected, rtol=1e-9, atol=1e-10)


@SHAPES
def test_following_the_solution_finds_what_descent_finds(m: int, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    z, y = problem(m, n)
    z = torch.cat([z, z[:, :2], z[:, 1:2] - z[:, 2:3]], 1)  # columns that are combinations of others
    followed = Lasso(z).path(y, STRENGTHS)
    monkeypatch.setattr(penalised, "_SHORT", 0)
    descended = Lasso(z).path(y, STRENGTHS)
    assert not torch.equal(followed, descended)
    for k, strength in enumerate(STRENGTHS):
        penalty = strength * (z.T @ y).abs().amax(0) / m
        values = [
            (y - z @ w).square().sum(0) / (2 * m) + penalty * w.abs().sum(0)
            for w in (followed[:, :, k], descended[:, :, k])
        ]
        torch.testing.assert_close(*values, rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(z @ followed[:, :, k], z @ descended[:, :, k], rtol=1e-4, atol=1e-5)


def first_weights(z: Tensor, y: Tensor) -> Any:
    """What following gives for the first output and the second strength."""
    penalties = STRENGTHS[:2] * (z.T @ y[:, 0]).abs().max() / len(z)
    return homotopy.follow(z.T.contiguous().numpy(), y[:, 0].numpy() / len(z), len(z), penalties.numpy())[:, 1]


def test_descent_finishes_what_following_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    z, y = problem(15, 30)
    strengths = STRENGTHS[:2]  # with the others, descent leaves the last digits
    expected = Lasso(z).path(y, strengths)
    monkeypatch.setattr(homotopy, "_MOST_TURNS", 0)
    assert not torch.allclose(torch.from_numpy(first_weights(z, y)), expected[:, 0, 1])
    torch.testing.assert_close(Lasso(z).path(y, strengths), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("solver", [Lasso, Ridge])
def test_outputs_that_are_all_alike_have_no_weights(solver: type[Lasso | Ridge]) -> None:
    z, y = problem(15, 30)
    assert not solver(z).path(0 * y, STRENGTHS).any()
