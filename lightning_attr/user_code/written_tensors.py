"""Which tensors a piece of code writes to: seen operation by operation, with the values that they had before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_STATISTICS = frozenset({"running_mean", "running_var"})
"""Arguments that normalisation writes to, although its schema does not say so and no version counter shows it."""


class WrittenTensors(TorchDispatchMode):
    """Copies tensors just before they are written to: nothing is copied that nobody writes to.

    Args:
        watched: the tensors.

    Attributes:
        before: position among the tensors -> its values before the first write.

    Example:
        >>> a, b = torch.ones(2), torch.ones(2)
        >>> with WrittenTensors([a, b]) as written:
        ...     _ = b[1:].add_(1)
        >>> written.before
        {1: tensor([1., 1.])}
    """

    def __init__(self, watched: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        self.before: dict[int, Tensor] = {}
        self._watched: dict[int, list[tuple[int, Tensor]]] = {}
        for position, tensor in enumerate(watched):
            for storage in _storages(tensor):
                self._watched.setdefault(storage, []).append((position, tensor))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation, after a copy of what it writes to."""
        kwargs = kwargs or {}
        schema = func._schema
        if schema.is_mutable or "batch_norm" in schema.name:
            given = {a.name: args[n] if n < len(args) else kwargs.get(a.name) for n, a in enumerate(schema.arguments)}
            for argument in schema.arguments:
                declared = argument.alias_info is not None and argument.alias_info.is_write
                if declared or (argument.name in _STATISTICS and given.get("training", True)):
                    self._copy(given[argument.name])
        return func(*args, **kwargs)

    def _copy(self, written: Any) -> None:
        if isinstance(written, (list, tuple)):
            for item in written:
                self._copy(item)
        elif isinstance(written, Tensor):
            for storage in _storages(written):
                for position, tensor in self._watched.get(storage, ()):
                    if position not in self.before:
                        self.before[position] = copied(tensor)


def copied(tensor: Tensor) -> Tensor:
    """Copy the values of a tensor.

    Returns the copy, without a graph.
    """
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        return tensor.detach().clone()


def put_back(tensor: Tensor, place: Tensor | None, values: Tensor | None) -> None:
    """Put a tensor back into its memory, and its values into it.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> place = weight.detach()
        >>> weight.data = torch.zeros(3)
        >>> put_back(weight, place, None)
        >>> weight.tolist()
        [1.0, 1.0]
    """
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        if place is not None and not tensor.is_inference():
            tensor.data = place
        if values is not None:
            tensor.copy_(values)


def _storages(tensor: Tensor) -> Iterator[int]:
    """The memory of a tensor, by its address in the library; a sparse one has that of its parts."""
    if tensor.layout is torch.strided:
        yield tensor.untyped_storage()._cdata
    elif tensor.layout is torch.sparse_coo:
        yield tensor._values().untyped_storage()._cdata
    elif tensor.layout in {torch.sparse_csr, torch.sparse_bsr}:
        yield tensor.values().untyped_storage()._cdata
