"""Gradients of the copies that each sample has of a value, on their way to the parameters behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_attr.gradients.direct_use.free_values import FreeValues, graph_nodes
from lightning_attr.gradients.factored import ParameterGradient, materialise
from lightning_attr.gradients.rules import GradientRule

Attach: TypeAlias = Callable[[Any, dict[str, str], GradientRule, Tensor, Tensor], Tensor]


class CopiedValues(FreeValues):
    """Gives each sample its own copy of a value, and passes the gradients of the copies on.

    Args:
        free: as :class:`FreeValues` takes them.
        followed: likewise.
        batch_size: ``b``.
        attach: follows one use of a layer's parameters.
        leaves: gathers what the backward pass has to reach.
        sink: called with ``{name: gradient}``.
    """

    def __init__(
        self,
        free: Iterable[Tensor],
        followed: Mapping[str, Tensor],
        batch_size: int,
        attach: Attach,
        leaves: list[Tensor],
        sink: Callable[[Mapping[str, ParameterGradient]], None],
    ) -> None:
        super().__init__(free, followed)
        self.batch_size = batch_size
        self.used: set[str] = set()
        self._attach = attach
        self._leaves = leaves
        self._sink = sink
        self._open: dict[int, int] = {}  # copies of derived values whose gradients are still to come
        self._sums: dict[int, Tensor] = {}  # those that have come

    def copy(self, value: Tensor, ndim: int, dtype: torch.dtype | None = None) -> Tensor | None:
        """Give each sample its own copy of a value, as a view, aligned to tensors of ``ndim`` dimensions.

        Returns ``(b, 1, ..., *value.shape)``; None if the first dimension of the value stands where the batch does.
        """
        if value.ndim >= ndim and not (value.ndim == ndim and value.shape[0] == 1):
            return None
        shape = value.shape[1:] if value.ndim == ndim else (*[1] * (ndim - 1 - value.ndim), *value.shape)
        leaf = value.detach().reshape(1, *shape).expand(self.batch_size, *shape).requires_grad_()
        self._leaves.append(leaf)
        copies = leaf.view_as(leaf) if dtype is None else leaf.to(dtype).view_as(leaf)
        self._open[id(value)] = self._open.get(id(value), 0) + 1

        def arrive(gradient: Tensor) -> Tensor:
            with torch._C.DisableTorchFunction(), torch.no_grad():
                self._arrive(value, gradient.reshape(self.batch_size, *value.shape))
                return gradient.new_zeros(()).expand_as(gradient)  # so that it is not kept until the end

        copies.register_hook(arrive)
        self.used.update(self.sources_of(value))
        return copies

    def attach(self, values: Mapping[str, Tensor], rule: GradientRule, layer: Any, x: Tensor, output: Tensor) -> Tensor:
        """Follow one use of values, by the local names that a rule gives their gradients."""
        names = {name: name for value in values.values() for name in self.sources_of(value)}
        self.used.update(names)

        def give(_: Any, activations: Tensor, backprops: Tensor) -> dict[str, ParameterGradient]:
            gradients = rule(layer, activations, backprops)
            for local, value in values.items():
                self.give(value, gradients[local])
            return {}

        return self._attach(None, names, give, x, output)

    def _arrive(self, value: Tensor, gradient: Tensor) -> None:
        """Pass on the gradient of a copy; all copies of a derived value, such as a bias of all layers, at once."""
        key = id(value)
        self._open[key] -= 1
        if key in self.names:
            self.give(value, gradient)
            return
        self._sums[key] = self._sums[key] + gradient if key in self._sums else gradient
        if self._open[key] == 0:
            self.give(value, self._sums.pop(key))

    def finish(self) -> None:
        """Pass on what has waited for copies that have no part in the output."""
        with torch._C.DisableTorchFunction(), torch.no_grad():
            for key in list(self._sums):
                self.give(self.free[key], self._sums.pop(key))

    def give(self, value: Tensor, gradient: ParameterGradient) -> None:
        """Pass a value's per-sample gradients on to the parameters that it is derived from."""
        sources = self.sources_of(value)
        if id(value) in self.names:
            if isinstance(gradient, Tensor):
                gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
            self._sink({self.names[id(value)]: gradient})
            return
        rows = materialise(gradient, tuple(value.shape)).to(value.dtype)
        pulled = _pull_back(value, list(sources.values()), rows)
        dtypes = (torch.promote_types(tensor.dtype, torch.float32) for tensor in pulled)
        self._sink({name: tensor.to(dtype) for name, tensor, dtype in zip(sources, pulled, dtypes, strict=True)})


def _pull_back(value: Tensor, parameters: list[Tensor], rows: Tensor) -> list[Tensor]:
    """Vector-Jacobian products with each sample's row, ``(b, *shape)`` of each parameter."""

    def product(row: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(value, parameters, row, retain_graph=True)

    try:
        # `is_grads_batched` runs the backward of an embedding, as of relative positions, row by row; but it is silent
        # about functions that neither runs at once.
        if any(type(node).__name__ == "EmbeddingBackward0" for node in graph_nodes(value)):
            return list(torch.func.vmap(product)(rows))
        return list(torch.autograd.grad(value, parameters, rows, retain_graph=True, is_grads_batched=True))
    except (RuntimeError, NotImplementedError):  # a backward formula that vmap cannot run
        return [torch.stack(column) for column in zip(*map(product, rows), strict=True)]
