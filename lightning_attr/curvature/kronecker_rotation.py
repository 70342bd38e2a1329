"""Per-sample gradients of a batch in the eigenbasis of their layer, squared, without forming them where that is free.

The uses of a layer within one batch belong together: a sample's gradient is their sum, and is squared after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from lightning_attr.curvature.kronecker_layout import KroneckerBlock, WeightGradient
from lightning_attr.gradients import ConvSum, ParameterGradient

CHUNK = 1 << 25
"""Numbers that a chunk of samples may take: 128 MiB of float32."""


class BatchUses:
    """A sink that keeps the gradients of one batch's weights; the activations stay in memory until it is let go.

    Args:
        blocks: the blocks wanted, by the name of their weight.

    Example:
        >>> uses = BatchUses({})
        >>> uses({"weight": torch.ones(1, 2)})
        >>> list(uses)
        []
    """

    def __init__(self, blocks: Mapping[str, KroneckerBlock]) -> None:
        self._blocks = blocks
        self._uses: dict[str, list[WeightGradient]] = {}

    def __call__(self, gradients: Mapping[str, ParameterGradient]) -> None:
        """Keep what belongs to a block; the gradient of a bias follows from that of its weight."""
        for name, gradient in gradients.items():
            if name in self._blocks:
                self._uses.setdefault(name, []).append(cast(WeightGradient, gradient))

    def __iter__(self) -> Iterator[tuple[KroneckerBlock, list[WeightGradient]]]:
        """Hand over the uses of each block, block by block, and forget them."""
        while self._uses:
            name, uses = self._uses.popitem()
            yield self._blocks[name], uses


@dataclass(frozen=True)
class SquaredGradients:
    r"""Squares of rotated gradients, :math:`(Q_S^\top G_i Q_A)^2`, formed or as products of one factor per side.

    Args:
        formed: ``(b, groups, d_o, d_i)``; or
        rows: ``(b, groups, d_o)``, and
        columns: ``(b, groups, d_i)``.

    Example:
        >>> squares = SquaredGradients(rows=torch.tensor([[[1.0, 2.0]]]), columns=torch.tensor([[[3.0]]]))
        >>> squares.summed()
        tensor([[[3.],
                 [6.]]])
        >>> squares.weighted(torch.ones(1, 2, 1))
        tensor([9.])
    """

    formed: Tensor | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None

    def summed(self) -> Tensor:
        """Sum over the samples, ``(groups, d_o, d_i)``."""
        if self.formed is not None:
            return self.formed.sum(0)
        return torch.einsum("bgo,bgi->goi", self.rows, self.columns)

    def weighted(self, weights: Tensor) -> Tensor:
        """Sum over the entries times weights ``(groups, d_o, d_i)``; ``(b,)``."""
        if self.formed is not None:
            return self.formed.flatten(1) @ weights.flatten()
        # In this order nothing of the size of the gradients is formed.
        return torch.einsum("bgi,bgi->b", torch.einsum("bgo,goi->bgi", self.rows, weights), self.columns)


def squared_gradients(
    block: KroneckerBlock, uses: list[WeightGradient], rows_basis: Tensor, columns_basis: Tensor, labels: int = 1
) -> Iterator[tuple[slice, SquaredGradients]]:
    """Rotate the gradients of a batch, some samples at a time.

    Shapes: rows_basis (groups, d_o, d_o), columns_basis (groups, d_i, d_i). Yields which samples, and their squares,
    added up over labels.
    """
    for samples, rows, columns in _factors(block, uses, labels):
        d_o = block.rows
        if rows.shape[2] == 1:
            rows, columns = _rotated(rows, rows_basis, labels), rotated(columns, columns_basis)
            summed = rows[:, :, 0].square().unflatten(2, (labels, d_o)).sum(2)
            yield samples, SquaredGradients(rows=summed, columns=columns[:, :, 0].square())
            continue
        gradients = _formed(rows, columns, rows_basis, columns_basis, labels)
        yield samples, SquaredGradients(formed=gradients.square_().unflatten(2, (labels, d_o)).sum(2))


def rotated_gradients(
    block: KroneckerBlock, uses: list[WeightGradient], rows_basis: Tensor, columns_basis: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """Form the rotated gradients of a batch, some samples at a time.

    Yields which samples, and :math:`Q_S^T G_i Q_A`, ``(b, groups, d_o, d_i)``.

    Example:
        >>> from lightning_attr.gradients import OuterSum
        >>> use, one = OuterSum(torch.ones(1, 1, 1), torch.tensor([[[3.0]]])), torch.ones(1, 1, 1)
        >>> list(rotated_gradients(KroneckerBlock("w", None, (1, 1)), [use], one, one))
        [(slice(0, 1, None), tensor([[[[3.]]]]))]
    """
    for samples, rows, columns in _factors(block, uses, 1):
        yield samples, _formed(rows, columns, rows_basis, columns_basis, 1)


def _factors(block: KroneckerBlock, uses: list[WeightGradient], labels: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Join the factors of all uses, ``(b, groups, s, labels * d_o)`` and ``(b, groups, s, d_i)``."""
    for samples in chunks(block, uses, block.groups * labels * block.rows * block.columns, labels):
        sides = [block.factors(use, samples, labels) for use in uses]
        rows, columns = (torch.cat(side, 2) if len(uses) > 1 else side[0] for side in zip(*sides, strict=True))
        yield samples, rows, columns


