"""The loss of a training step as one term a sample: found by trying batches of several sizes, and refused otherwise."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from traceback import walk_tb
from typing import Any

import torch
from torch import Tensor

from lightning_attr.batches.late_checks import noted
from lightning_attr.batches.nested import batched_tensors, select_rows
from lightning_attr.errors import BatchDependenceError, NonFiniteGradientError
from lightning_attr.gradients.functional import call_with
from lightning_attr.gradients.inner_autograd import watch_autograd
from lightning_attr.gradients.plain_execution import plain_execution
from lightning_attr.objectives.moved_weights import losses_elsewhere
from lightning_attr.objectives.reductions import Reductions, weighted_shares
from lightning_attr.objectives.remedies import mixin_lines
from lightning_attr.user_code.batch_start import look_anew
from lightning_attr.user_code.calls import changed_state, failed_metrics
from lightning_attr.user_code.training_step import training_loss, training_losses

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingLoss:
    r"""The negative loss of each sample, :math:`f = -\ell`, :math:`q = 1`, from a loss that is their mean or sum.

    Its gradients need only the loss of the batch: the gradient of :math:`b` times a mean is that of the sum. The values
    are those terms of the reduction that the training step itself computes, where they can be captured, else each
    sample runs once more, on its own.

    Args:
        module: whose loss it is.
        reduction: "mean" or "sum", over the samples of a batch.
        captured: whether the reduction behind the loss gives each sample's value.
        weights: of the terms in that reduction, as :func:`lightning_attr.objectives.reductions.weighted_shares` gives
            them, the same for every batch; where one has others, its samples are looked at one by one. None for any.

    Example:
        >>> import lightning as L
        >>> class Line(L.LightningModule):
        ...     def training_step(self, batch):
        ...         return batch.square().mean()
        >>> TrainingLoss(Line(), "mean", captured=True).forward(torch.tensor([1.0, 3.0]), 2)[0]
        tensor([-1., -9.])
    """

    module: Any = field(repr=False, compare=False)
    reduction: str
    captured: bool
    weights: tuple[float, ...] | None = field(default=None, repr=False, compare=False)

    def forward(self, batch: Any, batch_size: int) -> tuple[Tensor, Any]:
        """Negative losses, ``(b,)``; if only their gradient is right, the loss of the batch beside them, else None."""
        with Reductions() if self.captured else nullcontext() as reductions:
            loss = training_loss(self.module, batch)
        size = batch_size if self.reduction == "mean" else 1
        if batch_size == 1:
            return -loss.reshape(1), None
        if reductions is not None:
            terms, weights = weighted_shares(loss, reductions.calls, batch_size)
            if terms is not None and self._as_ever(weights, batch_size):
                split = terms.detach()
                apart = _apart(self.module, split.sum(), loss.detach(), split.abs().sum())
                if noted(apart) or not apart:
                    return -size * terms, None
        return (-size / batch_size * loss).expand(batch_size), loss.detach()

    def _as_ever(self, weights: Sequence[float | Tensor], batch_size: int) -> bool:
        """Whether the terms of a batch count as those that the module was checked with."""
        if self.weights is None:
            return True
        size = 1 if self.reduction == "mean" else batch_size
        if len(weights) != len(self.weights):
            return False
        for own, usual in zip(weights, self.weights, strict=True):
            other = (torch.as_tensor(own) / size - usual).abs() > 1e-3 * abs(usual)
            if not noted(other) and other:
                return False
        return True

    def columns(self, batch: Any, output: Tensor, seen: Any) -> dict[str, Tensor]:
        """Loss and its negative; the derivatives of a loss that is itself the output."""
        losses = -output
        if seen is not None:
            with torch.enable_grad():  # the step may differentiate inside
                losses = _values_apart(self.module, batch, len(output))
            if not _reduces_to(self.module, self.reduction, losses, seen):
                raise _not_of_terms(self.module, batch, losses, [(list(range(len(losses))), seen)])
        ones = torch.ones_like(losses)
        return {"output": -losses, "loss": losses, "out_to_loss": ones, "newton_weight": ones}

    def sample_outputs(self, batch: Any, batch_size: int) -> Tensor:
        """Negative loss of each sample, ``(b,)``, one after the other."""
        return -_losses_apart(self.module, batch, batch_size)

    def functional_output(self, params: Mapping[str, Tensor], batch: Any) -> Tensor:
        """Negative loss at given parameters."""
        loss: Tensor = call_with(self.module, params, lambda batch: training_loss(self.module, batch), batch)
        return -loss.reshape(1)

    def total_loss(self, params: Mapping[str, Tensor], batch: Any, batch_size: int) -> Tensor:
        """Sum of the losses at given parameters, ``()``."""
        loss: Tensor = call_with(self.module, params, lambda batch: training_loss(self.module, batch), batch)
        total: Tensor = batch_size * loss if self.reduction == "mean" else loss
        return total

    def losses(self, params: Mapping[str, Tensor], batch: Any, batch_size: int) -> Tensor:
        """Losses at given parameters, ``(b,)``; one sample after the other where they can not be captured."""
        output: Tensor
        output, seen = call_with(self.module, params, lambda batch: self.forward(batch, batch_size), batch)
        if seen is not None:
            parts = [select_rows(batch, batch_size, [i]) for i in range(batch_size)]
            output = torch.cat([self.functional_output(params, part) for part in parts])
        return -output


def _losses_apart(module: Any, batch: Any, batch_size: int) -> Tensor:
    with plain_execution():
        losses = [training_loss(module, select_rows(batch, batch_size, [i])) for i in range(batch_size)]
    return torch.stack(losses)


def _value(module: Any, batch: Any, batch_idx: int = 0) -> Tensor:
    """Compute a loss without its graph."""
    with plain_execution():
        return training_loss(module, batch, batch_idx).detach()


def _values_apart(module: Any, batch: Any, batch_size: int) -> Tensor:
    return torch.stack([_value(module, select_rows(batch, batch_size, [i])) for i in range(batch_size)])


def _again(module: Any, batch: Any, whole: Tensor) -> Tensor:
    """Compute a loss once more, as of the second batch of an epoch; where that is another, as of the first again."""
    try:
        second = _value(module, batch, batch_idx=1)
        if _close(module, whole, second, whole.abs()):
            return second
        found = f"{second.item():.6g} with batch_idx=1"
    except Exception as error:  # of the user's code, or no loss at all
        found = f"with batch_idx=1 {type(error).__name__}: {error}"
    again = _value(module, batch)
    if _close(module, whole, again, whole.abs()):
        log.warning(
            "%s: the loss of `training_step` depends on `batch_idx` (%.6g with batch_idx=0, %s, of the same samples): "
            "each sample is attributed as one of the first batch of an epoch.",
            type(module).__name__,
            whole.item(),
            found,
        )
    return again


def checked_training_loss(module: Any, batch: Any, batch_size: int) -> TrainingLoss:
    """Find how the loss of a batch is made of those of its samples, on batches of several sizes."""
    look_anew(module)
    with torch.enable_grad(), watch_autograd() as inner:
        whole = _value(module, batch)
    scripted = any(isinstance(layer, torch.jit.ScriptModule) for layer in module.modules())  # cannot be watched
    with torch.set_grad_enabled(inner.seen or scripted):
        objective = _checked(module, batch, batch_size, whole)
        _tell_carried_state(module, batch)
    return objective


def _tell_carried_state(module: Any, batch: Any) -> None:
    """Warn of a loss that depends on what the step keeps from the batch before, such as a hidden state.

    In train mode random numbers would differ as well.
    """
    state = "" if module.training else _changed_state(module)
    if not state:
        return
    first, second = _losses_in_turn(module, [batch, batch])
    if not _close(module, second, first, first.abs()):
        log.warning(
            "%s: the loss of `training_step` depends on what it keeps from the batch before, in %s: the same samples "
            "have the loss %.6g, and %.6g right after themselves. Each sample is attributed with this state as it is "
            "at a snapshot, as if it came next; what samples do to those of later batches is left out.",
            type(module).__name__,
            state,
            first.item(),
            second.item(),
        )


def _changed_state(module: Any) -> str:
    """Name some of what the step changes; empty if nothing."""
    return ", ".join(f"`{name}`" for name in changed_state(module)[:4])


def _losses_in_turn(module: Any, batches: Sequence[Any]) -> list[Tensor]:
    """Compute the losses of batches without their graphs, each from the state that the one before has left."""
    with plain_execution():
        return [loss.detach() for loss in training_losses(module, batches)]


def _checked(module: Any, batch: Any, batch_size: int, whole: Tensor) -> TrainingLoss:
    name = type(module).__name__
    again = _again(module, batch, whole)
    if not _close(module, whole, again, whole.abs()):
        raise BatchDependenceError(
            f"The loss that `training_step` of {name} returns is random: the same {batch_size} samples give "
            f"{whole.item():.6g}, then {again.item():.6g}. Attribution needs the loss of a sample to be one number: "
            "look for noise, dropout or mixing (mixup) that does not heed eval mode (`self.training`), or pass "
            f'mode="train", in which '
            f"each sample has random numbers of its own. {mixin_lines(module, batch)}"
        )
    _check_splits(name, batch, batch_size)
    losses = _losses_of_samples(module, batch, batch_size)
    bad = (~losses.isfinite()).nonzero().flatten().tolist()
    if bad:
        _check_metrics(module, batch, "the loss is NaN or Inf")
        raise NonFiniteGradientError(
            f"The training loss is NaN or Inf (positions {bad} of the {batch_size} samples that were tried). Check the "
            "inputs and the weights. A mean over no label is NaN, too: that of a sample whose label is ignored.",
            bad,
            batch_size,
        )
    if batch_size == 1:
        return TrainingLoss(module, "mean", captured=False)  # in a data set of one sample, mean and sum are the same
    everything = list(range(batch_size))
    # Parts of unequal size: of equal halves, a mean weighted by class or by length may be the mean of means.
    parts = [everything, everything[:1], everything[1:], everything[: batch_size // 2], everything[batch_size // 2 :]]
    batches = [select_rows(batch, batch_size, part) for part in parts]
    points = [(losses, [_value(module, part) for part in batches])]
    if _close(module, losses.min(), losses.max(), losses.abs().max()):
        points += losses_elsewhere(module, batch, batch_size, batches)
    for reduction in ("mean", "sum"):
        if all(
            _reduces_to(module, reduction, apart[part], loss)
            for apart, found in points
            for part, loss in zip(parts, found, strict=True)
        ):
            break
    else:
        apart, found = points[-1]
        raise _not_of_terms(module, batch, apart, list(zip(parts, found, strict=True)))
    captured = TrainingLoss(module, reduction, captured=True, weights=_weights(module, batch, batch_size, reduction))
    with torch.enable_grad(), plain_execution():
        runs = [_detached(captured, part, len(rows)) for part, rows in zip(batches, parts, strict=True)]
    if all(
        seen is None
        and all(_close(module, -out, loss, loss.abs()) for out, loss in zip(output, losses[rows], strict=True))
        for (output, seen), rows in zip(runs, parts, strict=True)
    ):
        return captured
    log.warning(
        "%s: the terms of its training loss cannot be seen from outside, so that every sample runs once more, on its "
        "own, for its value. With lightning_attr.AttributionMixin and its `attribution_step` this is not needed.",
        name,
    )
    return TrainingLoss(module, reduction, captured=False)


def _weights(module: Any, batch: Any, batch_size: int, reduction: str) -> tuple[float, ...]:
    """How the samples count that the module is checked with."""
    with torch.enable_grad(), plain_execution(), Reductions() as reductions:
        loss = training_loss(module, batch)
    found = weighted_shares(loss, reductions.calls, batch_size)[1]
    return tuple(float(weight) / (1 if reduction == "mean" else batch_size) for weight in found)


def _detached(objective: TrainingLoss, batch: Any, batch_size: int) -> tuple[Tensor, Any]:
    output, seen = objective.forward(batch, batch_size)
    return output.detach(), seen


def _check_splits(name: str, batch: Any, batch_size: int) -> None:
    """Refuse a batch of which no part can be taken: each "sample" of it would be the whole batch."""
    if batched_tensors(batch, batch_size) and not _holds_samples(batch, batch_size):
        return
    raise ValueError(
        f"Expected the batch of {name} to hold tensors of shape ({batch_size}, ...) for its {batch_size} samples, but "
        "got none, or a list of one tensor a sample. A batch is split along the first dimension of its tensors: let "
        "the collate function pad and stack what samples hold."
    )


def _holds_samples(batch: Any, batch_size: int) -> bool:
    """Say whether a list of the batch has one item per sample, with tensors that are the sample's alone."""
    if isinstance(batch, Mapping):
        return any(_holds_samples(value, batch_size) for value in batch.values())
    if not isinstance(batch, (list, tuple)):
        return False
    nested = [item for item in batch if isinstance(item, (Tensor, Mapping, list, tuple))]
    apart = isinstance(batch, list) and len(nested) == len(batch) == batch_size
    if apart and not batched_tensors(batch, batch_size):
        return True
    return any(_holds_samples(item, batch_size) for item in nested)


