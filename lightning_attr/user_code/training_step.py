"""A module's own ``training_step``, run beside training: nothing is logged, and nothing stays changed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import lightning as L
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from lightning_attr.user_code.batch_copies import OwnBatch
from lightning_attr.user_code.batch_start import with_batch_start
from lightning_attr.user_code.calls import called, surroundings_of
from lightning_attr.user_code.lightning_names import both, overrides
from lightning_attr.user_code.step_world import silent_loggers


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
        f"Write `class Attributed{name}(AttributionMixin, {name})`, and train that: the mixin's `attribution_step` "
        "says what is attributed."
    )
    if not module.automatic_optimization:
        raise TypeError(
            f"Expected {name} to return its loss from `training_step`, but it optimizes by hand "
            f"(automatic_optimization=False). {remedy}"
        )
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise TypeError(f"Expected `training_step` of {name} to take a batch, but it takes `dataloader_iter`. {remedy}")


def training_loss(module: L.LightningModule, batch: Any, batch_idx: int = 0) -> Tensor:
    """Compute the training loss of a batch by the module's own ``training_step``, and leave no trace of it.

    What the step logs or prints through the module goes nowhere; for what it changes see
    :func:`lightning_attr.user_code.calls.called`.

    Args:
        module: a module that :func:`check_training_step` passes.
        batch: what its ``training_step`` takes.
        batch_idx: likewise.

    Returns:
        The loss, a scalar, with its graph where gradients are enabled.

    Raises:
        TypeError: if the step returns no loss of one value.

    Example:
        >>> import torch
        >>> class Line(L.LightningModule):
        ...     def training_step(self, batch, batch_idx):
        ...         self.log("mean", batch.mean())
        ...         return {"loss": batch.square().mean()}
        >>> training_loss(Line(), torch.tensor([1.0, 3.0]))
        tensor(5.)
    """
    return training_losses(module, [batch], batch_idx)[0]


def training_losses(module: L.LightningModule, batches: Sequence[Any], batch_idx: int = 0) -> list[Tensor]:
    """Compute the training losses of some batches, each from the state that the one before has left.

    Args:
        module: as in :func:`training_loss`.
        batches: at least one.
        batch_idx: as there.

    Returns:
        The losses; afterwards all state is put back.

    Example:
        >>> import torch
        >>> class Counts(L.LightningModule):
        ...     count = 0.0
        ...     def training_step(self, batch, batch_idx):
        ...         self.count += 1
        ...         return self.count * batch.sum()
        >>> training_losses(Counts(), [torch.ones(2), torch.ones(2)])
        [tensor(2.), tensor(4.)]
    """
    silent = silent_loggers(module._trainer) if surroundings_of(module) is None else nullcontext()
    step: Callable[..., Any] = module.training_step
    index = (batch_idx,) if is_param_in_hook_signature(step, "batch_idx", min_args=2) else ()
    with silent:
        run = with_batch_start(module, lambda: training_loss(module, batches[0], batch_idx), step)

        def runs(own: Any) -> list[Any]:
            copies = [own, *(OwnBatch(batch, copied=True).batch for batch in batches[1:])]
            return [run(one, batch_idx, *index) for one in copies]

        returned = called(module, "training_step", runs, batches[0])
    return [_loss_of(module, one) for one in returned]


def _loss_of(module: L.LightningModule, returned: Any) -> Tensor:
    """The loss among what a step returns, a scalar."""
    loss = returned.get("loss") if isinstance(returned, Mapping) else returned
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(
            f"Expected `training_step` of {type(module).__name__} to return its loss, a tensor of one value, or a dict "
            f'with it under "loss", but got {found}.'
        )
    if type(loss) is not Tensor:  # a library's subclass carries what it knows of a whole batch
        loss = loss.as_subclass(Tensor)
    return loss.reshape(()) if loss.ndim else loss
