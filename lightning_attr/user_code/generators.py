"""Random generators that objects keep: found, started afresh, and put back."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from lightning_attr.user_code.reachable import Reachable


def find_generators(root: object) -> list[Any]:
    """Find the random generators that an object keeps, through attributes, containers, closures and partials.

    Returns the ``random.Random``, numpy ``Generator`` and ``RandomState``, and ``torch.Generator`` objects, each once.
    """
    return [generator for _, generator in Reachable({"": root}, reading=True).generators]


def reseed_generator(generator: Any, seed: int) -> None:
    """Start a generator afresh."""
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        bits.state = type(bits)(seed).state
    else:  # random.Random, RandomState
        generator.seed(seed % 2**32)


def restore_generator(generator: Any) -> Callable[[], object]:
    """Remember the state of a generator.

    Returns a function that puts the state back.
    """
    if isinstance(generator, np.random.Generator):
        return partial(setattr, generator.bit_generator, "state", generator.bit_generator.state)
    if isinstance(generator, random.Random):
        return partial(generator.setstate, generator.getstate())
    return partial(generator.set_state, generator.get_state())  # torch.Generator, RandomState


def generator_state(generator: Any) -> Any:
    """Give the state of a generator, to compare.

    Returns the state, equal to another if the generators go on alike.

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


def remembered_rng() -> Callable[[], None]:
    """Remember all random streams that do not belong to an object.

    Returns a function that puts them back.

    Example:
        >>> restore, first = remembered_rng(), torch.rand(())
        >>> restore()
        >>> torch.equal(torch.rand(()), first)
        True
    """
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 - the legacy stream
    devices = [_device_streams(name) for name in _accelerators()]

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        for restore_device in devices:
            restore_device()

    return restore


def _accelerators() -> list[str]:
    """Kinds of devices with random streams of their own; to ask CUDA whether it is there is to start it."""
    found = ["cuda", *(["mps"] if torch.backends.mps.is_available() else [])]
    current = torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else None  # from torch 2.6 on
    other = current is not None and current.type not in found and torch.accelerator.is_available()
    return [*found, current.type] if current is not None and other else found


def _device_streams(kind: str) -> Callable[[], None]:
    """Remember the streams of a kind of device. One that nothing has run on yet is not started for that."""
    module: Any = torch.get_device_module(kind)
    if not getattr(module, "is_initialized", lambda: True)():
        seeds = _seeds_to_come(module)

        def seed_again() -> None:
            if module.is_initialized():  # meanwhile: its streams began with these
                for seed in seeds:
                    seed()

        return seed_again
    if hasattr(module, "get_rng_state_all"):
        return partial(module.set_rng_state_all, module.get_rng_state_all())
    return partial(module.set_rng_state, module.get_rng_state())


def _seeds_to_come(module: Any) -> list[Callable[[], None]]:
    """What ``torch.manual_seed`` has left for a device to do when it starts."""
    queued = getattr(module, "_lazy_seed_tracker", None)
    return [] if queued is None else [call[0] for call in queued.get_calls() if call]


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Restore all random streams in the end that do not belong to an object."""
    restore = remembered_rng()
    try:
        yield
    finally:
        restore()
