"""States of the random streams as plain bytes, to be written down and put back in another process."""

from __future__ import annotations

import random
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

_TAIL = struct.Struct("<qqd")
"""Behind the words of numpy's and Python's stream: place in them, whether a normal number waits, and that number."""
_WORDS = 624


def torch_states(device: torch.device | None = None) -> dict[str, Tensor]:
    """Give the states of torch's own streams, which takes a microsecond.

    Returns "torch", and "cuda" for a device of it, each ``(bytes,)``, uint8.
    """
    states = {"torch": torch.get_rng_state()}
    if device is not None and device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def stream_states(device: torch.device | None = None) -> dict[str, Tensor]:
    """Give the state of every random stream that does not belong to an object, which takes a tenth of a millisecond.

    Returns "torch", "numpy", "python", and "cuda" for a device of it, each ``(bytes,)``, uint8.

    Example:
        >>> states, first = stream_states(), torch.rand(())
        >>> put_back(states)
        >>> torch.equal(torch.rand(()), first)
        True
    """
    _, words, place, waits, number = np.random.get_state()  # noqa: NPY002 - the legacy stream
    _, inner, gauss = random.getstate()
    return {
        **torch_states(device),
        "numpy": _packed(words, int(place), bool(waits), float(number)),
        "python": _packed(np.array(inner[:_WORDS], np.uint32), inner[_WORDS], gauss is not None, gauss or 0.0),
    }


def put_back(states: Mapping[str, Tensor], device: torch.device | None = None) -> None:
    """Let the random streams go on from states that :func:`stream_states` gave; streams that it lacks stay."""
    if "torch" in states:
        torch.set_rng_state(states["torch"])
    if "numpy" in states:
        words, place, waits, number = _unpacked(states["numpy"])
        np.random.set_state(("MT19937", words, place, int(waits), number))  # noqa: NPY002
    if "python" in states:
        words, place, waits, number = _unpacked(states["python"])
        random.setstate((3, (*map(int, words), place), number if waits else None))
    if "cuda" in states and device is not None and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


def _packed(words: Any, place: int, waits: bool, number: float) -> Tensor:
    return torch.frombuffer(bytearray(words.tobytes() + _TAIL.pack(place, waits, number)), dtype=torch.uint8)


def _unpacked(state: Tensor) -> tuple[Any, int, bool, float]:
    content = state.numpy().tobytes()
    place, waits, number = _TAIL.unpack(content[4 * _WORDS :])
    return np.frombuffer(content[: 4 * _WORDS], np.uint32), place, bool(waits), number


class MovingStates:
    """States of the random streams at many moments: cheap, as those of numpy and Python are left out that rest.

    Attributes:
        device: whose stream is told, too, if it is a CUDA device.

    Example:
        >>> states = MovingStates()
        >>> [sorted(states.now()) for _ in range(5)][-1]
        ['torch']
    """

    def __init__(self) -> None:
        self.device: torch.device | None = None
        self._calls = 0
        self._moving: set[str] = set()
        self._seen: dict[str, bytes] = {}

    def now(self) -> dict[str, bytes]:
        """Give the states: of torch always, of the others where they have moved, and at some looks."""
        self._calls += 1
        if not self._moving and self._calls & (self._calls - 1) and self._calls > 2:
            return {name: state.numpy().tobytes() for name, state in torch_states(self.device).items()}
        found = {name: state.numpy().tobytes() for name, state in stream_states(self.device).items()}
        slow = ("numpy", "python")
        self._moving |= {name for name in slow if self._seen.get(name, found[name]) != found[name]}
        self._seen = {name: found[name] for name in slow}
        return found
