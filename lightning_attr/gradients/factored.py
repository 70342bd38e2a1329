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

from lightning_attr.gradients.products import materialising_is_cheaper, two_sided


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

    def materialises(self, left: Tensor | None, right: Tensor | None) -> bool:
        """Whether :meth:`project` forms the gradients first, because that costs less.

        Args:
            left: as in :meth:`project`.
            right: likewise.

        Returns:
            False unless a form says otherwise.
        """
        return False

    def accumulate(
        self, target: Tensor, left: Tensor | None, right: Tensor | None, shift: Tensor | None, fresh: bool
    ) -> None:
        """Add the projection to ``target``, ``(b, k_rows, k_columns)``, or overwrite it where it is ``fresh``.

        Args:
            target: changed in place.
            left: as in :meth:`project`; what it and the next two have beyond the target's sizes is not used.
            right: likewise.
            shift: projected column of the bias, ``(k_columns,)``, to add what its :class:`RowSum` has there; or None.
            fresh: whether what the target holds is to be forgotten.
        """
        assert shift is None  # else a RowSum was of a form that it cannot be of
        _write(target, self.project(left, right), fresh)

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
        if self.materialises(left, right):
            return two_sided(torch.bmm(self.rows.mT, self.columns), left, right)
        return _sum_of_outer(_apply(left, self.rows), _apply(right, self.columns))

    def materialises(self, left: Tensor | None, right: Tensor | None) -> bool:  # noqa: D102 - inherited
        return materialising_is_cheaper(self.rows.shape[1], self.rows.shape[2], self.columns.shape[2], left, right)

    def accumulate(  # noqa: D102 - inherited
        self, target: Tensor, left: Tensor | None, right: Tensor | None, shift: Tensor | None, fresh: bool
    ) -> None:
        _, k_rows, k_columns = target.shape
        if self.rows.shape[1] == 1:  # in as few calls as can be: small models spend their time on these
            rows, columns = _apply(left, self.rows).mT, _apply(right, self.columns, shift)
            rows, columns = rows[:, :k_rows], columns[:, :, :k_columns]
            torch.mul(rows, columns, out=target) if fresh else target.addcmul_(rows, columns)
            return
        if self.materialises(left, right):
            projected = self.project(left, right)
            if shift is not None:
                projected.addcmul_(_apply(left, self.row_sum().unsqueeze(1)).mT, shift)
        else:
            projected = torch.bmm(_apply(left, self.rows).mT, _apply(right, self.columns, shift))
        _write(target, projected, fresh)

    def row_sum(self) -> Tensor:
        """Sum the factors on the side of the rows, ``(b, rows)``."""
        return self.rows.sum(1)


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
        padding: Sequence[int] | None = None,
    ) -> None:
        self.inputs = inputs
        self.backprops = backprops
        self.kernel_size = tuple(kernel_size)
        self.stride = tuple(stride)
        self.dilation = tuple(dilation)
        self.groups = groups
        self.padding = (0,) * len(self.kernel_size) if padding is None else tuple(padding)

    def project(self, left: Tensor | None, right: Tensor | None) -> Tensor:  # noqa: D102 - inherited
        if self.materialises(left, right):
            return two_sided(self._combine(None, self._patches()), left, right)
        return self._combine(left, self._patches() if right is None else self._project_patches(right))

    def materialises(self, left: Tensor | None, right: Tensor | None) -> bool:  # noqa: D102 - inherited
        rows, columns = self.backprops.shape[1], self.inputs.shape[1] // self.groups * math.prod(self.kernel_size)
        return materialising_is_cheaper(math.prod(self.backprops.shape[2:]), rows, columns, left, right)

    def accumulate(  # noqa: D102 - inherited
        self, target: Tensor, left: Tensor | None, right: Tensor | None, shift: Tensor | None, fresh: bool
    ) -> None:
        if right is None or shift is None:
            _write(target, self.project(left, right), fresh)
        else:
            _write(target, self._combine(left, self._project_patches(right, shift)), fresh)

    def row_sum(self) -> Tensor:
        """Sum the gradient at the output over positions, ``(b, c_out)``."""
        return self.backprops.flatten(2).sum(2)

    def _combine(self, left: Tensor | None, columns: Tensor) -> Tensor:
        """Sum the outer products over positions; ``columns`` are ``(b, g, k_columns, l)``."""
        b, groups = self.backprops.shape[0], self.groups
        if groups == 1:
            rows = self.backprops.flatten(2)
            rows = rows if left is None else torch.bmm(left.expand(b, *left.shape), rows)
            return torch.bmm(rows, columns.squeeze(1).mT)
        rows = self.backprops.reshape(b, groups, -1, columns.shape[-1])  # (b, g, c_out / g, l)
        if left is None:  # each row belongs to one group
            return (rows @ columns.mT).reshape(b, -1, columns.shape[2])
        weights = left.reshape(left.shape[0], groups, -1).transpose(0, 1)  # (g, k_rows, c_out / g)
        return torch.bmm((weights @ rows).transpose(1, 2).flatten(2), columns.transpose(1, 2).flatten(2).mT)

    def _project_patches(self, right: Tensor, shift: Tensor | None = None) -> Tensor:
        """Project each patch, and add ``shift`` to it: ``(b, g, k_columns, l)``."""
        if self.groups == 1 and set(self.kernel_size) == set(self.stride) == {1} and not any(self.padding):
            inputs, kernel = self.inputs.flatten(2), right.expand(self.inputs.shape[0], *right.shape)
            out = torch.bmm(kernel, inputs) if shift is None else torch.baddbmm(shift[:, None], kernel, inputs)
            return out.unsqueeze(1)
        kernel = right.reshape(right.shape[0], -1, *self.kernel_size)
        if self.groups > 1:
            kernel = kernel.repeat(self.groups, *[1] * (kernel.ndim - 1))
            shift = None if shift is None else shift.repeat(self.groups)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel_size) - 1]
        out = convolve(self.inputs, kernel, shift, self.stride, self.padding, self.dilation, self.groups)
        return out.reshape(out.shape[0], self.groups, right.shape[0], -1)

    def part(self, samples: slice) -> ConvSum:
        """Take some samples of the batch.

        Args:
            samples: which.

        Returns:
            Their gradients, as views.
        """
        sizes = (self.kernel_size, self.stride, self.dilation, self.groups, self.padding)
        return ConvSum(self.inputs[samples], self.backprops[samples], *sizes)

    def windows(self) -> Tensor:
        """View the padded input as windows, ``(b, groups, c_in / groups, *out_size, *kernel_size)``."""
        x = self.inputs
        if any(self.padding):
            x = F.pad(x, [size for size in reversed(self.padding) for _ in range(2)])
        for i, (size, step, spread) in enumerate(zip(self.kernel_size, self.stride, self.dilation, strict=True)):
            x = x.unfold(2 + i, (size - 1) * spread + 1, step)[..., ::spread]  # (b, c_in, *out_size, ..., size)
        windows: Tensor = x.unflatten(1, (self.groups, -1))
        return windows

    def _patches(self) -> Tensor:
        x, dims = self.windows(), len(self.kernel_size)
        # Positions innermost, so that long runs are copied.
        x = x.permute(0, 1, 2, *range(3 + dims, 3 + 2 * dims), *range(3, 3 + dims))
        return x.reshape(*x.shape[:2], math.prod(x.shape[2 : 3 + dims]), -1)  # (b, g, c * window, l)


