"""Which values of a forward pass do not depend on the batch, and which parameters those come from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_attr.gradients.direct_use.use import tensors_in


class FreeValues:
    """The values of a forward pass that no sample has a part in.

    Args:
        free: parameters and buffers of the module: they do not depend on the batch, and neither do tensors made inside
            the forward pass. Every other tensor from outside counts as the batch's.
        followed: the parameters whose gradients are wanted, by name; they alone require gradients.
    """

    def __init__(self, free: Iterable[Tensor], followed: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.followed = followed
        self.names = {id(p): name for name, p in followed.items()}
        # Held until the end, so that no id comes to stand for another tensor.
        self.free: dict[int, Tensor] = {id(t): t for t in free}
        self._overwritten: set[int] = set()  # storages into which values of the batch were written
        self._sources: dict[int, dict[str, Tensor]] = {}
        self._made_contiguous: dict[int, tuple[Tensor, tuple[int, int] | None]] = {}

    def is_free(self, tensor: Tensor) -> bool:
        """Tell whether a value does not depend on the batch."""
        if id(tensor) not in self.free:
            return False
        if tensor.layout != torch.strided:  # nothing is written into these
            return True
        return not self._overwritten or tensor.untyped_storage()._cdata not in self._overwritten

    def is_derived(self, tensor: Tensor) -> bool:
        """Tell whether a value depends on parameters that are followed, and not on the batch."""
        return self.is_free(tensor) and bool(self.sources_of(tensor))

    def mark_free(self, result: Any) -> Any:
        """Note that what a function gave does not depend on the batch."""
        for tensor in tensors_in((result,)):
            self.free[id(tensor)] = tensor
        return result

    def mark_overwritten(self, tensor: Tensor) -> None:
        """Note that values of the batch were written into a tensor."""
        if self.is_free(tensor):
            self._overwritten.add(tensor.untyped_storage()._cdata)

    def sources_of(self, value: Tensor) -> dict[str, Tensor]:
        """The followed parameters that a value is derived from, by name."""
        if id(value) in self.names:
            return {self.names[id(value)]: value}
        known = self._sources.get(id(value))
        if known is None:
            found = {id(getattr(node, "variable", None)) for node in graph_nodes(value)}
            known = {name: p for name, p in self.followed.items() if id(p) in found}
            self._sources[id(value)] = known
        return known

    def contiguous(self, value: Tensor) -> Tensor:
        """Make a derived value contiguous once for all layers, so that a bias common to them is pulled back once."""
        result, versions = self._made_contiguous.get(id(value), (value, None))
        if versions != (value._version, result._version):  # new, or changed in place since
            result = value.contiguous()
            self._made_contiguous[id(value)] = result, (value._version, result._version)
        return result


def graph_nodes(value: Tensor) -> set[Any]:
    """The nodes of the graph that a value comes from."""
    nodes, seen = [value.grad_fn], {value.grad_fn}
    while nodes:
        node = nodes.pop()
        if node is not None:  # else a tensor that needs gradients by itself, or by nothing
            new = {following for following, _ in node.next_functions} - seen
            seen |= new
            nodes += new
    return seen - {None}
