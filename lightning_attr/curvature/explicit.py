"""A curvature that is written out: factored once in float64, then solved for any number of vectors."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lightning_attr.curvature.parameter_vectors import Product, checked_rows
from lightning_attr.randomness.streams import gaussian

log = logging.getLogger(__name__)

# Smallest over largest eigenvalue below which a matrix of this precision counts as singular: what its rounding leaves
# of an eigenvalue that is zero.
_SINGULAR = {torch.float64: 1e-14}
_SINGULAR_LOW = 5e-7


@dataclass(frozen=True)
class Factorisation:
    r"""The inverse of :math:`C + \lambda I`.

    Args:
        solve: a function from rows ``(r, p)`` to ``(r, p)``, solved in float64, in the rows' dtype.
        form: a function from rows ``(r, p)`` to :math:`v^\top (C + \lambda I)^{-1} v` of each, ``(r,)``, which takes
            half as long as a solution where there are no negative eigenvalues.
        negative_eigenvalues: how many of :math:`C + \lambda I` there are.

    Example:
        >>> factors = factor(torch.diag(torch.tensor([2.0, -1.0])))
        >>> factors.negative_eigenvalues, factors.form(torch.tensor([[4.0, 1.0]]))
        (1, tensor([7.]))
    """

    solve: Product
    form: Callable[[Tensor], Tensor]
    negative_eigenvalues: int


def factor(matrix: Tensor, damping: float = 0.0, *, definite: bool = False) -> Factorisation:
    r"""Factor :math:`C + \lambda I`, by Cholesky or, where that fails, as :math:`L D L^\top` (Bunch and Kaufman, 1977).

    Negative eigenvalues are counted in D, which has as many (Sylvester's law of inertia), and reported by the log.

    Shapes: matrix (p, p). Returns the factorisation, ``(p, p)`` in float64.
    """
    if not damping >= 0:
        raise ValueError(f"Expected argument `damping` to be a number >= 0, but got {damping}.")
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"Expected argument `matrix` to be square, but got shape {tuple(matrix.shape)}.")
    if not matrix.isfinite().all():
        raise ValueError(
            "Expected a finite curvature, but it holds NaN or infinite values. Look for them in the parameters and the "
            "data."
        )
    damped = matrix.double()
    damped = (damped + damped.T).div_(2)
    damped.diagonal().add_(damping)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if not failed:
        solve = _row_solver(lambda columns: torch.cholesky_solve(columns, lower))
        result = Factorisation(solve, partial(_half_solved, lower), 0)
    elif definite:
        raise ValueError(_singular(len(matrix), damping))
    else:
        del lower
        result = _indefinite(damped, damping)
    limit = _SINGULAR.get(matrix.dtype, _SINGULAR_LOW)
    if not damped.norm() * _inverse_norm(result.solve, damped) <= 1 / limit:
        raise ValueError(_singular(len(matrix), damping))
    if result.negative_eigenvalues:
        log.warning(
            "%d of %d eigenvalues of the damped curvature are negative: its inverse is no influence of a minimum. "
            "Take the GGN instead of the Hessian, or raise the damping.",
            result.negative_eigenvalues,
            len(matrix),
        )
    return result


def _indefinite(damped: Tensor, damping: float) -> Factorisation:
    packed, pivots, failed = torch.linalg.ldl_factor_ex(damped)
    if failed:
        raise ValueError(_singular(len(damped), damping))
    # A negative pivot marks a block of two rows; its determinant is negative, so that one eigenvalue is.
    single = pivots > 0
    negative = int((packed.diagonal()[single] < 0).sum()) + int((~single).sum()) // 2
    solve = _row_solver(lambda columns: torch.linalg.ldl_solve(packed, pivots, columns))
    return Factorisation(solve, lambda rows: (rows * solve(rows)).sum(1), negative)


def _half_solved(lower: Tensor, rows: Tensor) -> Tensor:
    """Lengths of the rows after the first of the two triangular systems."""
    half = torch.linalg.solve_triangular(lower, checked_rows(rows).T.double(), upper=False)
    lengths: Tensor = half.square_().sum(0)
    return lengths.to(rows.dtype)


def _row_solver(solve_columns: Product) -> Product:
    return lambda rows: solve_columns(checked_rows(rows).T.double()).T.to(rows.dtype)


def _inverse_norm(solve: Product, like: Tensor) -> Tensor:
    """Two steps of the power iteration on the inverse."""
    vector = gaussian((1, len(like)), "inverse norm").to(like)
    for _ in range(2):
        vector = solve(vector / vector.norm())
    norm: Tensor = vector.norm()
    return norm


def _singular(size: int, damping: float) -> str:
    return (
        f"The curvature of {size} parameters is singular with `damping={damping}`. Raise the damping: a thousandth of "
        "the mean eigenvalue for a convex loss, a tenth for a network."
    )
