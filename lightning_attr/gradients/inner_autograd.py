"""Whether a module differentiates inside its own forward pass: forces, gradient penalties, adversarial examples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class InnerAutograd:
    """What :func:`watch_autograd` has seen.

    Attributes:
        seen: whether a backward pass was run.

    Example:
        >>> InnerAutograd().seen
        False
    """

    def __init__(self) -> None:
        self.seen = False


@contextmanager
def watch_autograd() -> Iterator[InnerAutograd]:
    """Watch whether backward passes are run; those of compiled and scripted code are not seen.

    Yields what was seen until now.
    """
    found, names = InnerAutograd(), vars(torch.autograd)
    run = names["_engine_run_backward"]  # what `grad` and `backward` call, whoever holds these functions

    def watched(*args: Any, **kwargs: Any) -> Any:
        found.seen = True
        return run(*args, **kwargs)

    names["_engine_run_backward"] = watched
    try:
        yield found
    finally:
        names["_engine_run_backward"] = run
