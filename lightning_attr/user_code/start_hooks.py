"""A step that needs what hooks of its module compute when an epoch starts, before there was one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import lightning as L

from lightning_attr.errors import AttributionError
from lightning_attr.user_code.calls import lasting_call
from lightning_attr.user_code.lightning_names import overrides

T = TypeVar("T")

_HOOKS = ("on_train_start", "on_train_epoch_start")


def after_start_hooks(module: L.LightningModule, run: Callable[[], T]) -> T:
    """Run something; where the module's code fails, once more after the hooks with which its training starts.

    A module is looked at before its first epoch, when these have not run. What they change is put back with all else,
    by :func:`lightning_attr.user_code.calls.observed`.

    Args:
        module: the user's module.
        run: calls the module's code.

    Returns:
        What ``run`` returns.

    Raises:
        Exception: whatever ``run`` raises, the first time if hooks do not change that.

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
    own: list[Any] = [getattr(module, name) for name in _HOOKS if overrides(name, module)]
    try:
        return run()
    except Exception as error:
        if isinstance(error, AttributionError) or not own:
            raise
        try:
            for hook in own:
                with lasting_call(module, "training_step"):  # in its world
                    hook()
            return run()
        except Exception:
            raise error from None
