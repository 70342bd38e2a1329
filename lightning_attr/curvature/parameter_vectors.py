"""Vectors of parameter space as rows: a tensor or a dict of tensors, one or several at once, to ``(r, p)`` and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

Point: TypeAlias = Tensor | Mapping[str, Tensor]
Product: TypeAlias = Callable[[Tensor], Tensor]  # (r, p) -> (r, p), a linear map applied to every row


class RowSpace:
    """The flattening of a point: dict entries in their order, each row-major.

    Args:
        point: a tensor, or name -> tensor; floating point.

    Raises:
        ValueError: if the point is empty or not floating point.

    Example:
        >>> space = RowSpace({"w": torch.zeros(2, 2), "b": torch.zeros(2)})
        >>> rows, many = space.rows({"w": torch.ones(3, 2, 2), "b": torch.zeros(3, 2)})
        >>> rows.shape, many
        (torch.Size([3, 6]), True)
        >>> space.structure(rows)["w"].shape
        torch.Size([3, 2, 2])
    """

    def __init__(self, point: Point) -> None:
        self.is_tensor = isinstance(point, Tensor)
        self.tensors = {"": point} if isinstance(point, Tensor) else dict(point)
        wrong = [name for name, tensor in self.tensors.items() if not tensor.dtype.is_floating_point]
        self.sizes = [tensor.numel() for tensor in self.tensors.values()]
        self.size = sum(self.sizes)
        if wrong or not self.size:
            raise ValueError(
                "Expected the argument that `argnums` points at to be a floating-point tensor or a dict of them, with "
                f"at least one entry, but got {f'other dtypes for {wrong}' if wrong else 'none'}."
            )
        first = next(iter(self.tensors.values()))
        self.device = first.device
        self.dtype = torch.float64 if first.dtype == torch.float64 else torch.float32

    def rows(self, vectors: Point) -> tuple[Tensor, bool]:
        """Flatten vectors.

        Returns the rows ``(r, p)``, and whether there was a dimension for them; without, ``r`` is 1.
        """
        if isinstance(vectors, Tensor) != self.is_tensor:
            kinds = ("a tensor", "a dict of tensors") if self.is_tensor else ("a dict of tensors", "a tensor")
            raise TypeError(f"Expected argument `v` to be {kinds[0]}, like the point, but got {kinds[1]}.")
        given = {"": vectors} if isinstance(vectors, Tensor) else dict(vectors)
        if given.keys() != self.tensors.keys():
            raise ValueError(
                f"Expected argument `v` to have the entries of the point, {list(self.tensors)}, but got {list(given)}."
            )
        first, point = next((given[name], tensor) for name, tensor in self.tensors.items())
        many = first.ndim == point.ndim + 1
        count = len(first) if many else 1
        lead = (count,) if many else ()
        for name, tensor in self.tensors.items():
            if given[name].shape != (*lead, *tensor.shape):
                raise ValueError(
                    f"Expected argument `v` to have the shape of the point, {tuple(tensor.shape)}, or that with one "
                    f"dimension in front for several vectors (the same in every entry), but got "
                    f"{tuple(given[name].shape)}{f' for {name!r}' if name else ''}."
                )
        flat = [given[name].detach().reshape(count, size) for name, size in zip(self.tensors, self.sizes, strict=True)]
        return (flat[0] if self.is_tensor else torch.cat(flat, 1)), many

    def structure(self, rows: Tensor, many: bool = True) -> Point:
        """Undo :meth:`rows`.

        Shapes: rows (r, p). Returns a tensor or a dict, as the point is, in the rows' dtype.
        """
        parts = rows.split(self.sizes, 1)
        lead = (len(rows),) if many else ()
        shaped = {
            name: (part if many else part[0]).reshape((*lead, *tensor.shape))
            for (name, tensor), part in zip(self.tensors.items(), parts, strict=True)
        }
        return shaped[""] if self.is_tensor else shaped


def applied(product: Product, rows: Tensor) -> Tensor:
    """Apply a product and look at what it returns.

    Shapes: rows (r, p). Returns ``(r, p)``, in the rows' dtype.
    """
    result = product(rows)
    if result.shape != rows.shape:
        raise ValueError(
            f"Expected argument `product` to map rows of shape {tuple(rows.shape)} to that shape, but got "
            f"{tuple(result.shape)}."
        )
    # One number tells in most cases; a sum may also overflow.
    if not math.isfinite(result.sum().item()) and not result.isfinite().all():
        raise ValueError(
            "Expected the product with the curvature to be finite, but it holds NaN or infinite values. Look for them "
            "in the parameters and the data, and for functions without a second derivative there, such as sqrt at 0."
        )
    return result.to(rows.dtype)


def row_dots(left: Tensor, right: Tensor) -> Tensor:
    """Multiply row by row, in float64.

    Shapes: left (r, p), right (r, p). Returns ``(r,)``, float64.
    """
    return (left.double() * right.double()).sum(1)


def checked_rows(rows: Tensor) -> Tensor:
    """Look at the right-hand sides of a solver."""
    if rows.ndim != 2 or not rows.dtype.is_floating_point:
        raise ValueError(
            "Expected argument `rhs` to be a floating-point matrix of vectors (r, p), but got shape "
            f"{tuple(rows.shape)} and {rows.dtype}."
        )
    bad = (~rows.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"Expected finite right-hand sides, but the rows {bad} hold NaN or infinite values.")
    return rows
