"""How a module is run while its gradients are taken: by its own Python code, with nothing fused or fenced off."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.utils import checkpoint


class _CheckpointFunction:
    """In the place of the reentrant checkpoint, which runs only inside ``backward()``: the other one."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return checkpoint.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)


@contextmanager
def plain_execution() -> Iterator[None]:
    """Run modules so that hooks see every layer and ``torch.autograd.grad`` reaches it.

    Compiled modules run uncompiled, for their code does not look for new hooks; transformer layers leave their fused
    inference path, which calls no layers; reentrant checkpoints become non-reentrant ones; recurrent layers leave
    cuDNN, which has no backward pass for them in eval mode, and no second one. Autocast forgets its copies of the
    weights: under older versions of torch those that were made without gradients are constants to what follows.
    """
    torch.clear_autocast_cache()
    fused, names = torch.backends.mha.get_fastpath_enabled(), vars(checkpoint)
    reentrant = names["CheckpointFunction"]
    torch.backends.mha.set_fastpath_enabled(False)
    names["CheckpointFunction"] = _CheckpointFunction
    try:
        with _uncompiled(), _recurrent_without_cudnn():
            yield
    finally:
        names["CheckpointFunction"] = reentrant
        torch.backends.mha.set_fastpath_enabled(fused)


_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")


@contextmanager
def _recurrent_without_cudnn() -> Iterator[None]:
    """Let the layers of ``nn`` call recurrent networks without cuDNN, and convolutions with it."""
    calls = vars(torch._VF)
    before = {name: calls.get(name) for name in _RECURRENT}
    calls.update({name: _without_cudnn(getattr(torch._VF, name)) for name in _RECURRENT})
    try:
        yield
    finally:
        for name, call in before.items():
            if call is None:
                del calls[name]
            else:
                calls[name] = call


def _without_cudnn(call: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        enabled = torch.backends.cudnn.enabled
        torch.backends.cudnn.enabled = False
        try:
            return call(*args)
        finally:
            torch.backends.cudnn.enabled = enabled

    return run


def _uncompiled() -> AbstractContextManager[object]:
    # Nothing is compiled before torch._dynamo is imported.
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None:
        return nullcontext()
    if hasattr(torch.compiler, "set_stance"):
        eager: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
        return eager
    return _eager_frames(vars(dynamo.eval_frame))


@contextmanager
def _eager_frames(names: dict[str, Any]) -> Iterator[None]:
    """For torch 2.5, which has no stances: compiled modules enter their own code, and no frame of it is looked at."""
    enter = names["_maybe_set_eval_frame"]
    names["_maybe_set_eval_frame"] = lambda callback: enter(None)
    try:
        yield
    finally:
        names["_maybe_set_eval_frame"] = enter
