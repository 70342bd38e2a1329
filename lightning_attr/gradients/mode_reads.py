"""Whether the code of a module looks at its mode: if not, its loss differs by dropout and statistics alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_KNOWN = frozenset({"torch", "lightning", "pytorch_lightning", "lightning_attr"})
"""Packages that look at the mode for dropout, statistics and fused kernels alone."""


class ModeReads:
    """What :func:`watch_mode` has seen.

    Args:
        seen: whether anybody looked at a mode.

    Example:
        >>> ModeReads(seen=False).seen
        False
    """

    def __init__(self, seen: bool) -> None:
        self.seen = seen


@contextmanager
def watch_mode(module: nn.Module) -> Iterator[ModeReads]:
    """Watch whether code looks at the ``training`` flag of any module, other than that of torch and Lightning.

    Modules of which that cannot be seen, scripted ones and those with a ``train`` or ``eval`` of their own, count as
    having looked.

    Yields what was seen until now.
    """
    found = ModeReads(any(_is_opaque(layer) for layer in module.modules()))

    def read(layer: nn.Module) -> Any:
        if not found.seen:
            reader = str(sys._getframe(1).f_globals.get("__name__", ""))
            found.seen = reader.partition(".")[0] not in _KNOWN
        own = vars(layer)
        return own["training"] if "training" in own else layer.__getattr__("training")

    def write(layer: nn.Module, mode: bool) -> None:
        vars(layer)["training"] = mode

    nn.Module.training = property(read, write)  # type: ignore[assignment]  # goes before the attribute of an instance
    try:
        yield found
    finally:
        del nn.Module.training


def _is_opaque(layer: nn.Module) -> bool:
    own = type(layer)
    return (
        isinstance(layer, torch.jit.ScriptModule) or own.train is not nn.Module.train or own.eval is not nn.Module.eval
    )
