"""Inverses of triangular matrices, and norms that they give, mostly by products of matrices."""

from __future__ import annotations

import torch
from torch import Tensor

_STRIP = 256
"""Rows at once of a product of which half is known to be zero."""
_LEAF = 128
"""Sides up to which a triangular matrix is inverted by substitution."""


def triangular_inverse(lower: Tensor) -> Tensor:
    """Invert a lower triangular matrix, halves first, so that nearly all work is products of matrices.

    Args:
        lower: ``(k, k)``, without zeros on the diagonal.

    Returns:
        ``(k, k)``, lower triangular.

    Example:
        >>> triangular_inverse(torch.tensor([[2.0, 0.0], [1.0, 1.0]]))
        tensor([[ 0.5000,  0.0000],
                [-0.5000,  1.0000]])
    """
    if len(lower) <= _LEAF:
        whole: Tensor = torch.linalg.solve_triangular(lower, torch.eye(len(lower)).to(lower), upper=False)
        return whole
    half = len(lower) // 2
    inverse = torch.zeros_like(lower)
    inverse[:half, :half] = triangular_inverse(lower[:half, :half])
    inverse[half:, half:] = triangular_inverse(lower[half:, half:])
    inverse[half:, :half] = -inverse[half:, half:] @ (lower[half:, :half] @ inverse[:half, :half])
    return inverse


def squared_norms(features: Tensor, lower: Tensor) -> Tensor:
    """Compute the squared norms of ``features @ lower.T`` without the half of the product that is zeros.

    Args:
        features: ``(b, k)``.
        lower: lower triangular, ``(k, k)``.

    Returns:
        ``(b,)``.

    Example:
        >>> squared_norms(torch.ones(1, 2), torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
        tensor([5.])
    """
    norms = features.new_zeros(len(features))
    for start in range(0, len(lower), _STRIP):
        stop = start + _STRIP
        norms += (features[:, :stop] @ lower[start:stop, :stop].T).square_().sum(1)
    return norms