def _losses_of_samples(module: Any, batch: Any, batch_size: int) -> Tensor:
    try:
        return _values_apart(module, batch, batch_size)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        name = type(module).__name__
        _check_metrics(module, batch, f"it raises {type(error).__name__}: {error}")
        raise BatchDependenceError(
            f"`training_step` of {name} runs on {batch_size} samples, but not on one alone "
            f"({type(error).__name__}: {error}). {_look_for(error)} {mixin_lines(module, batch)}"
        ) from error


def _look_for(error: Exception) -> str:
    """Say what makes a step need several samples."""
    if any(frame.f_globals.get("__name__", "").startswith("torchmetrics") for frame, _ in walk_tb(error.__traceback__)):
        return "A metric raises that: compute it only where a batch has samples enough, or as a metric of the module's."
    return "Look for `squeeze()` without a dimension, and for comparisons within the batch."


def _check_metrics(module: Any, batch: Any, outcome: str) -> None:
    """Refuse a step that does not go on without a metric that raises on one sample."""
    failed = failed_metrics(module)
    if failed:
        raise BatchDependenceError(
            f"`training_step` of {type(module).__name__} has metrics that do not run on one sample: {failed}. With NaN "
            f"in their places, {outcome}. Compute them apart from the loss. {mixin_lines(module, batch)}"
        )