def _formed(rows: Tensor, columns: Tensor, rows_basis: Tensor, columns_basis: Tensor, labels: int) -> Tensor:
    """Form the rotated gradients, ``(b, groups, labels * d_o, d_i)``, in the cheaper order."""
    positions, d_o, d_i = rows.shape[2], rows_basis.shape[1], columns_basis.shape[1]
    if positions * (labels * d_o**2 + d_i**2) < labels * d_o * d_i * (d_o + d_i):
        rows, columns = _rotated(rows, rows_basis, labels), rotated(columns, columns_basis)
        return rows.mT * columns if positions == 1 else rows.mT @ columns  # broadcasting beats products of one
    gradients = rotated(rows.mT @ columns, columns_basis).unflatten(2, (labels, d_o))
    formed: Tensor = rows_basis.mT.unsqueeze(1) @ gradients
    return formed.flatten(2, 3)


def _rotated(rows: Tensor, basis: Tensor, labels: int) -> Tensor:
    """Rotate the output gradients of each label, ``(b, groups, s, labels * d_o)``."""
    if labels == 1:
        return rotated(rows, basis)
    return rotated(rows.unflatten(3, (labels, -1)).flatten(2, 3), basis).reshape(rows.shape)


def rotated(factors: Tensor, basis: Tensor) -> Tensor:
    """Multiply from the right: one product per group, as one a sample would read the basis for each of them.

    Shapes: factors (b, groups, s, d), basis (groups, d, e). Returns ``(b, groups, s, e)``.
    """
    first = factors.transpose(0, 1)
    product: Tensor = (first.flatten(1, 2) @ basis).unflatten(1, first.shape[1:3])
    return product.transpose(0, 1)


def chunks(block: KroneckerBlock, uses: list[WeightGradient], beside: int = 0, labels: int = 1) -> Iterator[slice]:
    """Split a batch so that the factors of its samples fit into ``CHUNK`` numbers.

    Yields the parts, of at least one sample each.
    """
    sizes = [_sizes(use) for use in uses]
    batch = sizes[0][0] // labels
    needed = beside + block.groups * (labels * block.rows + block.columns) * sum(positions for _, positions in sizes)
    step = max(1, CHUNK // needed)
    for start in range(0, batch, step):
        yield slice(start, min(start + step, batch))


def _sizes(use: WeightGradient) -> tuple[int, int]:
    """Samples and positions."""
    if isinstance(use, ConvSum):
        return len(use.backprops), use.backprops[0, 0].numel()
    return len(use.rows), use.rows.shape[1]
