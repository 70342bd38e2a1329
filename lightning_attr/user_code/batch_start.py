"""A step that needs what the module's ``on_train_batch_start`` makes of the batch before it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lightning_attr.user_code.generators import remembered_rng
from lightning_attr.user_code.lightning_names import overrides

log = logging.getLogger(__name__)

_HOOK = "on_train_batch_start"

_needed: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def look_anew(module: nn.Module) -> None:
    """Forget whether a module's step needs the hook."""
    _needed.pop(module, None)


def with_batch_start(module: Any, value: Callable[[], Tensor], step: Callable[..., Any]) -> Any:
    """Give a step that runs the hook before, if the loss is another one with it, or there is none without.

    Whether it is, is found out once: most hooks count, log or take the time, and attribution does not call them.

    Returns a function of batch, batch index and the rest of the step's arguments.
    """
    if module not in _needed and torch._C._functorch.peek_interpreter_stack() is None:
        _needed[module] = False
        _needed[module] = overrides(_HOOK, module) and _changes_loss(module, value)
    if not _needed.get(module, False):
        return lambda batch, batch_idx, *rest: step(batch, *rest)

    def after_hook(batch: Any, batch_idx: int, *rest: Any) -> Any:
        module.on_train_batch_start(batch, batch_idx)
        return step(batch, *rest)

    return after_hook


def _changes_loss(module: Any, value: Callable[[], Tensor]) -> bool:
    restore = remembered_rng()
    without: Tensor | None = None
    try:
        without = value().detach()
    except Exception:  # of the user's code: perhaps for want of the hook
        restore()
    else:
        restore()
    _needed[module] = True
    try:
        with_hook = value().detach()
    except Exception:  # then it is no help, and the step says itself what it misses
        return False
    finally:
        restore()
    if without is not None and torch.equal(without.nan_to_num(), with_hook.nan_to_num()):
        return False
    log.info(
        "%s: the loss of `training_step` depends on what `%s` makes of the batch, which runs before each call.",
        type(module).__name__,
        _HOOK,
    )
    return True
