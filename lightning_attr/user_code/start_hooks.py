"""A step that needs what hooks of its module and callbacks compute when an epoch starts, before there was one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import lightning as L

from lightning_attr.errors import AttributionError
from lightning_attr.user_code.calls import lasting_call
from lightning_attr.user_code.kept_state import KeptState
from lightning_attr.user_code.lightning_names import overrides

T = TypeVar("T")

_HOOKS = ("on_train_start", "on_train_epoch_start")
_LENT = frozenset({"log", "log_dict"})
_LIBRARIES = frozenset({"lightning", "pytorch_lightning", "lightning_attr"})


def after_start_hooks(module: L.LightningModule, run: Callable[[], T]) -> T:
    """Run something; where the module's code fails, once more after the hooks with which its training starts.

    A module is looked at before its first epoch, when these have not run. What they change of the module is put back
    with all else, by :func:`lightning_attr.user_code.calls.observed`, and the user's callbacks are put back at once.

    Example:
        >>> from lightning_attr.user_code.isolation import undisturbed
        >>> class Late(L.LightningModule):
        ...     def on_train_epoch_start(self):
        ...         self.weight = 2.0
        >>> late = Late()
        >>> with undisturbed(late):
        ...     after_start_hooks(late, lambda: late.weight)
        2.0
        >>> hasattr(late, "weight")
        False
    """
    try:
        return run()
    except Exception as error:
        hooks = list(_hooks(module))
        if isinstance(error, AttributionError):
            raise
        try:
            for keeping, hook in hooks:
                with keeping, lasting_call(module, "training_step"):  # in its world
                    hook()
            if hooks:
                return run()
        except Exception as later:
            error = error if str(later) == str(error) or not isinstance(later, AttributionError) else later
        missing = re.match(rf"'{type(module).__name__}' object has no attribute '(\w+)'", str(error))
        if isinstance(error, AttributeError) and missing is not None:
            raise AttributionError(_missing(module, missing[1])) from error
        raise error from None


def _hooks(module: L.LightningModule) -> Iterator[tuple[Any, Callable[[], None]]]:
    """The hooks as Lightning runs them, each with what keeps the state of its owner: the user's callbacks go first."""
    trainer = module._trainer
    for name in _HOOKS:
        for callback in getattr(trainer, "callbacks", []):
            if getattr(type(callback), name).__module__.partition(".")[0] not in _LIBRARIES:
                yield _unchanged(callback), partial(getattr(callback, name), trainer, module)
        if overrides(name, module):
            yield nullcontext(), getattr(module, name)


@contextmanager
def _unchanged(callback: Any) -> Iterator[None]:
    """Put a callback's own state back, but not the module, whose ``log`` Lightning has lent it."""
    before = dict(vars(callback))
    own = {f"{type(callback).__name__}.{name}": value for name, value in before.items() if name not in _LENT}
    with KeptState(own, set()).kept(by_value=True):
        try:
            yield
        finally:
            vars(callback).clear()
            vars(callback).update(before)


def _missing(module: L.LightningModule, name: str) -> str:
    kind = type(module).__name__
    return (
        f"The code of {kind} reads `self.{name}`, which it does not have before the first epoch: neither `__init__` "
        "nor the hooks that run when training, an epoch or a batch starts set it, as far as attribution can call "
        f"them. Set it in `__init__` or in `on_train_epoch_start` of {kind}; what is made of a batch belongs into "
        "`training_step`."
    )