def _reduces_to(module: Any, reduction: str, losses: Tensor, loss: Tensor) -> bool:
    if reduction == "mean":
        return _close(module, losses.mean(), loss, losses.abs().mean())
    return _close(module, losses.sum(), loss, losses.abs().sum())


def _close(module: Any, found: Tensor, expected: Tensor, scale: Tensor) -> bool:
    return not _apart(module, found, expected, scale)


def _apart(module: Any, found: Tensor, expected: Tensor, scale: Tensor) -> Tensor:
    # NaN passes: whoever checks that values are finite names the sample.
    return (found - expected).abs() > _tolerance(module, expected) * (scale + 0.01)


def _tolerance(module: Any, loss: Tensor) -> float:
    """Give the share by which a loss may change with the size of its batch, by rounding alone."""
    # A loss that is added up in float64 has the digits of the module that computed it.
    dtypes = {loss.dtype, *(p.dtype for p in module.parameters() if p.is_floating_point())}
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    device = loss.device.type
    if torch.is_autocast_enabled(device):
        eps = max(eps, torch.finfo(torch.get_autocast_dtype(device)).eps)
    if device not in {"cpu", "mps"} and torch.float32 in dtypes:
        eps = max(eps, 2.0**-10)  # TF32, which cuDNN uses unasked
    return max(4 * eps, min(1e-4, 1e6 * eps))


