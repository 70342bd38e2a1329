r"""Covariances of the two sides of a weight's gradient, and their leading eigenvectors.

For :math:`G = \sum_s \delta_s a_s^\top`: :math:`\sum_s \delta_s \delta_s^\top` on the side of the rows and
:math:`\sum_s a_s a_s^\top` on that of the columns, with a last one in :math:`a` for the bias. A gradient that comes
whole counts by :math:`G G^\top` and :math:`G^\top G`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_attr.batches.float64 import doubled
from lightning_attr.gradients.factored import ConvSum, FactoredGradient, GatherSum, OuterSum, ParameterGradient
from lightning_attr.projectors.covariance import Covariance
from lightning_attr.projectors.kronecker import MatrixBlock
from lightning_attr.randomness.streams import random_words

VECTORS = 2**14
"""Numbers that are looked at of each side and sample: of more positions than fit, some are taken."""


class BlockMoments:
    """Gathers the covariances of one weight, batch after batch.

    Args:
        block: the weight, with its bias if it has one.
        most: eigenvectors of each side that are wanted, at most.

    Example:
        >>> moments = BlockMoments(MatrixBlock("weight", None, 2, 3), most=1)
        >>> _ = moments.add(torch.tensor([[[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]]), None)
        >>> left, right = moments.leading()
        >>> left.abs(), right.abs()
        (tensor([[1., 0.]]), tensor([[1., 0., 0.]]))
    """

    def __init__(self, block: MatrixBlock, most: int) -> None:
        self.block = block
        self.rows, self.columns = Covariance(block.rows, most), Covariance(block.columns, most)

    def add(self, weight: ParameterGradient | None, bias: ParameterGradient | None) -> list[Tensor]:
        """Add the gradients of a batch of ``b`` samples.

        Returns what was looked at, ``(b * positions, size)`` of each side, sample after sample.
        """
        if isinstance(weight, GatherSum):
            self._add_table(weight)
            return [weight.columns.flatten(0, 1)]
        rows, columns = self._factors(weight, bias)
        self.rows.add(rows)
        self.columns.add(columns)
        return [rows, columns]

    def leading(self) -> tuple[Tensor, Tensor]:
        """Find the leading eigenvectors of both sides, the leading ones first.

        Returns ``(k_rows, rows)`` and ``(k_columns, columns)``, float32, orthonormal rows.
        """
        return self.rows.leading(), self.columns.leading()

    def _add_table(self, table: GatherSum) -> None:
        """Rows of a table are looked up one by one: their covariance is its diagonal."""
        sizes = doubled(table.columns.square().sum(2).flatten())
        rows = torch.zeros(self.block.rows, dtype=torch.float64, device=sizes.device)
        self.rows.add_diagonal(rows.index_add_(0, table.ids.flatten(), sizes))
        self.columns.add(table.columns.flatten(0, 1))

    def _factors(self, weight: ParameterGradient | None, bias: ParameterGradient | None) -> tuple[Tensor, Tensor]:
        """Both factors of all samples and positions, ``(N, rows)`` and ``(N', columns)``."""
        if isinstance(weight, OuterSum):
            # Positions without a gradient, as of padding, have no part, whatever the input there.
            present = weight.rows.abs().amax(2, keepdim=True) > 0
            rows, columns = (_some(side).flatten(0, 1) for side in (weight.rows, weight.columns * present))
        elif isinstance(weight, ConvSum) and weight.groups == 1:
            rows, columns = _some(weight.backprops.flatten(2).mT).flatten(0, 1), _windows(weight)
        else:
            return self._whole(weight, bias)
        if self.block.bias is not None:
            last = columns.new_full((len(columns), 1), 0.0 if bias is None else 1.0)
            if isinstance(weight, OuterSum):
                last *= _some(present.expand_as(weight.columns)).flatten(0, 1)[:, :1]
            columns = torch.cat([columns, last], 1)
        return rows, columns

    def _whole(self, weight: ParameterGradient | None, bias: ParameterGradient | None) -> tuple[Tensor, Tensor]:
        wanted = (weight, bias if self.block.bias is not None else None)
        formed = [_formed(gradient) for gradient in wanted if gradient is not None]
        parts = [gradient.reshape(len(gradient), self.block.rows, -1) for gradient in formed]
        matrices = torch.cat(parts, 2)
        missing = self.block.columns - matrices.shape[2]
        if missing:  # weight or bias has no part in this use
            zeros = matrices.new_zeros(len(matrices), self.block.rows, missing)
            matrices = torch.cat([matrices, zeros] if weight is not None else [zeros, matrices], 2)
        return matrices.mT.flatten(0, 1), matrices.flatten(0, 1)


def _positions(count: int, size: int) -> Tensor | None:
    """Which of the positions of a sample are looked at, for vectors of a size; the same for all samples. None: all."""
    wanted = max(1, VECTORS // size)
    if count <= wanted:
        return None
    order = random_words(count, "positions", count).argsort(kind="stable")
    return torch.from_numpy(order[:wanted].astype(np.int64)).sort().values


def _some(factors: Tensor) -> Tensor:
    """Some positions of ``(b, s, size)``."""
    chosen = _positions(*factors.shape[1:])
    return factors if chosen is None else factors[:, chosen.to(factors.device)]


def _windows(gradient: ConvSum) -> Tensor:
    """Patches of some positions, ``(N, columns)``; only these are unfolded."""
    windows, dims = gradient.windows().squeeze(1), len(gradient.kernel_size)  # (b, c_in, *out_size, *kernel_size)
    out_size = windows.shape[2 : 2 + dims]
    count = math.prod(out_size)
    chosen = _positions(count, math.prod(windows.shape) // (len(windows) * count))
    places = torch.arange(count) if chosen is None else chosen
    index: list[Any] = [place.to(windows.device) for place in torch.unravel_index(places, out_size)]
    patches: Tensor = windows[(slice(None), slice(None), *index)]  # (b, c_in, positions, *kernel_size)
    return patches.transpose(1, 2).flatten(0, 1).flatten(1)


def _formed(gradient: ParameterGradient) -> Tensor:
    return gradient.materialise() if isinstance(gradient, FactoredGradient) else gradient
