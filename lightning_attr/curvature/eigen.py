"""Eigenvectors of sums of outer products: of few vectors without the cube of the side, of many with a word before."""

from __future__ import annotations

import logging
import time
from functools import cache

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_SMALL = 256
"""Sides up to which the whole decomposition costs nothing."""
_TIMED = 512
"""Side of the decomposition by which others are estimated."""
_PATIENCE = 10.0
"""Seconds of one decomposition that are told before they begin."""


def eigendecomposition(name: str, matrices: Tensor, vectors: int) -> tuple[Tensor, Tensor]:
    r"""Decompose positive semi-definite matrices that are sums of outer products.

    Where there are fewer vectors than half the side, a basis of their span comes first,
    from products with random vectors (Halko et al., 2011), and the rest of the space, where all eigenvalues are zero,
    from its complement: :math:`O(d^2 k)` in the place of :math:`O(d^3)`.

    Shapes: matrices (groups, d, d). Returns eigenvalues ``(groups, d)``, ascending, and eigenvectors in columns,
    ``(groups, d, d)``, orthonormal.
    """
    side = matrices.shape[-1]
    if side > _SMALL and 2 * vectors < side:
        return _of_few(matrices, vectors)
    if side > 4 * _SMALL:
        seconds = len(matrices) * (side / _TIMED) ** 3 * _seconds(matrices.device)
        if seconds > _PATIENCE:
            log.warning(
                "The Kronecker factors of `%s` need the eigenvectors of %s of side %s: about %s seconds, and %.1f GB "
                "of memory, at each snapshot. That grows with the cube of the classes or features. Methods without "
                "it: TRAK, TracIn, GradDot.",
                name,
                "a matrix" if len(matrices) == 1 else f"{len(matrices)} matrices",
                f"{side:,}",
                f"{seconds:,.0f}",
                4 * matrices.nbytes / 1e9,
            )
    eigenvalues, basis = torch.linalg.eigh(matrices)
    return eigenvalues, basis


def _of_few(matrices: Tensor, vectors: int) -> tuple[Tensor, Tensor]:
    side, few = matrices.shape[-1], max(1, vectors)
    generator = torch.Generator().manual_seed(0)
    test = torch.randn(side, few, generator=generator, dtype=matrices.dtype).to(matrices.device)
    whole, _ = torch.linalg.qr(matrices @ test, mode="complete")  # its first columns span what the vectors do
    span, rest = whole[..., :few], whole[..., few:]
    eigenvalues, turn = torch.linalg.eigh(span.mT @ matrices @ span)
    zeros = eigenvalues.new_zeros(len(matrices), side - few)
    return torch.cat([zeros, eigenvalues.clamp(min=0)], -1), torch.cat([rest, span @ turn], -1)


@cache
def _seconds(device: torch.device) -> float:
    """Measure one decomposition of a small side."""
    matrix = torch.randn(_TIMED, _TIMED, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    matrix = matrix @ matrix.mT
    seconds = []
    for _ in range(2):  # the first may load a library
        start = time.perf_counter()
        torch.linalg.eigh(matrix)[0].sum().item()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
