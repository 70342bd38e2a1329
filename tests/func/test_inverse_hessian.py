from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_attr.errors import DivergenceError, NegativeCurvatureError
from lightning_attr.func import (
    ihvp_arnoldi,
    ihvp_at_x_arnoldi,
    ihvp_at_x_cg,
    ihvp_at_x_explicit,
    ihvp_at_x_lissa,
    ihvp_cg,
    ihvp_explicit,
    ihvp_lissa,
)

peer = pytest.importorskip("dattri.func.hessian")

DOUBLE = torch.float64
RIDGE = 0.1
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(40, 5, dtype=DOUBLE, generator=GENERATOR)
Y = (X.sum(1) + torch.randn(40, dtype=DOUBLE, generator=GENERATOR) > 0).to(DOUBLE)
V = torch.randn(4, 5, dtype=DOUBLE, generator=GENERATOR)

Inverse = Callable[..., Any]
PAIRS: dict[str, tuple[Inverse, Inverse, dict[str, Any]]] = {
    "explicit": (ihvp_explicit, ihvp_at_x_explicit, {}),
    "cg": (ihvp_cg, ihvp_at_x_cg, {"tolerance": 0.0}),
    "lissa": (ihvp_lissa, ihvp_at_x_lissa, {"iterations": 120}),
    "arnoldi": (ihvp_arnoldi, ihvp_at_x_arnoldi, {}),
}


def logistic(theta: Tensor, x: Tensor, y: Tensor, weights: Tensor | None = None) -> Tensor:
    losses = F.binary_cross_entropy_with_logits(x @ theta, y, weight=weights, reduction="none")
    return losses.mean() + RIDGE / 2 * theta.square().sum()


def ridge(theta: Tensor, x: Tensor, y: Tensor, weights: Tensor | None = None) -> Tensor:
    losses = (x @ theta - y) ** 2 / 2
    return (losses if weights is None else weights * losses).mean() + RIDGE / 2 * theta.square().sum()


def fit(loss: Callable[..., Tensor], weights: Tensor | None = None) -> Tensor:
    """Newton's method, far beyond convergence."""
    theta = torch.zeros(5, dtype=DOUBLE)
    for _ in range(15):
        function = lambda t: loss(t, X, Y, weights)  # noqa: E731  # short
        gradient = torch.autograd.functional.jacobian(function, theta)
        theta = theta - torch.linalg.solve(torch.autograd.functional.hessian(function, theta), gradient)
    return theta


