"""Inner products of per-sample gradients with one vector, without forming the gradients of linear layers."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lightning_attr.gradients.factored import OuterSum, ParameterGradient, RowSum
from lightning_attr.projectors.base import Projection, flat_rows


class InnerProduct(Projection):
    r"""One feature a sample, :math:`\phi = \langle v, g \rangle`.

    Of a linear layer, :math:`\langle V, \sum_s \delta_s a_s^\top \rangle = \sum_s \delta_s^\top V a_s` takes what a
    forward pass of the layer takes.

    Args:
        vector: parameter name -> its part of ``v``, in the parameter's shape; parameters that it has not count as zero.

    Example:
        >>> import torch
        >>> product = InnerProduct({"w": torch.tensor([[1.0, 2.0]])})
        >>> features = torch.zeros(1, 1)
        >>> product.accumulate(features, "w", OuterSum(torch.ones(1, 1, 1), torch.tensor([[[3.0, 4.0]]])))
        >>> features
        tensor([[11.]])
    """

    def __init__(self, vector: Mapping[str, Tensor]) -> None:
        super().__init__(1)
        self.vector = vector
        self.names = frozenset(vector)

    def accumulate(self, features: Tensor, name: str, gradient: ParameterGradient) -> None:  # noqa: D102 - inherited
        if name in self.vector:
            features[:, 0] += self._products(self.vector[name].to(features), gradient)

    def _products(self, vector: Tensor, gradient: ParameterGradient) -> Tensor:
        """Products with the gradients of one parameter, ``(b,)``."""
        if isinstance(gradient, OuterSum):
            matrix = vector.reshape(gradient.rows.shape[2], gradient.columns.shape[2])
            rows, columns = gradient.rows.to(matrix.dtype), gradient.columns.to(matrix.dtype)
            return ((rows @ matrix) * columns).sum((1, 2))
        if isinstance(gradient, RowSum):
            return gradient.weight.row_sum().to(vector.dtype) @ vector.flatten()
        return flat_rows(gradient, tuple(vector.shape)).to(vector.dtype) @ vector.flatten()