def _own_state(module: Any, batch: Any, part: Any) -> str:
    """Say so if the loss depends on state that the step itself changes: observers, running scales, counters."""
    (alone,), (_, after) = _losses_in_turn(module, [batch]), _losses_in_turn(module, [part, batch])
    state = _changed_state(module)
    if not state or torch.equal(alone, after):
        return ""
    return (
        f" The step also changes {state}, and its loss depends on that ({alone.item():.6g}, and {after.item():.6g} "
        "after another batch). If that is the cause, change such state in `on_train_batch_end`, or only `if "
        "self.training`: attribution runs the step in eval mode."
    )


def _not_of_terms(
    module: Any, batch: Any, losses: Tensor, parts: Sequence[tuple[Sequence[int], Tensor]]
) -> BatchDependenceError:
    """Say of which samples the loss is not made of terms: the part where it is farthest from their mean."""
    rows, loss = max(parts, key=lambda part: (losses[list(part[0])].mean() - part[1]).abs().item())
    apart = losses[list(rows)]
    shown = ", ".join(f"{value:.6g}" for value in apart[:4].tolist()) + (", ..." if len(apart) > 4 else "")
    name, own_state = type(module).__name__, _own_state(module, batch, select_rows(batch, len(losses), [0]))
    return BatchDependenceError(
        f"The loss that `training_step` of {name} returns is neither the mean nor the sum of one term a sample: "
        f"{len(rows)} samples have the losses {shown} one by one (mean {apart.mean().item():.6g}, sum "
        f"{apart.sum().item():.6g}), but {loss.item():.6g} together. Such are means weighted by class, means over the "
        f"tokens of padded sequences, and losses that compare samples.{own_state} {mixin_lines(module, batch)}"
    )
