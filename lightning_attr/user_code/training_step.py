"""A module's own ``training_step``, run beside training: nothing is logged, and nothing stays changed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import lightning as L
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from lightning_attr.user_code.batch_copies import OwnBatch
from lightning_attr.user_code.batch_start import with_batch_start
from lightning_attr.user_code.calls import called, surroundings_of
from lightning_attr.user_code.lightning_names import both, overrides
from lightning_attr.user_code.step_world import silent_loggers

Result = TypeVar("Result")


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
    returned = _returned(module, batches, batch_idx)
    return [_loss_of(module, one) for one in returned]


def followed_loss(
    module: L.LightningModule, batch: Any, batch_idx: int, follow: Callable[[], Result]
) -> tuple[Tensor, Result]:
    """Compute the training loss of a batch, and something more before the state of the module is put back.

    Returns the loss, and what ``follow`` returns, such as the buffers as the step has left them.

    Example:
        >>> import torch
        >>> class Counts(L.LightningModule):
        ...     count = 0.0
        ...     def training_step(self, batch, batch_idx):
        ...         self.count += 1
        ...         return self.count * batch.sum()
        >>> counts = Counts()
        >>> followed_loss(counts, torch.ones(2), 0, lambda: counts.count), counts.count
        ((tensor(2.), 1.0), 0.0)
    """
    followed: list[Result] = []
    returned = _returned(module, [batch], batch_idx, lambda: followed.append(follow()))
    return _loss_of(module, returned[0]), followed[-1]


def _returned(
    module: L.LightningModule, batches: Sequence[Any], batch_idx: int, follow: Callable[[], object] = lambda: None
) -> list[Any]:
    """What the steps of some batches return, with their state put back after all of them."""
    silent = silent_loggers(module._trainer) if surroundings_of(module) is None else nullcontext()
    step: Callable[..., Any] = module.training_step
    index = (batch_idx,) if is_param_in_hook_signature(step, "batch_idx", min_args=2) else ()
    with silent:
        run = with_batch_start(module, lambda: training_loss(module, batches[0], batch_idx), step)

        def runs(own: Any) -> list[Any]:
            copies = [own, *(OwnBatch(batch, copied=True).batch for batch in batches[1:])]
            returned = [run(one, batch_idx, *index) for one in copies]
            follow()
            return returned

        return called(module, "training_step", runs, batches[0])


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
