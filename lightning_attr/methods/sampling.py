r"""Random rows in place of all: kernels of many samples, and their leverages, with errors that are known.

A kernel :math:`K = \sum_i w_i \phi_i \phi_i^\top` of ``n`` rows is estimated from some of them: row ``i`` is taken with
the chance :math:`p_i = \min(1, r s_i / \sum s)` of its size :math:`s_i = w_i |\phi_i|^2`, and counts :math:`1 / p_i`
times. That is unbiased, takes ``r`` rows at most on average, and always those that matter most (Drineas, Kannan and
Mahoney, 2006). With the ridge :math:`\lambda = d \operatorname{tr} K / k` no row has more than :math:`k / (d r)` of the
damped kernel in its own direction, so that the relative error of :math:`K + \lambda I` is about :math:`\sqrt{k / (d
r)}`.

The leverage :math:`|L^{-1} \phi|^2` of a kernel :math:`L L^\top` is estimated by :math:`|R L^{-1} \phi|^2` with ``s``
rows of random signs :math:`\pm 1 / \sqrt s`, without bias, with a relative standard deviation of at most
:math:`\sqrt{2 / s}` (Achlioptas, 2003).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_attr.methods.base import SnapshotFeatures
from lightning_attr.randomness.streams import rademacher, row_uniforms

_ROWS_A_FEATURE = 4
"""Rows that a kernel is added up from, for each of its features, where the damping is 1: with 16, 8, 4 and 2, scores of
32,000 samples of an MLP correlate by 1, .999, .997 and .993 with those of all rows."""
_WORTHWHILE = 2
"""Rows are drawn where there are so many times more."""
_SKETCH = 128
"""Rows of a sketch of leverages: a relative standard deviation of 0.125."""
_EXACT_PRODUCTS = 2**34
"""Multiplications up to which leverages are exact: about a second of one processor."""


@dataclass(frozen=True)
class RowSample:
    """Which rows a kernel is added up from.

    Args:
        wanted: how many, on average and at most.
        total: sum of the sizes of all rows, of all processes.
        key: of the random numbers.

    Example:
        >>> RowSample(1, 4.0, "final").factors(range(4), torch.tensor([4.0, 0.0, 0.0, 0.0]))
        tensor([1., 0., 0., 0.])
    """

    wanted: int
    total: float
    key: str

    @classmethod
    def of(cls, sizes: Iterable[Tensor], wanted: int, snapshot: SnapshotFeatures) -> RowSample:
        """Draw rows by their sizes.

        Shapes: sizes (b,). Returns the sample, the same in all processes and for any blocks, up to the rounding of the
        total.
        """
        total = snapshot.reduce(torch.stack([size.sum(dtype=torch.float64) for size in sizes]).sum())
        return cls(wanted, total.item(), snapshot.key)

    def factors(self, rows: range, sizes: Tensor) -> Tensor:
        """Tell how many times each row counts.

        Shapes: sizes (b,). Returns the inverse chances of the rows taken, and zeros, ``(b,)``.
        """
        chances = (sizes * (self.wanted / max(self.total, torch.finfo(torch.float32).tiny))).clamp(max=1)
        drawn = row_uniforms(rows, 1, "kernel rows", self.key)[:, 0].to(chances)
        return torch.where(drawn < chances, 1 / chances, torch.zeros_like(chances))


def sampled_rows(n: int, k: int, damping: float) -> int | None:
    """Choose how many rows a kernel is added up from.

    Returns how many; None for all.
    """
    if damping <= 0:
        return None
    wanted = math.ceil(_ROWS_A_FEATURE * k / min(1.0, damping))
    return wanted if n > _WORTHWHILE * wanted else None


def leverage_sketch(factor: Tensor, n: int, key: str) -> Tensor | None:
    """Make a sketch for leverages, where many samples have many features.

    Shapes: factor (k, k). Returns :math:`R L^{-1}`, ``(s, k)``, in the factor's dtype; None where exact leverages cost
    little.
    """
    k = len(factor)
    if n * k * k <= _EXACT_PRODUCTS or k <= 2 * _SKETCH:
        return None
    signs = rademacher((_SKETCH, k), "leverages", key).to(factor) / math.sqrt(_SKETCH)
    sketch: Tensor = torch.linalg.solve_triangular(factor, signs, upper=False, left=False)
    return sketch


def leverage_error() -> float:
    """Give the relative standard deviation of a sketched leverage, at most."""
    return math.sqrt(2 / _SKETCH)
