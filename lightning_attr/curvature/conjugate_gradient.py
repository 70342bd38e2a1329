"""Conjugate gradients (Hestenes and Stiefel, 1952) for several right-hand sides at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_attr.curvature.parameter_vectors import Product, applied, checked_rows, row_dots
from lightning_attr.errors import NegativeCurvatureError


@dataclass(frozen=True)
class Solution:
    """What conjugate gradients found.

    Args:
        values: ``(r, p)``, in the right-hand sides' dtype.
        iterations: ``(r,)``, int64: how many each row took.
        residuals: ``(r,)``, float64: what is left of each right-hand side, relative to its norm; above the tolerance
            where ``max_iterations`` came first.

    Example:
        >>> conjugate_gradient(lambda rows: 2 * rows, torch.ones(1, 3)).iterations
        tensor([1])
    """

    values: Tensor
    iterations: Tensor
    residuals: Tensor


@dataclass
class _State:
    """The systems not solved yet: every field has one row a system."""

    rows: Tensor
    values: Tensor
    residual: Tensor
    direction: Tensor
    rho: Tensor  # residual times preconditioned residual
    norm: Tensor  # of the right-hand side
    top: Tensor  # highest curvature met

    def keep(self, rows: Tensor) -> None:
        for name, tensor in vars(self).items():
            setattr(self, name, tensor[rows])


def conjugate_gradient(
    product: Product,
    rhs: Tensor,
    *,
    tolerance: float = 1e-5,
    max_iterations: int = 100,
    preconditioner: Product | None = None,
) -> Solution:
    r"""Solve :math:`C x = v` for every row v, C positive definite.

    Each row has step sizes of its own, and leaves the product once it is solved. Dot products are in float64. The work
    is one product an iteration; ``p`` iterations are exact but for rounding.

    Shapes: rhs (r, p). Returns values, iterations and residuals.
    """
    if not tolerance >= 0:
        raise ValueError(f"Expected argument `tolerance` to be a number >= 0, but got {tolerance}.")
    if max_iterations < 1:
        raise ValueError(f"Expected argument `max_iterations` to be a positive integer, but got {max_iterations}.")
    precision = torch.finfo(checked_rows(rhs).dtype).eps
    count = len(rhs)
    values, iterations = torch.zeros_like(rhs), torch.zeros(count, dtype=torch.int64, device=rhs.device)
    residuals = torch.zeros(count, dtype=torch.float64, device=rhs.device)
    state = _start(rhs, preconditioner)
    for iteration in range(1, max_iterations + 1):
        if not len(state.rows):
            break
        _descend(product, state, precision)
        left = row_dots(state.residual, state.residual).sqrt() / state.norm
        values[state.rows], residuals[state.rows] = state.values, left
        iterations[state.rows] = iteration
        unsolved = left > max(tolerance, precision)
        if not unsolved.all():
            state.keep(unsolved)
        _turn(state, preconditioner)
    return Solution(values, iterations, residuals)


def _start(rhs: Tensor, preconditioner: Product | None) -> _State:
    norm = row_dots(rhs, rhs).sqrt()
    rows = norm.nonzero().flatten()
    residual = rhs[rows]
    direction = applied(preconditioner, residual) if preconditioner else residual.clone()
    rho = row_dots(residual, direction)
    _check_positive(rho, rows, 0.0, "The preconditioner")
    return _State(rows, torch.zeros_like(residual), residual, direction, rho, norm[rows], torch.zeros_like(rho))


def _descend(product: Product, state: _State, precision: float) -> None:
    """Go to the minimum along the directions."""
    image = applied(product, state.direction)
    curvature, squared = row_dots(state.direction, image), row_dots(state.direction, state.direction)
    # What rounding leaves of a curvature of zero counts as none.
    _check_positive(curvature / squared, state.rows, precision * state.top, "The curvature")
    state.top = torch.maximum(state.top, curvature / squared)
    step = (state.rho / curvature).to(image.dtype)[:, None]
    state.values = torch.addcmul(state.values, step, state.direction)
    state.residual = torch.addcmul(state.residual, -step, image)


def _turn(state: _State, preconditioner: Product | None) -> None:
    """Make the next directions, conjugate to all before."""
    towards = applied(preconditioner, state.residual) if preconditioner else state.residual
    rho = row_dots(state.residual, towards)
    _check_positive(rho, state.rows, 0.0, "The preconditioner")
    state.direction = torch.addcmul(towards, (rho / state.rho).to(towards.dtype)[:, None], state.direction)
    state.rho = rho


def _check_positive(values: Tensor, rows: Tensor, least: Tensor | float, what: str) -> None:
    wrong = ~(values > least)
    if wrong.any():
        found = tuple(rows[wrong].tolist())
        raise NegativeCurvatureError(
            f"{what} is not positive along a direction that the right-hand sides {list(found)} lead to (its lowest "
            f"value there: {values[wrong].min().item():.3g}). Take the GGN, which is never negative, instead of the "
            "Hessian, or raise the damping.",
            found,
        )
