"""Random generators that objects keep: found, started afresh, and put back."""

from __future__ import annotations

import inspect
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

__all__ = [
    "find_generators",
    "generator_state",
    "preserved_rng",
    "remembered_rng",
    "reseed_generator",
    "restore_generator",
]

_MOST_OBJECTS = 10_000
"""How many objects of a data set are searched for generators: a fraction of a second."""


def find_generators(root: object) -> list[Any]:
    """Find the random generators that an object keeps, through attributes, containers, closures and partials.

    Args:
        root: a data set, for instance; its transforms and the data sets that it wraps are searched as well.

    Returns:
        The ``random.Random``, numpy ``Generator`` and ``RandomState``, and ``torch.Generator`` objects, each once.

    Example:
        >>> import torch
        >>> class Noisy(torch.utils.data.Dataset):
        ...     def __init__(self):
        ...         self.rng = torch.Generator()
        >>> len(find_generators(torch.utils.data.Subset(Noisy(), [0])))
        1
    """
    found: list[Any] = []
    seen: set[int] = set()
    pending: deque[object] = deque([root])
    while pending and len(seen) < _MOST_OBJECTS:
        item = pending.popleft()  # the nearest first
        if id(item) in seen or _is_plain(item):
            continue
        seen.add(id(item))
        if isinstance(item, (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)):
            found.append(item)
        elif isinstance(item, (list, tuple)):
            pending += item[:64]  # long lists hold samples, not transforms
        elif isinstance(item, dict):
            pending += islice(item.values(), 64)
        elif isinstance(item, MethodType):
            pending.append(item.__self__)
        elif isinstance(item, FunctionType):
            pending += inspect.getclosurevars(item).nonlocals.values()
        elif isinstance(item, partial):
            pending += (item.func, item.args, item.keywords)
        elif not isinstance(item, (type, ModuleType)) and hasattr(item, "__dict__"):
            pending += vars(item).values()
    return found


def reseed_generator(generator: Any, seed: int) -> None:
    """Start a generator afresh.

    Args:
        generator: one of those that :func:`find_generators` lists.
        seed: a non-negative integer.

    Example:
        >>> import random
        >>> generator = random.Random()
        >>> reseed_generator(generator, 3)
        >>> generator.random() == random.Random(3).random()
        True
    """
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        bits.state = type(bits)(seed).state
    else:  # random.Random, RandomState
        generator.seed(seed % 2**32)


def restore_generator(generator: Any) -> Callable[[], object]:
    """Remember the state of a generator.

    Args:
        generator: one of those that :func:`find_generators` lists.

    Returns:
        A function that puts the state back.

    Example:
        >>> import random
        >>> generator = random.Random(3)
        >>> restore, first = restore_generator(generator), generator.random()
        >>> restore()
        >>> generator.random() == first
        True
    """
    if isinstance(generator, np.random.Generator):
        return partial(setattr, generator.bit_generator, "state", generator.bit_generator.state)
    if isinstance(generator, random.Random):
        return partial(generator.setstate, generator.getstate())
    return partial(generator.set_state, generator.get_state())  # torch.Generator, RandomState


def generator_state(generator: Any) -> Any:
    """Give the state of a generator, to compare.

    Args:
        generator: one of those that :func:`find_generators` lists.

    Returns:
        The state, equal to another if the generators go on alike.

    Example:
        >>> generator_state(random.Random(3)) == generator_state(random.Random(3))
        True
    """
    if isinstance(generator, np.random.Generator):
        return repr(generator.bit_generator.state)
    if isinstance(generator, random.Random):
        return generator.getstate()
    state = generator.get_state()
    return state.numpy().tobytes() if isinstance(state, torch.Tensor) else repr(state)


def remembered_rng(*data: object) -> Callable[[], None]:
    """Remember all random streams.

    Args:
        data: data sets that may keep generators of their own.

    Returns:
        A function that puts them back.

    Example:
        >>> restore, first = remembered_rng(), torch.rand(())
        >>> restore()
        >>> torch.equal(torch.rand(()), first)
        True
    """
    own = [restore_generator(generator) for item in data for generator in find_generators(item)]
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 - the legacy stream
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        if mps is not None:
            torch.mps.set_rng_state(mps)
        for restore_own in own:
            restore_own()

    return restore


@contextmanager
def preserved_rng(*data: object) -> Iterator[None]:
    """Restore all random streams in the end.

    Args:
        data: data sets that may keep generators of their own.

    Yields:
        Nothing.

    Example:
        >>> import random
        >>> state = random.getstate()
        >>> with preserved_rng():
        ...     _ = random.random()
        >>> random.getstate() == state
        True
    """
    restore = remembered_rng(*data)
    try:
        yield
    finally:
        restore()


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, (int, float, complex, str, bytes, torch.Tensor, np.ndarray))
