"""How a module is run while its gradients are taken: by its own Python code, with nothing fused or fenced off."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.utils import checkpoint

__all__ = ["plain_execution"]


class _CheckpointFunction:
    """In the place of the reentrant checkpoint, which runs only inside ``backward()``: the other one."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return checkpoint.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)


@contextmanager
def plain_execution() -> Iterator[None]:
    """Run modules so that hooks see every layer and ``torch.autograd.grad`` reaches it.

    Compiled modules run uncompiled, for their code does not look for new hooks; transformer layers leave their fused
    inference path, which calls no layers; reentrant checkpoints become non-reentrant ones.

    Yields:
        Nothing.

    Example:
        >>> with plain_execution():
        ...     torch.backends.mha.get_fastpath_enabled()
        False
    """
    fused, names = torch.backends.mha.get_fastpath_enabled(), vars(checkpoint)
    reentrant = names["CheckpointFunction"]
    torch.backends.mha.set_fastpath_enabled(False)
    names["CheckpointFunction"] = _CheckpointFunction
    try:
        with _uncompiled():
            yield
    finally:
        names["CheckpointFunction"] = reentrant
        torch.backends.mha.set_fastpath_enabled(fused)


def _uncompiled() -> Any:
    # Nothing is compiled before torch._dynamo is imported. torch < 2.6 cannot: there the plan's check decides.
    known = "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance")
    return torch.compiler.set_stance("force_eager") if known else nullcontext()
