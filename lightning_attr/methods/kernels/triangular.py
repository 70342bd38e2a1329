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

    Shapes: lower (k, k). Returns ``(k, k)``, lower triangular.
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

    Shapes: features (b, k), lower (k, k). Returns ``(b,)``.
    """
    norms = features.new_zeros(len(features))
    for start in range(0, len(lower), _STRIP):
        stop = start + _STRIP
        norms += (features[:, :stop] @ lower[start:stop, :stop].T).square_().sum(1)
    return norms
