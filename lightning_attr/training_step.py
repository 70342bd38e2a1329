"""A module's own ``training_step``, run beside training: nothing is logged, and nothing stays changed."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from lightning_attr.worlds import both, overrides, own

__all__ = ["check_training_step", "has_training_step", "training_loss", "unchanged_attributes"]

# What torch.nn.Module itself keeps: parameters, submodules, hooks. Buffers are the step's to change.
_OWN_TO_TORCH = frozenset(vars(nn.Module())) - {"_buffers"}


def has_training_step(module: Any) -> bool:
    """Say whether a module is a ``LightningModule`` with a ``training_step``.

    Args:
        module: any object.

    Returns:
        True if it is.

    Example:
        >>> has_training_step(L.LightningModule())
        False
    """
    return isinstance(module, both(L.LightningModule)) and overrides("training_step", module)


def check_training_step(module: L.LightningModule) -> None:
    """Check that a ``training_step`` can be called with a batch, for its loss alone.

    Args:
        module: a module that has one.

    Raises:
        TypeError: if the module optimizes by hand, or takes an iterator instead of a batch.

    Example:
        >>> class Iterates(L.LightningModule):
        ...     def training_step(self, dataloader_iter): ...
        >>> check_training_step(Iterates())
        Traceback (most recent call last):
        ...
        TypeError: Expected `training_step` of Iterates to take a batch, but it takes `dataloader_iter`...
    """
    name = type(module).__name__
    remedy = (
        f"Write `class {name}(AttributionMixin, LightningModule)`: the mixin's `attribution_step` says what is "
        "attributed."
    )
    if not module.automatic_optimization:
        raise TypeError(
            f"Expected {name} to return its loss from `training_step`, but it optimizes by hand "
            f"(automatic_optimization=False). {remedy}"
        )
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise TypeError(f"Expected `training_step` of {name} to take a batch, but it takes `dataloader_iter`. {remedy}")


def training_loss(module: L.LightningModule, batch: Any) -> Tensor:
    """Compute the training loss of a batch by the module's own ``training_step``, and leave no trace of it.

    What the step logs or prints through the module goes nowhere; see :func:`unchanged_attributes` for what it changes.

    Args:
        module: a module that :func:`check_training_step` passes.
        batch: what its ``training_step`` takes; ``batch_idx`` is 0.

    Returns:
        The loss, a scalar, with its graph where gradients are enabled.

    Raises:
        TypeError: if the step returns no loss of one value.

    Example:
        >>> class Line(L.LightningModule):
        ...     def training_step(self, batch, batch_idx):
        ...         self.log("mean", batch.mean())
        ...         return {"loss": batch.square().mean()}
        >>> training_loss(Line(), torch.tensor([1.0, 3.0]))
        tensor(5.)
    """
    with unchanged_attributes(module), _silenced(module):
        step: Callable[..., Any] = module.training_step
        returned = step(batch, 0) if is_param_in_hook_signature(step, "batch_idx", min_args=2) else step(batch)
    loss = returned.get("loss") if isinstance(returned, Mapping) else returned
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(
            f"Expected `training_step` of {type(module).__name__} to return its loss, a tensor of one value, or a dict "
            f'with it under "loss", but got {found}.'
        )
    return loss.reshape(()) if loss.ndim else loss


@contextmanager
def _silenced(module: L.LightningModule) -> Iterator[None]:
    """Let log calls and loggers lead nowhere; the module's attributes are put back by :func:`unchanged_attributes`."""
    for inner in module.modules():
        if isinstance(inner, both(L.LightningModule)):
            vars(inner).update(log=_nothing, log_dict=_nothing, print=_nothing)
    trainer = module._trainer
    if trainer is None:
        yield
        return
    loggers = trainer.loggers
    trainer.loggers = [own(DummyLogger, trainer)()]  # not none at all: steps write to `self.logger.experiment`
    try:
        yield
    finally:
        trainer.loggers = loggers


def _nothing(*args: Any, **kwargs: Any) -> None:
    """In the place of what a step reports with."""


@contextmanager
def unchanged_attributes(module: nn.Module) -> Iterator[None]:
    """Put the attributes of a module back in the end, those of its submodules and metrics as well.

    Put back are attributes that were set, replaced or deleted, lists, dicts, sets and deques that changed (also inside
    each other), and tensors that were written to: buffers, the states of torchmetrics. Not put back are parameters,
    ``training`` flags, the statistics that a layer in train mode keeps, the attributes of other objects (a meter class
    of your own), and what lies outside the module.

    Args:
        module: any module.

    Yields:
        Nothing.

    Example:
        >>> class Counts(nn.Module):
        ...     steps, losses = 0, []
        >>> module = Counts()
        >>> with unchanged_attributes(module):
        ...     module.steps += 1
        >>> module.steps
        0
    """
    restores: list[Callable[[], object]] = []
    seen: set[int] = set()

    def remember(value: Any) -> None:
        if isinstance(value, (Tensor, nn.Module, dict, list, tuple, set, deque)) and id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, nn.Module):
                remember_module(value)
            elif isinstance(value, Tensor):
                if not isinstance(value, nn.Parameter):
                    restores.append(partial(_put_back_values, value, value.detach().clone(), _version(value)))
            else:
                remember_container(value)

    def remember_module(inner: nn.Module) -> None:
        own = {name: value for name, value in vars(inner).items() if name not in _OWN_TO_TORCH}
        restores.append(partial(_put_back_attributes, inner, own))
        for value in own.values():
            remember(value)
        for child in inner.children():
            remember(child)

    def remember_container(container: Any) -> None:
        if not isinstance(container, tuple):
            kind: Any = dict if isinstance(container, dict) else set if isinstance(container, set) else list
            restores.append(partial(_put_back_items, container, kind(container)))
        for item in container.values() if isinstance(container, dict) else container:
            remember(item)

    with torch._C.DisableTorchFunction():  # these are no calls of the module's, for modes around
        remember(module)
    try:
        yield
    finally:
        with torch._C.DisableTorchFunction():
            for restore in restores:
                restore()


def _put_back_attributes(module: nn.Module, before: Mapping[str, Any]) -> None:
    own = vars(module)
    for name in [name for name in own if name not in before and name not in _OWN_TO_TORCH]:
        del own[name]
    own.update(before)


def _put_back_items(container: Any, before: Any) -> None:
    if isinstance(container, set):
        same = container == before
    else:  # compared by identity: items may be tensors
        now, then = (list(chain(*c.items()) if isinstance(c, dict) else c) for c in (container, before))
        same = len(now) == len(then) and all(a is b for a, b in zip(now, then, strict=True))
    if not same:
        container.clear()
        (container.update if isinstance(container, (dict, set)) else container.extend)(before)


def _put_back_values(tensor: Tensor, before: Tensor, version: int | None) -> None:
    if version is None or version != _version(tensor):  # untouched tensors keep their version counter
        with torch.no_grad():
            tensor.copy_(before)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
