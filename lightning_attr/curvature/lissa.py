"""LiSSA: the inverse as a Neumann series (Agarwal et al., 2017; Koh and Liang, 2017)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_attr.curvature.parameter_vectors import Product, applied, checked_rows, row_dots
from lightning_attr.errors import DivergenceError

_MOST_ITERATIONS = 5000
_GROWTH = 2.0  # norms above this multiple of the bound mean divergence; batches may be a little above their mean


def lissa(
    product: Product,
    rhs: Tensor,
    *,
    scale: float,
    damping: float,
    iterations: int | None = None,
    repeats: int = 1,
) -> Tensor:
    r"""Approximate :math:`(C + \lambda I)^{-1} v` for every row v, from products that may each see another batch.

    .. math:: h_{j+1} = v + (1 - \lambda / s) h_j - C_j h_j / s, \qquad h_0 = v, \qquad x = h_J / s

    It converges when the eigenvalues of :math:`(C + \lambda I) / s` lie between 0 and 2, and the error shrinks by
    :math:`1 - (\lambda_{\min} + \lambda) / s` a step. There, :math:`|h_j| \le (j + 1) |v|`, and this bound tells
    divergence.

    Shapes: rhs (r, p). Returns ``(r, p)``, in the right-hand sides' dtype.
    """
    if not scale > 0:
        raise ValueError(f"Expected argument `scale` to be a positive number, but got {scale}.")
    if not damping >= 0:
        raise ValueError(f"Expected argument `damping` to be a number >= 0, but got {damping}.")
    if repeats < 1:
        raise ValueError(f"Expected argument `repeats` to be a positive integer, but got {repeats}.")
    steps = lissa_iterations(scale, damping) if iterations is None else iterations
    if steps < 1:
        raise ValueError(f"Expected argument `iterations` to be a positive integer, but got {iterations}.")
    total = torch.zeros_like(checked_rows(rhs))
    bound = _GROWTH * row_dots(rhs, rhs).sqrt()
    for _ in range(repeats):
        estimate = rhs.clone()
        for step in range(steps):
            image = applied(product, estimate)
            estimate = estimate.mul_(1 - damping / scale).add_(rhs).add_(image, alpha=-1 / scale)
            _check_growth(row_dots(estimate, estimate).sqrt(), (step + 2) * bound, step + 1, scale)
        total += estimate
    return total.div_(repeats * scale)


def lissa_iterations(scale: float, damping: float) -> int:
    r"""Choose how many steps to take: :math:`5 s / \lambda`, for an error of about :math:`e^{-5}`, and at most 5000.

    Returns the number of steps.
    """
    return _MOST_ITERATIONS if 5 * scale >= _MOST_ITERATIONS * damping else math.ceil(5 * scale / damping)


def _check_growth(norms: Tensor, bound: Tensor, step: int, scale: float) -> None:
    wrong = ~(norms <= bound)
    if wrong.any():
        raise DivergenceError(
            f"LiSSA diverges: after {step} steps the estimates of the right-hand sides "
            f"{wrong.nonzero().flatten().tolist()} are longer than any that converge. Raise `scale` (now {scale:g}) "
            "to 1.1 times the largest eigenvalue of the curvature; of its largest batch, if it sees batches. A "
            "negative eigenvalue needs more damping, or the GGN instead of the Hessian."
        )
