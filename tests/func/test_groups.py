from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_attr.func import group_influence

DOUBLE = torch.float64
RIDGE = 0.3
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(30, 4, dtype=DOUBLE, generator=GENERATOR)
Y = X.sum(1) + torch.randn(30, dtype=DOUBLE, generator=GENERATOR)
U = torch.randn(3, 4, dtype=DOUBLE, generator=GENERATOR)
GROUPS = [[0], [1, 2, 3, 4, 5], list(range(6, 18))]


def loss(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return (theta @ x - y) ** 2 / 2


def fit(kept: list[int]) -> Tensor:
    x, y = X[kept], Y[kept]
    return torch.linalg.solve(x.T @ x + 30 * RIDGE * torch.eye(4, dtype=DOUBLE), x.T @ y)


def removed() -> Tensor:
    everything = list(range(30))
    return torch.stack([U @ (fit(everything) - fit([i for i in everything if i not in g])) for g in GROUPS])


def predicted(order: int) -> Tensor:
    return group_influence(loss, order=order, damping=RIDGE)((fit(list(range(30))), X, Y), GROUPS, U)


def test_exact_for_ridge_regression() -> None:
    torch.testing.assert_close(predicted(200), removed(), rtol=1e-10, atol=1e-10)
    errors = [(predicted(order) - removed()).norm().item() for order in (1, 2, 3)]
    assert errors == sorted(errors, reverse=True)


def test_dicts_and_one_vector() -> None:
    x = ({"a": fit(list(range(30)))[:1], "b": fit(list(range(30)))[1:]}, X, Y)
    influence = group_influence(lambda p, x, y: loss(torch.cat([p["a"], p["b"]]), x, y), order=2, damping=RIDGE)
    torch.testing.assert_close(influence(x, GROUPS, {"a": U[:, :1], "b": U[:, 1:]}), predicted(2))
    torch.testing.assert_close(influence(x, GROUPS, {"a": U[1, :1], "b": U[1, 1:]}), predicted(2)[:, 1])


@pytest.mark.parametrize("group", [[], [30], [-1], [1, 1]])
def test_bad_groups(group: list[int]) -> None:
    with pytest.raises(ValueError, match="`groups` to name at least one of the 30 samples by its position"):
        group_influence(loss)((U[0], X, Y), [[0], group], U)


def test_bad_curvature() -> None:
    with pytest.raises(ValueError, match=r"singular with `damping=0.0`"):
        group_influence(loss)((U[0], X[:3], Y[:3]), [[0]], U)
