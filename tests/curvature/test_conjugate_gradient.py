from __future__ import annotations

import pickle
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lightning_attr.curvature.conjugate_gradient import conjugate_gradient
from lightning_attr.curvature.explicit import factor
from lightning_attr.errors import NegativeCurvatureError

DOUBLE = torch.float64


def times(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda rows: rows @ matrix


def problem(size: int = 30, count: int = 4, lowest: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(size, size, dtype=DOUBLE, generator=generator))[0]
    matrix = q * torch.linspace(lowest, 20, size, dtype=DOUBLE) @ q.T
    return (matrix + matrix.T) / 2, torch.randn(count, size, dtype=DOUBLE, generator=generator)


def test_p_iterations_equal_the_explicit_solution() -> None:
    matrix, rhs = problem()
    solution = conjugate_gradient(times(matrix), rhs, tolerance=0, max_iterations=30)
    torch.testing.assert_close(solution.values, factor(matrix).solve(rhs), rtol=1e-8, atol=1e-8)


def test_the_error_shrinks_in_the_norm_of_the_curvature() -> None:
    matrix, rhs = problem()
    exact = factor(matrix).solve(rhs)
    errors = []
    for iterations in range(1, 20):
        error = conjugate_gradient(times(matrix), rhs, tolerance=0, max_iterations=iterations).values - exact
        errors.append(((error @ matrix) * error).sum(1))
    assert all((after < before).all() for before, after in pairwise(errors))


def test_residuals_and_iterations_are_what_they_say() -> None:
    matrix, rhs = problem()
    rhs[2] = torch.linalg.eigh(matrix)[1][:, 3]  # solved in one step
    rhs[3] = 0
    solution = conjugate_gradient(times(matrix), rhs, tolerance=1e-6)
    left = (rhs - solution.values @ matrix).norm(dim=1)
    torch.testing.assert_close(solution.residuals[:3], (left / rhs.norm(dim=1))[:3], rtol=1e-6, atol=1e-14)
    assert (solution.residuals <= 1e-6).all()
    assert solution.iterations[2:].tolist() == [1, 0]
    assert solution.iterations[:2].min() > 5
    assert not solution.values[3].any()


def test_solved_rows_leave_the_product() -> None:
    matrix, rhs = problem()
    rhs[1] = torch.linalg.eigh(matrix)[1][:, 3]
    sizes = []

    def product(rows: Tensor) -> Tensor:
        sizes.append(len(rows))
        return rows @ matrix

    solution = conjugate_gradient(product, rhs)
    assert sizes[:2] == [4, 3]
    assert sum(sizes) == solution.iterations.sum()


def test_several_rows_equal_one_by_one() -> None:
    matrix, rhs = problem()
    solution = conjugate_gradient(times(matrix), rhs, tolerance=1e-4)
    alone = [conjugate_gradient(times(matrix), row[None], tolerance=1e-4) for row in rhs]
    torch.testing.assert_close(solution.values, torch.cat([one.values for one in alone]), rtol=1e-10, atol=1e-12)
    assert solution.iterations.tolist() == [one.iterations.item() for one in alone]


def test_right_hand_sides_are_left_alone_and_their_scale_does_not_matter() -> None:
    matrix, rhs = problem()
    before = rhs.clone()
    values = conjugate_gradient(times(matrix), rhs).values
    assert torch.equal(rhs, before)
    torch.testing.assert_close(conjugate_gradient(times(matrix), 1e-20 * rhs).values, 1e-20 * values, atol=0, rtol=1e-8)


def test_a_preconditioner_saves_iterations() -> None:
    matrix, rhs = problem(lowest=0.001)
    plain = conjugate_gradient(times(matrix), rhs, tolerance=1e-8)
    inverse = factor(matrix + 0.01 * torch.eye(30, dtype=DOUBLE)).solve
    better = conjugate_gradient(times(matrix), rhs, tolerance=1e-8, preconditioner=inverse)
    torch.testing.assert_close(better.values, factor(matrix).solve(rhs), rtol=1e-5, atol=1e-6)
    assert better.iterations.max() < 12 < plain.iterations.min()


def test_float32() -> None:
    matrix, rhs = problem()
    solution = conjugate_gradient(times(matrix.float()), rhs.float(), tolerance=0)
    assert solution.values.dtype == torch.float32
    torch.testing.assert_close(solution.values.double(), factor(matrix).solve(rhs), rtol=1e-4, atol=1e-5)


def test_negative_curvature_is_reported_by_row() -> None:
    matrix = torch.diag(torch.tensor([3.0, 1.0, -1.0]))
    rhs = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.1, 2.0]])
    with pytest.raises(NegativeCurvatureError, match=r"right-hand sides \[1, 3\] lead to \(.*: -1\)") as caught:
        conjugate_gradient(times(matrix), rhs)
    assert caught.value.rows == (1, 3)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.rows, str(copy)) == (caught.value.rows, str(caught.value))


def test_rows_keep_their_number_when_others_have_left() -> None:
    matrix = torch.diag(torch.tensor([3.0, 1.0, -0.5]))
    rhs = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    with pytest.raises(NegativeCurvatureError) as caught:
        conjugate_gradient(times(matrix), rhs)
    assert caught.value.rows == (1,)


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
def test_a_singular_curvature_is_an_error_where_no_solution_exists(dtype: torch.dtype) -> None:
    half = torch.randn(10, 30, dtype=dtype, generator=torch.Generator().manual_seed(0))
    rhs = torch.randn(2, 30, dtype=dtype, generator=torch.Generator().manual_seed(1))
    with pytest.raises(NegativeCurvatureError, match="raise the damping"):
        conjugate_gradient(times(half.T @ half / 10), rhs, max_iterations=1000)
    with pytest.raises(NegativeCurvatureError, match="raise the damping"):
        conjugate_gradient(torch.zeros_like, rhs)
    inside = rhs @ half.T @ half  # here there is one
    solution = conjugate_gradient(times(half.T @ half / 10), inside, tolerance=1e-4)
    assert (solution.residuals < 1e-4).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tolerance": -1.0}, "`tolerance` to be a number >= 0, but got -1.0"),
        ({"max_iterations": 0}, "`max_iterations` to be a positive integer, but got 0"),
        ({"rhs": torch.ones(2)}, r"`rhs` to be a floating-point matrix of vectors \(r, p\), but got shape \(2,\)"),
        ({"rhs": torch.full((1, 2), float("inf"))}, r"the rows \[0\] hold NaN or infinite"),
        ({"product": lambda rows: rows * float("nan")}, "product with the curvature to be finite"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conjugate_gradient(**{"product": times(torch.eye(2)), "rhs": torch.ones(1, 2), **arguments})


def test_a_preconditioner_must_be_positive() -> None:
    with pytest.raises(NegativeCurvatureError, match="The preconditioner is not positive"):
        conjugate_gradient(times(torch.eye(2)), torch.ones(1, 2), preconditioner=torch.neg)
