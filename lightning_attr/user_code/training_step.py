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

    Returns True if it is.
    """
    return isinstance(module, both(L.LightningModule)) and overrides("training_step", module)


def check_training_step(module: L.LightningModule) -> None:
    """Check that a ``training_step`` can be called with a batch, for its loss alone."""
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

    Returns the loss, a scalar, with its graph where gradients are enabled.
    """
    return training_losses(module, [batch], batch_idx)[0]


def training_losses(module: L.LightningModule, batches: Sequence[Any], batch_idx: int = 0) -> list[Tensor]:
    """Compute the training losses of some batches, each from the state that the one before has left.

    Returns the losses; afterwards all state is put back.

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
