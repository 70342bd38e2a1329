r"""Some entries of a weight's gradient, projected from both sides.

With :math:`G = \sum_s \delta_s a_s^\top` the entry :math:`(i, j)` is :math:`\sum_s (L \delta_s)_i (R a_s)_j`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_attr.gradients.factored import OuterSum, ParameterGradient, RowSum
from lightning_attr.projectors.kronecker import MatrixBlock, Sides, TwoSidedProjection


class ChosenEntries:
    """Computes chosen entries of one block.

    Args:
        block: the weight, with its bias if it has one.
        sides: both matrices, whole.
        entries: numbers of the chosen entries of ``left @ G @ right.T``, row after row, increasing.
        start: column of the first of them in the features.

    Attributes:
        slot: their columns.

    Example:
        >>> block = MatrixBlock("weight", None, 2, 2)
        >>> entries = ChosenEntries(block, Sides(torch.eye(2), torch.eye(2)), torch.tensor([1, 2]), start=0)
        >>> features = torch.zeros(1, 2)
        >>> entries.add(features, {"weight": torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])}, fresh=True)
        >>> features
        tensor([[2., 3.]])
    """

    def __init__(self, block: MatrixBlock, sides: Sides, entries: Tensor, start: int) -> None:
        self.block, self.sides, self.entries = block, sides, entries
        self.slot = slice(start, start + len(entries))
        self._rectangle = TwoSidedProjection([(block, sides)])
        columns = sides.columns(block.columns)
        self._row, self._column = entries // columns, entries % columns

    def add(self, features: Tensor, gradients: Mapping[str, ParameterGradient], fresh: bool) -> None:
        """Add the gradients of one use of the layer.

        Shapes: features (b, dim).
        """
        if self.entries.device != features.device:  # moved once, then kept
            self.entries, self._row, self._column = (
                index.to(features.device) for index in (self.entries, self._row, self._column)
            )
        target = features[:, self.slot]
        product = self._single(gradients)
        if product is not None:
            rows, columns = self._factors(product, features)
            rows, columns = rows.index_select(1, self._row), columns.index_select(1, self._column)
            torch.mul(rows, columns, out=target) if fresh else target.addcmul_(rows, columns)
            return
        own = {name: gradient for name, gradient in gradients.items() if name in {self.block.weight, self.block.bias}}
        rectangle = features.new_empty(len(features), self._rectangle.dim)
        with self._rectangle.filling(rectangle) as add:
            add(own)
        found = rectangle.index_select(1, self.entries)
        target.copy_(found) if fresh else target.add_(found)

    def _single(self, gradients: Mapping[str, ParameterGradient]) -> OuterSum | None:
        """The one product that weight and bias share, if it is one: its entries need no rectangle."""
        weight = gradients.get(self.block.weight)
        if not isinstance(weight, OuterSum) or weight.rows.shape[1] != 1:
            return None
        bias = None if self.block.bias is None else gradients.get(self.block.bias)
        together = self.block.bias is None or (isinstance(bias, RowSum) and bias.weight is weight)
        return weight if together else None

    def _factors(self, product: OuterSum, like: Tensor) -> tuple[Tensor, Tensor]:
        """Both factors on the sides, ``(b, k_rows)`` and ``(b, k_columns)``."""
        left, right = self.sides.on(like)
        assert left is not None
        assert right is not None
        rows, columns = product.rows[:, 0] @ left.T, product.columns[:, 0]
        if self.block.bias is None:
            return rows, columns @ right.T
        return rows, torch.addmm(right[:, -1], columns, right[:, :-1].T)
