"""A batch of its own for each call of somebody's code, which may take it apart; tensors are copied only if need be."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_attr.user_code.reachable import Reachable

_PLAIN = (str, bytes, int, float, complex, type(None))


class OwnBatch:
    """One call's own batch: containers made anew, the same tensors or copies of them.

    Args:
        batch: the batch; it keeps its items, and its values where tensors are copied.
        copied: whether tensors and arrays are.

    Attributes:
        batch: what to hand to the call.

    Example:
        >>> batch = {"x": torch.ones(2), "y": torch.zeros(2)}
        >>> own = OwnBatch(batch, copied=True)
        >>> _ = own.batch.pop("y"), own.batch["x"].add_(1)
        >>> list(batch), batch["x"].tolist(), own.written()
        (['x', 'y'], [1.0, 1.0], True)
    """

    def __init__(self, batch: Any, copied: bool) -> None:
        self._tensors: list[Tensor] = []
        self._arrays: list[tuple[Any, Any]] = []
        with torch._C.DisableTorchFunction():  # these are no calls of the module's, for modes around
            self.batch = self._own(batch, copied)
            self._versions = [_version(tensor) for tensor in self._tensors]
            self._flags = [tensor.requires_grad for tensor in self._tensors]

    def _own(self, item: Any, copied: bool) -> Any:
        if isinstance(item, Tensor):
            own = item.clone() if (copied or item.is_inference()) and not item.requires_grad else item
            if type(own) is not type(item):  # a subclass, with attributes of its own
                own = own.as_subclass(type(item))
                vars(own).update(vars(item))
            self._tensors.append(own)
            return own
        if isinstance(item, _PLAIN):
            return item
        if isinstance(item, np.ndarray):
            self._arrays.append((item.copy() if copied else item, item))
            return self._arrays[-1][0]
        if isinstance(item, tuple):
            items = [self._own(value, copied) for value in item]
            if all(a is b for a, b in zip(items, item, strict=True)):
                return item
            return type(item)(*items) if hasattr(item, "_fields") else type(item)(items)
        if type(item) is list:
            return [self._own(value, copied) for value in item]
        if type(item) is dict:
            return {key: self._own(value, copied) for key, value in item.items()}
        return self._own_object(item, copied)

    def _own_object(self, item: Any, copied: bool) -> Any:
        """Lists and mappings of other kinds, data classes, and objects that know how they are copied, as graphs do."""
        if isinstance(item, (list, Mapping)) and (hasattr(item, "__setitem__")):
            own: Any = copy.copy(item)
            for key in own if isinstance(own, Mapping) else range(len(own)):
                own[key] = self._own(own[key], copied)
            return own
        if is_dataclass(item) and not isinstance(item, type):
            own = copy.copy(item)
            for field in fields(item):
                object.__setattr__(own, field.name, self._own(getattr(item, field.name), copied))
            return own
        if callable(item) or not hasattr(item, "__dict__"):
            return item
        clone = getattr(item, "clone", None)
        own = (clone() if callable(clone) else copy.deepcopy(item)) if copied else copy.copy(item)
        reached = Reachable({"": own})
        self._tensors += [tensor for _, tensor in reached.tensors]
        self._arrays += [(array, array.copy()) for _, array in reached.arrays]
        return own

    def written(self) -> bool:
        """Whether a tensor or an array of :attr:`batch` has been written to.

        Flags and gradients that were set on its tensors are put back.
        """
        with torch._C.DisableTorchFunction():
            for tensor, flag in zip(self._tensors, self._flags, strict=True):
                if tensor.requires_grad != flag and tensor.is_leaf:
                    tensor.requires_grad_(flag)
                    tensor.grad = None
            versions = [_version(tensor) for tensor in self._tensors]
        return versions != self._versions or any(
            own is not given and own.tobytes() != given.tobytes() for own, given in self._arrays
        )


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
