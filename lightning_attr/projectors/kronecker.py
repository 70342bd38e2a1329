r"""Kronecker-factored projection of each layer, :math:`P_o G P_i^\top`, without forming the gradient :math:`G`.

Choe et al. (2024), LoGra, section 3.1. With random signs as entries it is unbiased for inner products, and its cost is
that of projecting the layer's activations and output gradients.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_attr.gradients.factored import ConvSum, FactoredGradient, ParameterGradient, RowSum
from lightning_attr.gradients.products import two_sided
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.projectors.base import Projection, Projector, by_layer
from lightning_attr.randomness.streams import rademacher

log = logging.getLogger(__name__)


class KroneckerProjector(Projector):
    """Projects each weight matrix from both sides to at most ``side x side``, and each vector to at most ``side``.

    The side is the same for all parameters, the largest with which all of them fit into ``proj_dim``. A bias counts as
    the last column of its weight. A dimension that is not larger than the side is kept as it is, so that with
    ``proj_dim >= number of parameters`` nothing is lost.

    Example:
        >>> from torch import nn
        >>> layout = ParameterLayout.of(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)))
        >>> KroneckerProjector(proj_dim=500).bind(layout, "final").dim  # 17 x 17 and 10 x 17
        459
    """

    kind = "kronecker"

    def bind(self, layout: ParameterLayout, snapshot: str) -> Projection:
        """Choose the side and draw both projections of every block.

        Args:
            layout: the parameters.
            snapshot: key of the snapshot.

        Returns:
            The linear map.

        Raises:
            ValueError: if the parameters are more than the features.
        """
        blocks = matrix_blocks(layout)
        if len(blocks) > self.proj_dim:
            raise ValueError(
                f"Expected argument `proj_dim` to be at least {len(blocks)}, one for each weight of the module, but "
                f"got {self.proj_dim}. Raise it, or freeze parameters that should not be attributed."
            )
        largest = max(max(block.rows, block.columns) for block in blocks)
        low, high = 1, largest  # bisection: the total grows with the side
        while low < high:
            side = (low + high + 1) // 2
            low, high = (side, high) if _total(blocks, side) <= self.proj_dim else (low, side - 1)
        key = (self.seed, snapshot)
        return TwoSidedProjection([
            (block, Sides.draw(low, block.rows, block.columns, key, block.weight)) for block in blocks
        ])


@dataclass(frozen=True)
class MatrixBlock:
    """A weight seen as a matrix, with its bias as last column if it has one; a vector has one column.

    Args:
        weight: name of the parameter.
        bias: name of the bias that is the last column; None without one.
        rows: of the matrix.
        columns: of the matrix, that of the bias among them.

    Example:
        >>> MatrixBlock("0.weight", "0.bias", 8, 11).size(4)
        16
    """

    weight: str
    bias: str | None
    rows: int
    columns: int

    def size(self, side: int) -> int:
        """Count the entries with at most ``side`` rows and columns."""
        return min(side, self.rows) * min(side, self.columns)


def matrix_blocks(layout: ParameterLayout) -> list[MatrixBlock]:
    """See each weight of a layout as a matrix.

    Returns the blocks, in the order of the layout; a bias is in the block of its weight.

    Example:
        >>> matrix_blocks(ParameterLayout({"weight": (8, 10), "bias": (8,)}))
        [MatrixBlock(weight='weight', bias='bias', rows=8, columns=11)]
    """
    biases = {name: layout.bias_of(name) for name in layout.shapes}
    merged = set(biases.values())
    blocks = []
    for name, shape in layout.shapes.items():
        if name not in merged:
            rows, columns = (shape[0] if shape else 1), math.prod(shape[1:])
            blocks.append(MatrixBlock(name, biases[name], rows, columns + (biases[name] is not None)))
    return blocks


def _total(blocks: list[MatrixBlock], side: int) -> int:
    return sum(block.size(side) for block in blocks)


class TwoSidedProjection(Projection):
    """Projects the gradient of each block from both sides; a block's features are its entries, row after row.

    Args:
        sides: each block with its two matrices.

    Example:
        >>> block = MatrixBlock("weight", None, 2, 2)
        >>> projection = TwoSidedProjection([(block, Sides(torch.ones(1, 2), None))])
        >>> features = torch.zeros(1, projection.dim)
        >>> projection.accumulate(features, "weight", torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))
        >>> features
        tensor([[4., 6.]])
    """

    def __init__(self, sides: list[tuple[MatrixBlock, Sides]]) -> None:
        self.maps: dict[str, _TwoSided] = {}
        self.last_columns: dict[str, _LastColumn] = {}
        start = 0
        for block, matrices in sides:
            stop = start + matrices.rows(block.rows) * matrices.columns(block.columns)
            two_sided = _TwoSided(slice(start, stop), block, matrices)
            self.maps[block.weight] = two_sided
            if block.bias is not None:
                self.last_columns[block.bias] = _LastColumn(two_sided)
            start = stop
        super().__init__(start)
        self.layers = by_layer({name: two_sided.slot for name, two_sided in self.maps.items()})

    def accumulate(self, features: Tensor, name: str, gradient: ParameterGradient) -> None:  # noqa: D102 - inherited
        self._add(features, set(), {name: gradient})

    def accumulate_layer(  # noqa: D102 - inherited
        self, features: Tensor, gradients: Mapping[str, ParameterGradient]
    ) -> None:
        self._add(features, set(), gradients)

    @contextmanager
    def filling(self, features: Tensor) -> Iterator[Callable[[Mapping[str, ParameterGradient]], None]]:
        """Fill the features of a batch; blocks without gradients become zero.

        Shapes: features (b, dim). Yields a function that adds the gradients from one use of a layer.
        """
        fresh = set(self.maps)
        yield partial(self._add, features, fresh)
        for name in fresh:
            features[:, self.maps[name].slot] = 0

    def known(self, gradients: Mapping[str, ParameterGradient]) -> dict[str, ParameterGradient]:
        """Leave out the gradients of parameters that are in no block.

        Returns those that have features.
        """
        return {name: g for name, g in gradients.items() if name in self.maps or name in self.last_columns}

    def _add(self, features: Tensor, fresh: set[str], gradients: Mapping[str, ParameterGradient]) -> None:
        """Add the gradients of a layer; what a block in ``fresh`` holds is overwritten, and then it is not fresh."""
        rest = dict(gradients)
        for name, gradient in gradients.items():
            block = self.maps.get(name)
            bias = None if block is None or block.bias is None else gradients.get(block.bias)
            if block is not None and isinstance(bias, RowSum) and bias.weight is gradient:
                block.accumulate(features, bias.weight, name in fresh, bias)
                fresh.discard(name)
                del rest[name], rest[str(block.bias)]
        for name, gradient in rest.items():
            part = self.maps.get(name) or self.last_columns[name]
            part.accumulate(features, gradient, part.name in fresh)
            fresh.discard(part.name)


class Sides:
    """The two matrices that project a weight's gradient from both sides, ``left @ G @ right.T``.

    Args:
        left: ``(k_rows, rows)``, or None for the identity.
        right: ``(k_columns, columns)``, or None for the identity.
        name: of the weight, for the log.

    Example:
        >>> Sides(torch.ones(1, 2), None).project(torch.eye(2).unsqueeze(0), like=torch.zeros(()))
        tensor([[[1., 1.]]])
    """

    def __init__(self, left: Tensor | None, right: Tensor | None, name: str = "weight") -> None:
        self.left = left
        self.right = right
        self.name = name
        self._noted = False
        self._place: tuple[torch.device, torch.dtype] | None = None

    @classmethod
    def draw(cls, side: int, rows: int, columns: int, key: tuple[object, ...], name: str) -> Sides:
        """Draw both, each to ``side`` dimensions; one that has no more is kept as it is.

        Returns matrices of signs over ``sqrt(side)``.
        """
        return cls(_side(side, rows, (*key, name, "rows")), _side(side, columns, (*key, name, "columns")), name)

    def rows(self, rows: int) -> int:
        """Count the rows of a projected gradient that has ``rows``."""
        return rows if self.left is None else self.left.shape[0]

    def columns(self, columns: int) -> int:
        """Count the columns of a projected gradient that has ``columns``."""
        return columns if self.right is None else self.right.shape[0]

    def note(self, gradient: FactoredGradient, left: Tensor | None, right: Tensor | None) -> None:
        """Log, once, which way is taken."""
        if not self._noted:
            way = "materialised, then projected" if gradient.materialises(left, right) else "projected factor by factor"
            log.debug("%s: gradients are %s.", self.name, way)
            self._noted = True

    def on(self, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Put both on a device and into a dtype; moved once, then kept."""
        if self._place != (like.device, like.dtype):
            self.left, self.right = (None if side is None else side.to(like) for side in (self.left, self.right))
            self._place = (like.device, like.dtype)
        return self.left, self.right

    def project(self, gradient: ParameterGradient, like: Tensor, columns: int | None = None) -> Tensor:
        """Project the gradients of a batch.

        Shapes: gradient (b, rows, columns). Returns ``(b, k_rows, k_columns)``.
        """
        left, right = self.on(like)
        right = right if right is None else right[:, :columns]
        if isinstance(gradient, FactoredGradient):
            self.note(gradient, left, right)
            return gradient.project(left, right)
        return two_sided(gradient, left, right)


