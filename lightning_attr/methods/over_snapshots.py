"""Sums and averages over the snapshots of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

from torch import Tensor

from lightning_attr.methods.base import ScoreBlock, SnapshotFeatures, in_step

Term: TypeAlias = Callable[[int, range, Mapping[str, Tensor]], tuple[Tensor, Tensor]]
"""Number of a snapshot, rows and their columns there -> ``r`` ``(b, k)``, and the part in self-influence ``(b,)``."""


def sum_over_snapshots(
    snapshots: Sequence[SnapshotFeatures], targets: Sequence[Tensor], term: Term
) -> Iterator[ScoreBlock]:
    r"""Add up inner products with the targets over snapshots, block after block.

    .. math::
        S_{ij} = \sum_c \langle r_i(\theta_c), \psi_j(\theta_c) \rangle

    Shapes: targets (m, k).

    Example:
        >>> import torch
        >>> snapshot = SnapshotFeatures.of({"features": torch.eye(2)}, {"features": torch.zeros(0, 2)})
        >>> def dot(number, rows, columns):
        ...     return columns["features"], columns["features"].square().sum(1)
        >>> [block.scores.flatten() for block in sum_over_snapshots([snapshot] * 2, [torch.ones(1, 2)] * 2, dot)]
        [tensor([2., 2.])]
    """
    for rows, train in in_step(snapshots):
        scores = targets[0].new_zeros(len(rows), len(targets[0]))
        self_influence = targets[0].new_zeros(len(rows))
        for number, (columns, target) in enumerate(zip(train, targets, strict=True)):
            features, own = term(number, rows, columns)
            scores.addmm_(features, target.T)
            self_influence += own
        yield ScoreBlock(rows, scores, self_influence)


def balanced_weights(sizes: Sequence[float]) -> list[float]:
    """Weigh snapshots so that each has an equal part in the average of their scores.

    Returns weights inverse to the sizes, with the sum one. A snapshot without any scores counts as the smallest of the
    others.

    Example:
        >>> balanced_weights([1.0, 3.0]), balanced_weights([0.0, 0.0])
        ([0.75, 0.25], [0.5, 0.5])
    """
    total = balanced_total(sizes)
    least = _least(sizes)
    return [1 / (abs(size) or least) / total for size in sizes]


def balanced_total(sizes: Sequence[float]) -> float:
    """Give what a sum of scores, each over its size, is to be divided by, for an average by :func:`balanced_weights`.

    Returns the sum of the inverse sizes.

    Example:
        >>> balanced_total([1.0, 0.5])
        3.0
    """
    least = _least(sizes)
    return sum(1 / (abs(size) or least) for size in sizes)


def _least(sizes: Sequence[float]) -> float:
    return min((abs(size) for size in sizes if size), default=1.0)
