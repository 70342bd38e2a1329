r"""Leading eigenvectors of a covariance :math:`M = \sum_i v_i v_i^\top` that is added up batch after batch.

A large one is not formed: of :math:`Y = M \Omega` with random :math:`\Omega` of a few more columns than eigenvectors
are wanted, Nyström's :math:`Y (\Omega^\top Y)^{-1} Y^\top` has nearly the same leading ones (Tropp et al., 2017).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_attr.batches.float64 import doubled, has_float64
from lightning_attr.randomness.streams import rademacher

_WHOLE = 1024
"""Above this size it is never formed: 8 MiB, a quarter of a second to decompose."""
_SMALL = 256
"""Up to this size it is always formed; between, where the eigenvectors wanted are no small part of all."""
_DIAGONAL = 8192
"""Above this size only the diagonal is kept, and its largest axes stand for eigenvectors."""


class Covariance:
    """Adds up outer products of vectors with themselves, in float64.

    Args:
        size: of the vectors.
        most: eigenvectors that are wanted, at most.

    Example:
        >>> covariance = Covariance(3, most=2)
        >>> covariance.add(torch.tensor([[0.0, 3.0, 0.0], [1.0, 0.0, 0.0]]))
        >>> covariance.leading().abs()
        tensor([[0., 1., 0.],
                [1., 0., 0.]])
    """

    def __init__(self, size: int, most: int) -> None:
        self.size, self.most = size, min(most, size)
        self.diagonal: Tensor | None = None  # (size,), added to
        self.total: Tensor | None = None  # (size, size), or its product with `directions`
        self.directions: Tensor | None = None
        width = min(size, most + max(64, most // 2))
        if _WHOLE < size <= _DIAGONAL or (size > _SMALL and 2 * width <= size):
            self.directions = torch.linalg.qr(rademacher((size, width), "covariance", size).double()).Q

    def add(self, vectors: Tensor) -> None:
        """Add the outer products of vectors.

        Shapes: vectors (n, size).
        """
        if self.size > _DIAGONAL:
            squares = vectors.square()
            wide = has_float64(vectors.device)
            self.add_diagonal(squares.sum(0, dtype=torch.float64) if wide else doubled(squares).sum(0))
            return
        if self.directions is None:
            more = vectors.mT @ vectors
        else:
            self.directions = self.directions.to(vectors.device if has_float64(vectors.device) else "cpu")
            more = vectors.mT @ (vectors @ self.directions.to(vectors))
        self.total = doubled(more) if self.total is None else self.total.add_(more.to(self.total.device))

    def add_diagonal(self, squares: Tensor) -> None:
        """Add what is on the diagonal alone: of vectors with one entry each.

        Shapes: squares (size,).
        """
        self.diagonal = squares if self.diagonal is None else self.diagonal + squares

    def leading(self) -> Tensor:
        """Find the leading eigenvectors, the leading ones first.

        Returns ``(min(most, size), size)``, float32, orthonormal rows.
        """
        if self.total is None:
            diagonal = torch.zeros(self.size) if self.diagonal is None else self.diagonal
            largest = diagonal.argsort(descending=True, stable=True)[: self.most]
            axes = torch.zeros(self.most, self.size, device=diagonal.device)
            return axes.scatter_(1, largest[:, None], 1.0)
        vectors = self._whole(self.total) if self.directions is None else self._sketched(self.total, self.directions)
        return vectors[:, : self.most].T.float().contiguous()

    def _whole(self, total: Tensor) -> Tensor:
        """Eigenvectors in columns, the leading ones first."""
        total = total if self.diagonal is None else total + self.diagonal.diag()
        vectors: Tensor = torch.linalg.eigh(total).eigenvectors
        return vectors.flip(1)

    def _sketched(self, total: Tensor, directions: Tensor) -> Tensor:
        """Leading left singular vectors of Y C^-1 with C^T C = Omega^T Y: the eigenvectors of Nyström's matrix."""
        total = total if self.diagonal is None else total + self.diagonal[:, None] * directions
        core = directions.T @ total
        values, inner = torch.linalg.eigh((core + core.T) / 2)
        # Directions in which nothing is but rounding are left out.
        root = values.clamp(min=0).add(values[-1].clamp(min=1e-300) * 1e-12).rsqrt()
        scaled = total @ (inner * root)
        vectors = torch.linalg.eigh(scaled.T @ scaled).eigenvectors.flip(1)
        found: Tensor = torch.linalg.qr(scaled @ vectors).Q
        return found