def _side(side: int, size: int, key: tuple[object, ...]) -> Tensor | None:
    """Draw one side's projection, ``(side, size)``; None for the identity where there is nothing to reduce."""
    if size <= side:
        return None
    return rademacher((side, size), *key).to(torch.float32) / math.sqrt(side)


def _wide(side: Tensor) -> Tensor:
    """Add rows of zeros up to a multiple of four: matrix products are faster by up to two fifths."""
    return F.pad(side, (0, 0, 0, -len(side) % 4))


class _TwoSided:
    """The map of a block's weight."""

    def __init__(self, slot: slice, block: MatrixBlock, sides: Sides) -> None:
        self.slot = slot
        self.name = block.weight
        self.bias = block.bias
        self.block = block
        self.sides = sides
        # What they were made of, and then what `_split_sides` gives.
        self._split: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None] | None = None

    def accumulate(
        self, features: Tensor, gradient: ParameterGradient, fresh: bool, bias: RowSum | None = None
    ) -> None:
        """Add the weight's gradients, with those of the bias if it came with them."""
        left, right = self.sides.on(features)
        if self.block.columns == 1 and isinstance(gradient, Tensor):  # in one call
            rows = gradient.reshape(len(features), -1)
            slot = features[:, self.slot]
            if left is None:
                slot.copy_(rows) if fresh else slot.add_(rows)
            else:
                slot.addmm_(rows, left.T, beta=0 if fresh else 1)
            return
        target, apart = self.view(features), self.block.bias is not None and right is None
        if apart:  # the column of the bias is kept as it is
            column, target = target[:, :, -1:], target[:, :, :-1]
            if bias is not None:
                bias.accumulate(column, left, None, None, fresh)
            elif fresh:
                column.zero_()
        if isinstance(gradient, FactoredGradient):
            left, right, last = self._split_sides(gradient, left, right)
            self.sides.note(gradient, left, right)
            gradient.accumulate(target, left, right, None if apart or bias is None else last, fresh)
            return
        columns = self.block.columns - (self.block.bias is not None)
        projected = self.sides.project(gradient.reshape(-1, self.block.rows, columns), features, columns)
        target.copy_(projected) if fresh else target.add_(projected)

    def _split_sides(
        self, gradient: FactoredGradient, left: Tensor | None, right: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The left side, the right side of the weight, and that of the bias, as products want them."""
        key = left if right is None else right
        if self._split is None or self._split[0] is not key:  # once for all batches
            rows, columns, last = left, right, None
            if not isinstance(gradient, ConvSum):
                rows, columns = (None if side is None else _wide(side) for side in (left, right))
            if columns is not None and self.block.bias is not None:
                columns, last = columns[:, :-1].contiguous(), columns[:, -1].contiguous()
            self._split = key, rows, columns, last
        return self._split[1:]

    def view(self, features: Tensor) -> Tensor:
        """The block's features as matrices, ``(b, k_rows, k_columns)``."""
        return features[:, self.slot].view(len(features), self.sides.rows(self.block.rows), -1)


class _LastColumn:
    """The map of a bias: the last column of its weight."""

    def __init__(self, weight: _TwoSided) -> None:
        self.weight = weight
        self.name = weight.name

    def accumulate(self, features: Tensor, gradient: ParameterGradient, fresh: bool) -> None:
        if fresh:
            features[:, self.weight.slot] = 0
        left, right = self.weight.sides.on(features)
        if isinstance(gradient, FactoredGradient):
            gradient = gradient.materialise()
        column = gradient.reshape(len(features), -1)  # (b, rows)
        column = column if left is None else column @ left.T
        block = self.weight.view(features)
        if right is None:
            block[:, :, -1] += column
        else:
            block += column.unsqueeze(2) * right[:, -1]
