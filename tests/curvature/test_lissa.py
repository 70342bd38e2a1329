from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_attr.curvature.explicit import factor
from lightning_attr.curvature.lissa import lissa, lissa_iterations
from lightning_attr.errors import DivergenceError

DOUBLE = torch.float64


def problem(size: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(2 * size, size, dtype=DOUBLE, generator=generator)
    return half.T @ half / (2 * size), torch.randn(3, size, dtype=DOUBLE, generator=generator)


@pytest.mark.parametrize("scale", [3.0, 8.0])
@pytest.mark.parametrize("damping", [0.2, 1.0])
def test_the_limit_is_the_damped_inverse_whatever_the_scale(scale: float, damping: float) -> None:
    matrix, rhs = problem()
    values = lissa(lambda rows: rows @ matrix, rhs, scale=scale, damping=damping, iterations=1500)
    torch.testing.assert_close(values, factor(matrix, damping).solve(rhs), rtol=1e-6, atol=1e-6)


def test_the_default_number_of_steps_leaves_little() -> None:
    matrix, rhs = torch.diag(torch.tensor([0.0, 3.0], dtype=DOUBLE)), torch.ones(1, 2, dtype=DOUBLE)
    values = lissa(lambda rows: rows @ matrix, rhs, scale=4.0, damping=0.1)
    assert 0.992 < values[0, 0] / 10 < 0.995  # 1 - exp(-5) along the direction that converges last
    assert lissa_iterations(4.0, 0.1) == 200
    assert lissa_iterations(1e6, 1e-300) == 5000


def test_several_rows_equal_one_by_one_and_are_left_alone() -> None:
    matrix, rhs = problem()
    before = rhs.clone()
    solve = lambda rows: lissa(lambda r: r @ matrix, rows, scale=4.0, damping=0.1, iterations=50)  # noqa: E731  # short
    torch.testing.assert_close(solve(rhs), torch.cat([solve(row[None]) for row in rhs]), rtol=1e-12, atol=1e-14)
    assert torch.equal(rhs, before)


def test_repeats_average_over_random_batches() -> None:
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(200, 6, dtype=DOUBLE, generator=generator)
    matrix, rhs = data.T @ data / 200, torch.randn(1, 6, dtype=DOUBLE, generator=generator)
    exact = factor(matrix, 0.5).solve(rhs)

    def product(rows: Tensor) -> Tensor:
        batch = data[torch.randperm(200, generator=generator)[:32]]
        return rows @ batch.T @ batch / 32

    errors = [
        (lissa(product, rhs, scale=6.0, damping=0.5, iterations=100, repeats=repeats) - exact).norm() / exact.norm()
        for repeats in (1, 100)
    ]
    assert errors[1] < 0.03 < errors[0] < 0.3


@pytest.mark.parametrize(
    "matrix", [torch.diag(torch.tensor([1.0, 5.0])), torch.diag(torch.tensor([1.0, -0.5])), 1e30 * torch.eye(2)]
)
@pytest.mark.parametrize("rhs", [torch.ones(2, 2), torch.tensor([[0.0, 0.0], [1e-3, 1e-3]])])
def test_growing_estimates_are_an_error(matrix: Tensor, rhs: Tensor) -> None:
    rows = r"\[0, 1\]" if rhs[0].any() else r"\[1\]"
    with pytest.raises(DivergenceError, match=rf"LiSSA diverges: after \d+ steps .* sides {rows} .* `scale` \(now 2\)"):
        lissa(lambda rows: rows @ matrix, rhs, scale=2.0, damping=0.0, iterations=1000)


def test_no_false_alarm_at_the_edge() -> None:
    """Without damping the estimates of null directions grow by |v| a step, and the highest may change its sign."""
    matrix = torch.diag(torch.tensor([0.0, 2.0, 1e-9], dtype=DOUBLE))
    values = lissa(lambda rows: rows @ matrix, torch.ones(1, 3, dtype=DOUBLE), scale=1.0, damping=0.0, iterations=2000)
    assert values.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": 0.0}, "`scale` to be a positive number, but got 0.0"),
        ({"damping": -1.0}, "`damping` to be a number >= 0, but got -1.0"),
        ({"iterations": 0}, "`iterations` to be a positive integer, but got 0"),
        ({"repeats": 0}, "`repeats` to be a positive integer, but got 0"),
        ({"rhs": torch.ones(2)}, "`rhs` to be a floating-point matrix"),
        ({"product": lambda rows: rows * float("nan")}, "product with the curvature to be finite"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    good = {"product": lambda rows: rows, "rhs": torch.ones(1, 2), "scale": 2.0, "damping": 0.0}
    with pytest.raises(ValueError, match=message):
        lissa(**{**good, **arguments})
