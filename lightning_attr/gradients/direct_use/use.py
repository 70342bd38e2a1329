"""One call in which a parameter may meet the batch, as handlers see it, and the register of handlers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from lightning_attr.gradients.rules import GradientRule

_AUGMENTED = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__idiv__", "__itruediv__", "__ipow__"}


class Uses(Protocol):
    """What a use asks of the mode that sees it."""

    batch_size: int

    def copy(self, value: Tensor, ndim: int, dtype: torch.dtype | None = None) -> Tensor | None:
        """Give each sample its own copy."""

    def attach(self, values: Any, rule: GradientRule, layer: Any, x: Tensor, output: Tensor) -> Tensor:
        """Follow one use by a rule."""


@dataclass(frozen=True)
class Use:
    """One call of a function with values derived from parameters.

    Args:
        mode: what sees it.
        func: the function.
        args: its arguments.
        kwargs: its keyword arguments.
        derived: tensors among them that derive from parameters and not from the batch.
        rows: tensors among them that depend on the batch.
    """

    mode: Uses
    func: Any
    args: Any
    kwargs: Any
    derived: list[Tensor]
    rows: list[Tensor]

    def is_batch(self, tensor: Any) -> bool:
        """Tell whether an argument has a row a sample."""
        return (
            isinstance(tensor, Tensor)
            and any(tensor is row for row in self.rows)
            and tensor.ndim > 0
            and tensor.shape[0] == self.mode.batch_size
        )

    def is_derived(self, tensor: Any) -> bool:
        """Tell whether an argument derives from a parameter."""
        return any(tensor is value for value in self.derived)

    def run(self, values: dict[int, Tensor]) -> Any:
        """Call the function with other tensors in the place of some."""
        args, kwargs = replace((self.args, self.kwargs), lambda t: values.get(id(t), t))
        return self.func(*args, **kwargs)

    def run_detached(self) -> Any:
        """Call the function with constants in the place of the derived values."""
        return self.run({id(value): value.detach() for value in self.derived})


Handler: TypeAlias = Callable[[Use], Any]

HANDLERS: dict[Any, Handler] = {}


def handles(*functions: Any) -> Callable[[Handler], Handler]:
    """Register what is done for functions of torch, each given itself or by its name; a handler may decline."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(functions, handler))
        return handler

    return register


def handler_of(func: Any) -> Handler | None:
    """Give the handler of a function, by the function or by its name."""
    return HANDLERS.get(func) or HANDLERS.get(func.__name__)


def tensors_in(data: Any) -> list[Tensor]:
    """List the tensors in nested lists, tuples and dicts."""
    found = []
    for item in data.values() if isinstance(data, dict) else data:
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, (list, tuple, dict)):
            found += tensors_in(item)
    return found


def replace(data: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to the tensors in nested lists, tuples and dicts."""
    if isinstance(data, Tensor):
        return function(data)
    if isinstance(data, dict):
        return {key: replace(item, function) for key, item in data.items()}
    if type(data) in {list, tuple}:
        return type(data)(replace(item, function) for item in data)
    return data


def is_in_place(func: Any) -> bool:
    """Tell whether a function changes its first argument."""
    name = func.__name__
    return name in _AUGMENTED if name.endswith("__") else bool(name.endswith("_"))
