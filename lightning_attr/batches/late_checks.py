"""Checks whose answer stays on the device: to ask for it at once would make the host wait."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_noted: list[Tensor] | None = None


@contextmanager
def late_checks(wanted: bool = True) -> Iterator[list[Tensor]]:
    """Let :func:`noted` take notes, for a caller that looks at them later and computes again where one is true.

    Yields the notes, bool ``()`` each.
    """
    global _noted
    notes: list[Tensor] = []
    before, _noted = _noted, notes if wanted else None
    try:
        yield notes
    finally:
        _noted = before


def noted(wrong: Tensor) -> bool:
    """Keep an answer for later.

    Returns whether it was kept; False where it is to be looked at now.
    """
    if _noted is None or wrong.device.type == "cpu" or torch._C._functorch.is_functorch_wrapped_tensor(wrong):
        return False
    _noted.append(wrong.detach())
    return True