class RowSum(FactoredGradient):
    """Gradients of a bias: what the weight's would be for a column of ones, the sum of its factors over positions.

    A projector that treats a bias as the last column of its weight adds both at once, at the price of the weight.

    Args:
        weight: gradients of the weight, of whose use the bias is a part.

    Example:
        >>> import torch
        >>> weight = OuterSum(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0, 4.0]]]))
        >>> materialise(RowSum(weight), (2,))
        tensor([[1., 2.]])
    """

    def __init__(self, weight: OuterSum | ConvSum) -> None:
        self.weight = weight

    def project(self, left: Tensor | None, right: Tensor | None) -> Tensor:  # noqa: D102 - inherited
        return two_sided(self.weight.row_sum().unsqueeze(2), left, right)


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


def single_product(gradient: ParameterGradient) -> OuterSum | None:
    """Give the one outer product that each sample's gradient of a weight is; for a bias, that of its weight.

    Returns the gradients, with one position; None if they are of another form, or sums.

    Example:
        >>> import torch
        >>> product = OuterSum(torch.ones(5, 1, 2), torch.ones(5, 1, 3))
        >>> single_product(RowSum(product)) is product, single_product(torch.ones(5, 2, 3))
        (True, None)
    """
    weight = gradient.weight if isinstance(gradient, RowSum) else gradient
    return weight if isinstance(weight, OuterSum) and weight.rows.shape[1] == 1 else None


def _apply(matrix: Tensor | None, factors: Tensor, shift: Tensor | None = None) -> Tensor:
    """Project factors, ``(k, d), (b, s, d) -> (b, s, k)``, and add ``shift`` to each."""
    if matrix is None:
        return factors
    b, s, d = factors.shape
    if s == 1:
        rows = factors[:, 0]
        return (torch.mm(rows, matrix.T) if shift is None else torch.addmm(shift, rows, matrix.T)).unsqueeze(1)
    # This way around a matrix product of few rows is up to twice as fast.
    projected = torch.mm(matrix, factors.reshape(-1, d).T)
    if shift is not None:
        projected += shift.unsqueeze(1)
    return projected.view(-1, b, s).permute(1, 2, 0)


def _sum_of_outer(rows: Tensor, columns: Tensor) -> Tensor:
    """Sum the outer products over positions: ``(b, s, r), (b, s, c) -> (b, r, c)``."""
    if rows.shape[1] == 1:  # broadcasting beats a batched product of inner dimension one
        return rows.mT * columns
    return torch.bmm(rows.mT, columns)


def _write(target: Tensor, projected: Tensor, fresh: bool) -> None:
    """Add to the target, or overwrite it, without what is beyond its sizes."""
    projected = projected[:, : target.shape[1], : target.shape[2]]
    target.copy_(projected) if fresh else target.add_(projected)