def inverse_of(loss: Callable[..., Tensor], theta: Tensor, damping: float = 0.0) -> Tensor:
    hessian = torch.autograd.functional.hessian(lambda t: loss(t, X, Y), theta)
    return torch.linalg.inv(hessian + damping * torch.eye(5, dtype=DOUBLE))


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_all_equal_the_inverse(name: str, damping: float) -> None:
    of_x, at_x, settings = PAIRS[name]
    theta = torch.linspace(-1, 1, 5, dtype=DOUBLE)
    expected = V @ inverse_of(logistic, theta, damping)
    found = of_x(logistic, damping=damping, **settings)((theta, X, Y), V)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    solve = at_x(logistic, theta, X, Y, damping=damping, **settings)
    for _ in range(2):
        torch.testing.assert_close(solve(V), found, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(torch.stack([solve(v) for v in V]), found, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", PAIRS)
def test_dicts_equal_tensors_wherever_they_stand(name: str) -> None:
    of_x, _, settings = PAIRS[name]
    theta = torch.linspace(-1, 1, 5, dtype=DOUBLE)

    def of_dict(x: Tensor, p: dict[str, Tensor], y: Tensor) -> Tensor:
        return logistic(torch.cat([p["a"].flatten(), p["b"]]), x, y)

    point = {"a": theta[:4].reshape(2, 2), "b": theta[4:]}
    found = of_x(of_dict, 1, **settings)((X, point, Y), {"a": V[:, :4].reshape(4, 2, 2), "b": V[:, 4:]})
    expected = of_x(logistic, **settings)((theta, X, Y), V)
    torch.testing.assert_close(torch.cat([found["a"].flatten(1), found["b"]], 1), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("loss", [ridge, logistic])
def test_influence_is_the_derivative_of_a_refit(name: str, loss: Callable[..., Tensor]) -> None:
    """d theta / d w_i = -(1/n) H^-1 g_i, where theta minimises (1/n) sum w_i l_i + ridge."""
    theta, step = fit(loss), 1e-4
    of_x, _, settings = PAIRS[name]
    for i in (0, 7):
        sides = []
        for sign in (1, -1):
            weights = torch.ones(40, dtype=DOUBLE)
            weights[i] += sign * step
            sides.append(fit(loss, weights))
        without = torch.ones(40, dtype=DOUBLE)
        without[i] = 0
        gradient = 40 * torch.autograd.functional.jacobian(
            lambda t, without=without: loss(t, X, Y) - loss(t, X, Y, without), theta
        )
        found = -of_x(loss, **settings)((theta, X, Y), gradient) / 40
        torch.testing.assert_close(found, (sides[0] - sides[1]) / (2 * step), rtol=1e-6, atol=1e-8)


def test_the_same_as_dattri() -> None:
    theta = torch.linspace(-1, 1, 5, dtype=DOUBLE)
    x = (theta, X, Y)
    close = {"rtol": 1e-6, "atol": 1e-8}
    expected = peer.ihvp_explicit(logistic, regularization=0.3)(x, V)
    torch.testing.assert_close(ihvp_explicit(logistic, damping=0.3)(x, V), expected, **close)
    torch.testing.assert_close(
        ihvp_at_x_cg(logistic, *x, damping=0.3)(V),
        peer.ihvp_at_x_cg(logistic, *x, max_iter=5, regularization=0.3)(V),
        rtol=1e-4,
        atol=1e-5,
    )
    # dattri's damping is a share of its scale.
    expected = peer.ihvp_lissa(logistic, batch_size=40, recursion_depth=30, damping=0.1, scaling=3.0)(
        x, V, in_dims=(None, 0, 0)
    )
    torch.testing.assert_close(ihvp_lissa(logistic, damping=0.3, scale=3.0, iterations=30)(x, V), expected, **close)
    expected = peer.ihvp_at_x_arnoldi(lambda t: logistic(t, X.float(), Y.float()), theta.float(), max_iter=6, top_k=5)(
        V.float()
    )
    torch.testing.assert_close(ihvp_arnoldi(logistic)(x, V).float(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_lissa_with_batches_is_near_and_repeatable() -> None:
    theta = torch.zeros(5, dtype=DOUBLE)
    exact = V[:1] @ inverse_of(logistic, theta, 0.3)
    settings = {"damping": 0.3, "batch_size": 20, "iterations": 40, "scale": 4.0}
    errors = []
    for repeats in (1, 15):
        solve = ihvp_at_x_lissa(logistic, theta, X, Y, repeats=repeats, **settings)
        assert torch.equal(solve(V[:1]), solve(V[:1]))
        errors.append(((solve(V[:1]) - exact).norm() / exact.norm()).item())
    assert errors[1] < errors[0] / 2 < 0.2
    other = ihvp_lissa(logistic, seed=1, **settings)((theta, X, Y), V[:1])
    assert not torch.equal(other, ihvp_lissa(logistic, **settings)((theta, X, Y), V[:1]))


def test_arnoldi_keeps_the_strongest() -> None:
    inverse = ihvp_at_x_arnoldi(lambda w: (w**2 * torch.tensor([1.0, 2.0, -4.0, 8.0])).sum(), torch.zeros(4), top_k=2)
    torch.testing.assert_close(inverse(torch.ones(4)), torch.tensor([0, 0, -1 / 8, 1 / 16]), rtol=1e-4, atol=1e-6)


def saddle(theta: Tensor) -> Tensor:
    return theta[0] ** 2 - theta[1] ** 2


def test_bad_curvature(caplog: pytest.LogCaptureFixture) -> None:
    x, v = (torch.zeros(2),), torch.ones(2)
    with pytest.raises(NegativeCurvatureError, match="The curvature is not positive along"):
        ihvp_cg(saddle)(x, v)
    with pytest.raises(DivergenceError, match="LiSSA diverges"):
        ihvp_lissa(saddle)(x, v)
    with pytest.raises(NegativeCurvatureError, match="None of the 2 eigenvalues"):
        ihvp_arnoldi(lambda theta: -theta.square().sum())(x, v)
    assert ihvp_explicit(saddle)(x, v).tolist() == [0.5, -0.5]
    assert "1 of 2 eigenvalues of the damped curvature are negative" in caplog.text
    for singular in (lambda t: t[0] ** 2, lambda t: t.sum(), lambda t: (t[0] + t[1]) ** 2):
        with pytest.raises(ValueError, match=r"curvature of 2 parameters is singular with `damping=0.0`"):
            ihvp_explicit(singular)(x, v)
        with pytest.raises(NegativeCurvatureError):
            ihvp_cg(singular)(x, torch.tensor([1.0, 0.0]) if singular(torch.ones(2)) > 3 else torch.tensor([0.0, 1.0]))


def test_what_is_not_solved_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        ihvp_cg(logistic, max_iterations=1)((torch.zeros(5, dtype=DOUBLE), X, Y), V)
    assert "4 of 4 systems are not solved to 1e-05 after 1 iterations" in caplog.text


@pytest.mark.parametrize("name", PAIRS)
def test_bad_arguments(name: str) -> None:
    of_x, _, settings = PAIRS[name]
    x = (torch.zeros(5, dtype=DOUBLE), X, Y)
    with pytest.raises(ValueError, match=r"`damping` of .+ to be a finite number >= 0, but got -1"):
        of_x(logistic, damping=-1.0, **settings)(x, V)
    with pytest.raises(TypeError, match="`x` to be a tuple of the function's arguments"):
        of_x(logistic, **settings)(x[0], V)
    with pytest.raises(ValueError, match=r"finite right-hand sides, but the rows \[0, 1, 2, 3\]"):
        of_x(logistic, **settings)(x, V / 0)


def test_bad_settings() -> None:
    x = (torch.zeros(5, dtype=DOUBLE), X, Y)
    with pytest.raises(ValueError, match=r"`top_k` of .+ to be an integer >= 1, but got 0"):
        ihvp_arnoldi(logistic, top_k=0)(x, V)
    for size in (0, 41):
        with pytest.raises(ValueError, match=f"`batch_size` of ihvp_.*, but got {size}"):
            ihvp_lissa(logistic, batch_size=size)(x, V)
