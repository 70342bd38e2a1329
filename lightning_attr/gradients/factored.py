r"""Per-sample gradients of weight matrices as sums of outer products, :math:`G_i = \sum_s u_{is} v_{is}^\top`.

A layer's gradient is never formed unless asked for: projected from both sides it costs only the projection of its
factors (Choe et al., 2024, LoGra). Weights of more than two dimensions count as matrices ``(shape[0], everything
else)``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ConvSum", "FactoredGradient", "GatherSum", "OuterSum", "ParameterGradient", "materialise"]


class FactoredGradient(ABC):
    """Per-sample gradients of one ``(rows, columns)`` weight, for a batch of ``b`` samples.

    Example:
        >>> import torch
        >>> class Diagonal(FactoredGradient):              # a form of your own: of a weight that acts on each feature
        ...     def __init__(self, entries):
        ...         self.entries = entries
        ...     def project(self, left, right):
        ...         gradients = torch.diag_embed(self.entries)
        ...         gradients = gradients if left is None else left @ gradients
        ...         return gradients if right is None else gradients @ right.T
        >>> Diagonal(torch.tensor([[1.0, 2.0]])).project(torch.ones(1, 2), None)
        tensor([[[1., 2.]]])
    """

    @abstractmethod
    def project(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        """Project every sample's gradient from both sides.

        Args:
            left: ``(k_rows, rows)``, or None for the identity.
            right: ``(k_columns, columns)``, or None for the identity.

        Returns:
            ``left @ G_i @ right.T`` for each sample, ``(b, k_rows, k_columns)``.
        """

    def materialise(self) -> Tensor:
        """Form the gradients.

        Returns:
            ``(b, rows, columns)``.
        """
        return self.project(None, None)


class OuterSum(FactoredGradient):
    r"""Gradients of a linear map: :math:`\sum_s \delta_{is} a_{is}^\top` over the positions ``s`` of a sample.

    Args:
        rows: factors on the side of the rows, float, ``(b, s, rows)``.
        columns: factors on the side of the columns, float, ``(b, s, columns)``.

    Example:
        >>> import torch
        >>> OuterSum(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0, 4.0]]])).materialise()
        tensor([[[3., 4.],
                 [6., 8.]]])
    """

    def __init__(self, rows: Tensor, columns: Tensor) -> None:
        self.rows = rows
        self.columns = columns

    def project(self, left: Tensor | None, right: Tensor | None) -> Tensor:  # noqa: D102 - inherited
        return _sum_of_outer(_apply(left, self.rows), _apply(right, self.columns))


class GatherSum(FactoredGradient):
    """Gradients of a table of rows: factor ``s`` of a sample belongs to the row ``ids[i, s]``.

    Args:
        ids: rows of the table, integer, ``(b, s)``.
        columns: factors on the side of the columns, float, ``(b, s, columns)``.
        num_rows: rows of the table.

    Example:
        >>> import torch
        >>> GatherSum(torch.tensor([[1, 1]]), torch.tensor([[[2.0], [3.0]]]), num_rows=2).materialise()
        tensor([[[0.],
                 [5.]]])
    """

    def __init__(self, ids: Tensor, columns: Tensor, num_rows: int) -> None:
        self.ids = ids
        self.columns = columns
        self.num_rows = num_rows

    def project(self, left: Tensor | None, right: Tensor | None) -> Tensor:  # noqa: D102 - inherited
        columns = _apply(right, self.columns)
        if left is not None:
            return _sum_of_outer(left.T[self.ids], columns)
        table = columns.new_zeros(columns.shape[0], self.num_rows, columns.shape[2])
        return table.scatter_add_(1, self.ids.unsqueeze(2).expand_as(columns), columns)


class ConvSum(FactoredGradient):
    """Gradients of a convolution of any number of dimensions, with stride, dilation and groups.

    Projecting the columns is a convolution with the projection as kernel, so that no patch is ever unfolded.

    Args:
        inputs: the layer's input, already padded, float, ``(b, c_in, *size)``.
        backprops: gradient at its output, float, ``(b, c_out, *out_size)``.
        kernel_size: one number a dimension.
        stride: one number a dimension.
        dilation: one number a dimension.
        groups: groups of channels.

    Example:
        >>> import torch
        >>> x, delta = torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[[1.0, 10.0]]])
        >>> ConvSum(x, delta, kernel_size=(2,), stride=(1,), dilation=(1,), groups=1).materialise()
        tensor([[[21., 32.]]])
    """

    def __init__(
        self,
        inputs: Tensor,
        backprops: Tensor,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> None:
        self.inputs = inputs
        self.backprops = backprops
        self.kernel_size = tuple(kernel_size)
        self.stride = tuple(stride)
        self.dilation = tuple(dilation)
        self.groups = groups

    def project(self, left: Tensor | None, right: Tensor | None) -> Tensor:  # noqa: D102 - inherited
        b, groups = self.backprops.shape[0], self.groups
        columns = self._patches() if right is None else self._project_patches(right)  # (b, g, k_columns, l)
        rows = self.backprops.reshape(b, groups, -1, columns.shape[-1])  # (b, g, c_out / g, l)
        if left is None:  # each row belongs to one group
            return (rows @ columns.mT).reshape(b, -1, columns.shape[2])
        weights = left.reshape(left.shape[0], groups, -1).transpose(0, 1)  # (g, k_rows, c_out / g)
        rows = weights @ rows  # (b, g, k_rows, l)
        return _sum_of_outer(rows.transpose(1, 2).flatten(2).mT, columns.transpose(1, 2).flatten(2).mT)

    def _project_patches(self, right: Tensor) -> Tensor:
        kernel = right.reshape(right.shape[0], -1, *self.kernel_size).repeat(self.groups, *[1] * (self.inputs.ndim - 1))
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel_size) - 1]
        out = convolve(self.inputs, kernel, stride=self.stride, dilation=self.dilation, groups=self.groups)
        return out.reshape(out.shape[0], self.groups, right.shape[0], -1)

    def _patches(self) -> Tensor:
        x = self.inputs
        dims = len(self.kernel_size)
        for i, (size, step, spread) in enumerate(zip(self.kernel_size, self.stride, self.dilation, strict=True)):
            x = x.unfold(2 + i, (size - 1) * spread + 1, step)[..., ::spread]  # (b, c_in, *out_size, ..., size)
        b, c_in = x.shape[:2]
        x = x.reshape(b, self.groups, c_in // self.groups, math.prod(x.shape[2 : 2 + dims]), -1)  # (b, g, c, l, window)
        return x.transpose(3, 4).flatten(2, 3)  # (b, g, c * window, l)


ParameterGradient: TypeAlias = Tensor | FactoredGradient


def materialise(gradient: ParameterGradient, shape: tuple[int, ...]) -> Tensor:
    """Form per-sample gradients in the shape of their parameter.

    Args:
        gradient: what a sink receives, for a batch of ``b``.
        shape: the parameter's.

    Returns:
        ``(b, *shape)``.

    Example:
        >>> import torch
        >>> materialise(torch.ones(5, 6), (2, 3)).shape
        torch.Size([5, 2, 3])
    """
    tensor = gradient.materialise() if isinstance(gradient, FactoredGradient) else gradient
    return tensor.reshape(tensor.shape[0], *shape)


def _apply(matrix: Tensor | None, factors: Tensor) -> Tensor:
    return factors if matrix is None else factors @ matrix.T


def _sum_of_outer(rows: Tensor, columns: Tensor) -> Tensor:
    """Sum the outer products over positions: ``(b, s, r), (b, s, c) -> (b, r, c)``."""
    if rows.shape[1] == 1:  # broadcasting beats a batched product of inner dimension one
        return rows.mT * columns
    return torch.bmm(rows.mT, columns)
