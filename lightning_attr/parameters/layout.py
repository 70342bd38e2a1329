"""Which parameters are attributed: their names and shapes, in a fixed order."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


def as_pairs(tensor: Tensor) -> Tensor:
    """Give a complex tensor as pairs of real numbers, so that products of gradients are those of real numbers.

    Shapes: tensor (...). Returns the same numbers, ``(..., 2)``, not copied; a real tensor as it is.

    Example:
        >>> as_pairs(torch.tensor([1 + 2j]))
        tensor([[1., 2.]])
    """
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """Give the dtype of real and imaginary parts.

    Returns that of its parts; a real dtype as it is.

    Example:
        >>> real_dtype(torch.complex128), real_dtype(torch.float32)
        (torch.float64, torch.float32)
    """
    return torch.empty(0, dtype=dtype).real.dtype


@dataclass(frozen=True)
class ParameterLayout:
    """Names and shapes of the trainable parameters, in ``named_parameters()`` order, a tied parameter once.

    A complex parameter counts as pairs of real numbers: its shape has a last dimension of two more.

    Args:
        shapes: parameter name -> shape.

    Example:
        >>> from torch import nn
        >>> layout = ParameterLayout.of(nn.Linear(3, 2))
        >>> layout.shapes
        {'weight': (2, 3), 'bias': (2,)}
        >>> layout.numel
        8
    """

    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, module: nn.Module) -> ParameterLayout:
        """Read the layout of a module.

        Returns the layout of its trainable parameters.
        """
        lazy = next((name for name, p in module.named_parameters() if is_lazy(p)), None)
        if lazy is not None:
            raise ValueError(
                f"Expected the parameters of {type(module).__name__} to have shapes, but `{lazy}` belongs to a lazy "
                "layer that has not run yet. Run the module on one batch before `fit`, under torch.no_grad()."
            )
        shapes = {name: tuple(as_pairs(p).shape) for name, p in module.named_parameters() if p.requires_grad}
        if not shapes:
            raise ValueError(
                f"Expected {type(module).__name__} to have at least one parameter with requires_grad=True, but all are "
                "frozen (or there are none). Attribution needs the parameters that training changes."
            )
        return cls(shapes)

    @property
    def numel(self) -> int:
        """Number of attributed parameters."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def mean(self, values: Mapping[str, float]) -> tuple[float, dict[str, float] | None]:
        """Average a value of each parameter over all entries.

        Returns the mean, and the value of each parameter if they differ, else None.
        """
        own = {name: values.get(name, 0.0) for name in self.shapes}
        if len(set(own.values())) == 1:
            return next(iter(own.values())), None
        total = sum(own[name] * math.prod(shape) for name, shape in self.shapes.items())
        return total / self.numel, own

    def bias_of(self, name: str) -> str | None:
        """Find the vector that is the last column of a weight, wherever in the layout it is.

        Returns the bias beside a weight of two dimensions or more, one entry per row; None if there is none.

        Example:
            >>> layout = ParameterLayout({"0.weight": (2, 3), "0.bias": (2,), "1.weight": (2,)})
            >>> layout.bias_of("0.weight"), layout.bias_of("1.weight")
            ('0.bias', None)
        """
        shape, bias = self.shapes[name], f"{name.removesuffix('weight')}bias"
        fits = name.endswith("weight") and len(shape) > 1 and self.shapes.get(bias) == shape[:1]
        return bias if fits else None

    @property
    def digest(self) -> str:
        """Hash of names, shapes and their order: equal for equal layouts, on every machine."""
        text = json.dumps([[name, list(shape)] for name, shape in self.shapes.items()])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def layout_difference(stored: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> str:
    """Say how the parameters of a model differ from those on record.

    Returns the first difference, in words.

    Example:
        >>> layout_difference({"w": (2,)}, {"w": (3,)})
        'its parameter `w` has the shape (2,), here (3,)'
    """
    for name, shape in stored.items():
        if name not in found:
            return f"its parameter `{name}` is missing here"
        if found[name] != shape:
            return f"its parameter `{name}` has the shape {shape}, here {found[name]}"
    extra = next((name for name in found if name not in stored), None)
    return f"it has no parameter `{extra}`" if extra is not None else "the order of the parameters differs"
