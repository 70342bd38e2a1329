"""What code can reach from some objects: containers, names, tensors, arrays, random generators, streams."""

from __future__ import annotations

import argparse
import array
import ctypes
import io
import random
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_attr.user_code.namespaces import (
    Attributes,
    Slots,
    builtin_kind,
)
from lightning_attr.user_code.reachable_code import CLOSED, CLOSED_TO_STEPS, ReachableCode

_MOST_OBJECTS = 10_000
"""How many objects are looked into."""
_MOST_FUNCTIONS = 2_000
"""How many functions and classes are."""
_MOST_ITEMS = 1_000
"""How many items of one container of a step are looked into."""
_MOST_RECORDS = 64
"""How many objects of one container are, and items of one that data are read from: long lists hold samples."""
_LONGEST = 1_000_000
"""Containers that are longer hold data."""

_OPEN_PARTS = ("torch.optim", "torch.amp", "torch.cuda.amp", "torch.distributions", "torch.nn", "collections", "queue")
_OPEN_TO_READERS = ("torch.utils.data",)
_BUFFERS = (bytearray, array.array, ctypes._SimpleCData, ctypes.Array, ctypes.Structure)


@dataclass
class Reachable:
    """What is reached from some objects, root after root, the nearest first.

    Args:
        roots: name -> object; the name "" stands for the objects whose attributes are named without a prefix.
        reading: whether the objects read data, so that data sets and loaders are looked into.

    Attributes:
        containers: ``(name, container)``: dicts, lists, sets, deques, and what is named: attributes, slots, variables
            of classes, enclosed and global ones.
        tensors: ``(name, tensor)``, each once, parameters and buffers as well.
        modules: ``(name, module)``.
        arrays: ``(name, array)``.
        generators: ``(name, generator)`` of random numbers.
        streams: ``(name, stream)``: iterators, Python's generators and open files, none of the user's own classes.
        buffers: ``(name, buffer)``: bytearrays, and what processes share.

    Example:
        >>> module = nn.Linear(2, 2)
        >>> module.bank = SimpleNamespace(queue=torch.zeros(4, 2), next=0)
        >>> [name for name, _ in Reachable({"": module}).tensors]
        ['weight', 'bias', 'bank.queue']
    """

    roots: Mapping[str, object]
    reading: bool = False
    containers: list[tuple[str, Any]] = field(default_factory=list, init=False)
    tensors: list[tuple[str, Tensor]] = field(default_factory=list, init=False)
    modules: list[tuple[str, nn.Module]] = field(default_factory=list, init=False)
    arrays: list[tuple[str, np.ndarray[Any, Any]]] = field(default_factory=list, init=False)
    generators: list[tuple[str, Any]] = field(default_factory=list, init=False)
    streams: list[tuple[str, Any]] = field(default_factory=list, init=False)
    buffers: list[tuple[str, Any]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._seen: dict[int, object] = {}  # held, so that no id comes to stand for another object
        self._most_items = _MOST_RECORDS if self.reading else _MOST_ITEMS
        self._pending: deque[tuple[str, object]] = deque()
        code = ReachableCode(self.roots, self._seen, self.containers, self._pending)
        self._code = code.waiting  # functions and classes, whose variables come last
        with torch._C.DisableTorchFunction():  # these are no calls of the module's, for modes around
            for root in self.roots.items():  # one after the other: a parameter has the module's name for it
                self._pending.append(root)
                self._look_at_pending()
            looked_at = 0
            while self._code and looked_at < _MOST_FUNCTIONS:
                code.look_into(self._code.popleft())
                self._look_at_pending()
                looked_at += 1
        self._seen.clear()

    def _look_at_pending(self) -> None:
        while self._pending and len(self._seen) < _MOST_OBJECTS:
            name, item = self._pending.popleft()
            if not _is_plain(item) and id(item) not in self._seen:
                self._seen[id(item)] = item
                self._look_at(name, item)

    def _look_at(self, name: str, item: Any) -> None:
        if isinstance(item, Tensor):
            self.tensors.append((name, item))
        elif isinstance(item, np.ndarray):
            self.arrays.append((name, item))
        elif isinstance(item, random.SystemRandom):
            return  # which has no state
        elif isinstance(item, (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)):
            self.generators.append((name, item))
        elif isinstance(item, nn.Module):
            self._look_into_module(name, item)
        elif builtin_kind(item) is not None:
            self._look_into_container(name, item)
        elif isinstance(item, _BUFFERS):
            self.buffers.append((name, item))
        elif isinstance(item, io.IOBase) or (hasattr(type(item), "__next__") and self._is_closed(item)):
            self.streams.append((name, item))
        else:
            self._look_into_object(name, item)

    def _look_into_container(self, name: str, container: Any) -> None:
        kind, most = builtin_kind(container), self._most_items
        if kind is not tuple and kind.__len__(container) <= _LONGEST:
            self.containers.append((name, container))
        if isinstance(container, dict):
            keyed = islice(kind.items(container), most)
            self._add_items(
                (f"{name}[{key!r}]" if isinstance(key, (str, int)) else name, value) for key, value in keyed
            )
        else:
            indexed = kind in {list, tuple}
            first = kind.__getitem__(container, slice(most)) if indexed else islice(kind.__iter__(container), most)
            self._add_items((f"{name}[{i}]", value) for i, value in enumerate(first))
        if type(container) is not kind:  # with attributes of its own
            self._look_into_object(name, container)

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
        self._code.append(type(module))
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
            self._code.append(item)
        elif isinstance(item, partial):
            self._pending.extend(((name, item.func), (name, item.args), (name, item.keywords)))
        elif type(item).__module__.startswith("multiprocessing.") and hasattr(type(item), "get_obj"):
            self._pending.append((name, item.get_obj()))
        elif not self._is_closed(item):
            self._code.append(type(item))
            if hasattr(item, "__dict__"):
                self.containers.append((name, Attributes(vars(item))))
                self._pending.extend((prefix + local, value) for local, value in vars(item).items())
            slots = tuple(_slots(type(item)))
            if slots:
                self.containers.append((name, Slots(item, slots)))
                self._pending.extend((prefix + local, value) for local, value in Slots(item, slots).values().items())

    def _is_closed(self, item: Any) -> bool:
        """Whether an object is none of the user's, or one of those that hold data rather than state."""
        if isinstance(item, (SimpleNamespace, argparse.Namespace)):
            return False
        module = getattr(type(item), "__module__", None) or ""
        if self.reading and module.startswith(_OPEN_TO_READERS):
            return False
        if isinstance(item, (Dataset, DataLoader)):
            return not self.reading
        if module.startswith(_OPEN_PARTS):
            return False
        package = module.split(".", 1)[0]
        return package == "torch" or package in CLOSED or (not self.reading and package in CLOSED_TO_STEPS)


# What torch.nn.Module itself keeps: parameters, submodules, hooks.
_OWN_TO_TORCH = frozenset(vars(nn.Module()))


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float, complex, str, bytes, type))


def _slots(kind: type) -> Iterator[str]:
    for base in kind.__mro__:
        own = vars(base).get("__slots__", ())
        yield from (own,) if isinstance(own, str) else (name for name in own if not name.startswith("__"))
