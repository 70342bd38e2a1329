from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_attr.curvature.groups import group_influence

DOUBLE = torch.float64
RIDGE = 0.3


def problem() -> tuple[Tensor, Tensor, Tensor, list[list[int]]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 4, dtype=DOUBLE, generator=generator)
    y = x @ torch.ones(4, dtype=DOUBLE) + torch.randn(30, dtype=DOUBLE, generator=generator)
    return x, y, torch.randn(3, 4, dtype=DOUBLE, generator=generator), [[0], [1, 2, 3, 4, 5], list(range(6, 18))]


def fit(x: Tensor, y: Tensor) -> Tensor:
    """The minimum of sum (x theta - y)^2 / 2 + 30 RIDGE |theta|^2 / 2, whatever was removed."""
    return torch.linalg.solve(x.T @ x + 30 * RIDGE * torch.eye(4, dtype=DOUBLE), x.T @ y)


def predicted(order: int) -> Tensor:
    x, y, u, groups = problem()
    theta = fit(x, y)
    inverse = torch.linalg.inv(x.T @ x + 30 * RIDGE * torch.eye(4, dtype=DOUBLE))
    sums = torch.stack([(x[g] * (x[g] @ theta - y[g])[:, None]).sum(0) for g in groups])
    blocks = torch.stack([x[g].T @ x[g] for g in groups])
    return group_influence(
        lambda rows: rows @ inverse,
        sums,
        u,
        order=order,
        group_product=lambda rows: torch.einsum("mp,mpq->mq", rows, blocks),
    )


def removed() -> Tensor:
    """m(S) - m(S \\ U), by fitting again."""
    x, y, u, groups = problem()
    rows = []
    for g in groups:
        kept = [i for i in range(30) if i not in g]
        rows.append(u @ (fit(x, y) - fit(x[kept], y[kept])))
    return torch.stack(rows)


def test_the_whole_series_is_exact_for_ridge_regression() -> None:
    torch.testing.assert_close(predicted(200), removed(), rtol=1e-12, atol=1e-12)


def test_every_order_is_better_than_the_one_before() -> None:
    errors = [(predicted(order) - removed()).norm().item() for order in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < errors[0] / 1.5


def test_first_order_adds_up_over_samples() -> None:
    x, y, u, groups = problem()
    inverse = torch.linalg.inv(x.T @ x + 30 * RIDGE * torch.eye(4, dtype=DOUBLE))
    single = group_influence(lambda rows: rows @ inverse, x * (x @ fit(x, y) - y)[:, None], u)
    torch.testing.assert_close(predicted(1), torch.stack([single[g].sum(0) for g in groups]), rtol=1e-12, atol=1e-14)


def test_bad_arguments() -> None:
    rows = torch.ones(1, 2)
    with pytest.raises(ValueError, match="`order` to be a positive integer, but got 0"):
        group_influence(torch.clone, rows, rows, order=0)
    with pytest.raises(ValueError, match="`group_product` for `order=2`, but got None"):
        group_influence(torch.clone, rows, rows, order=2)
    with pytest.raises(ValueError, match="`rhs` to be a floating-point matrix"):
        group_influence(torch.clone, rows[0], rows)
