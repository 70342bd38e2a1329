"""What code can reach from some objects: containers, attributes, tensors, arrays, random generators, all by name."""

from __future__ import annotations

import argparse
import random
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

__all__ = ["Attributes", "Reachable", "Slots"]

_MOST_OBJECTS = 10_000
"""How many objects are looked into."""
_MOST_ITEMS = 1_000
"""How many items of one container are looked into."""
_MOST_RECORDS = 64
"""How many objects of one container are: long lists hold samples."""

# Objects of these packages are not looked into: they are no part of a step's state, and large.
_CLOSED = frozenset(
    {*sys.stdlib_module_names, "numpy", "pandas", "scipy", "PIL", "matplotlib", "sklearn", "pyarrow", "datasets"}
    | {"h5py", "tokenizers", "transformers", "omegaconf", "wandb", "tensorboard", "mlflow", "tqdm", "rich"}
    | {"lightning", "lightning_fabric", "lightning_utilities", "pytorch_lightning", "lightning_attr"}
)
_OPEN_PARTS_OF_TORCH = ("torch.optim", "torch.amp", "torch.cuda.amp", "torch.distributions", "torch.nn")


@dataclass(frozen=True)
class Attributes:
    """The attributes of an object.

    Args:
        own: its ``__dict__``.
    """

    own: dict[str, Any]


@dataclass(frozen=True)
class Slots:
    """The attributes of an object that has no ``__dict__``.

    Args:
        owner: the object.
        names: of its slots.
    """

    owner: Any
    names: tuple[str, ...]

    def values(self) -> dict[str, Any]:
        """Name -> value, those that are set."""
        return {name: getattr(self.owner, name) for name in self.names if hasattr(self.owner, name)}


@dataclass
class Reachable:
    """What is reached from some objects, root after root, the nearest first.

    Args:
        roots: name -> object; the name "" stands for the objects whose attributes are named without a prefix.

    Attributes:
        containers: ``(name, container)``: dicts, lists, sets, deques, :class:`Attributes` and :class:`Slots`.
        tensors: ``(name, tensor)``, each once, parameters and buffers as well.
        modules: ``(name, module)``.
        arrays: ``(name, array)``.
        generators: ``(name, generator)``.

    Example:
        >>> module = nn.Linear(2, 2)
        >>> module.bank = SimpleNamespace(queue=torch.zeros(4, 2), next=0)
        >>> [name for name, _ in Reachable({"": module}).tensors]
        ['weight', 'bias', 'bank.queue']
    """

    roots: Mapping[str, object]
    containers: list[tuple[str, Any]] = field(default_factory=list, init=False)
    tensors: list[tuple[str, Tensor]] = field(default_factory=list, init=False)
    modules: list[tuple[str, nn.Module]] = field(default_factory=list, init=False)
    arrays: list[tuple[str, np.ndarray[Any, Any]]] = field(default_factory=list, init=False)
    generators: list[tuple[str, Any]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._seen: dict[int, object] = {}  # held, so that no id comes to stand for another object
        with torch._C.DisableTorchFunction():  # these are no calls of the module's, for modes around
            for root in self.roots.items():  # one after the other: a parameter has the module's name for it
                self._pending: deque[tuple[str, object]] = deque([root])
                while self._pending and len(self._seen) < _MOST_OBJECTS:
                    name, item = self._pending.popleft()
                    if not _is_plain(item) and id(item) not in self._seen:
                        self._seen[id(item)] = item
                        self._look_at(name, item)
        self._seen.clear()

    def _look_at(self, name: str, item: Any) -> None:
        if isinstance(item, Tensor):
            self.tensors.append((name, item))
        elif isinstance(item, np.ndarray):
            self.arrays.append((name, item))
        elif isinstance(item, (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)):
            self.generators.append((name, item))
        elif isinstance(item, nn.Module):
            self._look_into_module(name, item)
        elif isinstance(item, dict):
            self.containers.append((name, item))
            keyed = islice(item.items(), _MOST_ITEMS)
            self._add_items(
                (f"{name}[{key!r}]" if isinstance(key, (str, int)) else name, value) for key, value in keyed
            )
        elif isinstance(item, (list, deque, set, tuple)):
            if not isinstance(item, tuple):
                self.containers.append((name, item))
            self._add_items((f"{name}[{i}]", value) for i, value in enumerate(islice(item, _MOST_ITEMS)))
        else:
            self._look_into_object(name, item)

    def _add_items(self, items: Iterable[tuple[str, Any]]) -> None:
        records = 0
        for name, value in items:
            if not _is_plain(value):
                records += not isinstance(value, Tensor)
                if records <= _MOST_RECORDS or isinstance(value, Tensor):
                    self._pending.append((name, value))

    def _look_into_module(self, name: str, module: nn.Module) -> None:
        prefix = f"{name}." if name else ""
        self.modules.append((name, module))
        own = vars(module)
        self.containers.append((name, Attributes(own)))
        for registered in ("_parameters", "_buffers", "_modules"):
            if registered in own and isinstance(own[registered], dict):
                self.containers.append((name, own[registered]))
        self._pending.extend((prefix + local, p) for local, p in module.named_parameters(recurse=False))
        self._pending.extend((prefix + local, b) for local, b in module.named_buffers(recurse=False))
        self._pending.extend((prefix + local, value) for local, value in own.items() if local not in _OWN_TO_TORCH)
        self._pending.extend((prefix + local, child) for local, child in module.named_children())

    def _look_into_object(self, name: str, item: Any) -> None:
        prefix = f"{name}." if name else ""
        if isinstance(item, MethodType):
            self._pending.append((name, item.__self__))
        elif isinstance(item, FunctionType):
            self._pending.extend((name, value) for value in _enclosed(item))
        elif isinstance(item, partial):
            self._pending.extend(((name, item.func), (name, item.args), (name, item.keywords)))
        elif not _is_closed(item):
            if hasattr(item, "__dict__"):
                self.containers.append((name, Attributes(vars(item))))
                self._pending.extend((prefix + local, value) for local, value in vars(item).items())
            slots = tuple(_slots(type(item)))
            if slots:
                self.containers.append((name, Slots(item, slots)))
                self._pending.extend((prefix + local, value) for local, value in Slots(item, slots).values().items())


# What torch.nn.Module itself keeps: parameters, submodules, hooks.
_OWN_TO_TORCH = frozenset(vars(nn.Module()))


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float, complex, str, bytes, type))


def _is_closed(item: Any) -> bool:
    """Whether an object is none of the user's, or one of those that hold data rather than state."""
    if isinstance(item, (SimpleNamespace, argparse.Namespace)):
        return False
    if isinstance(item, (Dataset, DataLoader)):
        return True
    module = getattr(type(item), "__module__", None) or ""
    package = module.split(".", 1)[0]
    if package == "torch":
        return not module.startswith(_OPEN_PARTS_OF_TORCH)
    return package in _CLOSED


def _enclosed(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # not set yet
            yield cell.cell_contents


def _slots(kind: type) -> Iterator[str]:
    for base in kind.__mro__:
        own = vars(base).get("__slots__", ())
        yield from (own,) if isinstance(own, str) else (name for name in own if not name.startswith("__"))
