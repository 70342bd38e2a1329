"""What of a module is attributed: the model output that its mixin names, or else the loss of its training step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_attr.batches.nested import map_tensors
from lightning_attr.batches.samples_apart import SamplesApart
from lightning_attr.errors import NonFiniteGradientError
from lightning_attr.gradients import check_batch_independence
from lightning_attr.gradients.full_precision import full_precision
from lightning_attr.objectives.mixin import AttributionMixin, attribution_outputs
from lightning_attr.objectives.training_loss import TrainingLoss, checked_training_loss
from lightning_attr.outputs import ModelOutput
from lightning_attr.outputs.check import check_model_output
from lightning_attr.randomness.draws import Draw, Samples
from lightning_attr.user_code.calls import called, lasting_call
from lightning_attr.user_code.training_step import check_training_step, has_training_step, training_loss

__all__ = [
    "MixinOutput",
    "Objective",
    "TrainingLoss",
    "batch_objective",
    "check_module",
    "completed",
    "describe_output",
    "draws_of",
    "has_mixin",
    "measured",
    "needs_setup",
    "sample_values",
    "set_up",
]


class Objective(Protocol):
    """The output ``f`` of one module that is attributed, in the forms that featurizing needs."""

    @property
    def module(self) -> Any:
        """Whose output it is."""

    def forward(self, batch: Any, batch_size: int) -> tuple[Tensor, Any]:
        """Run a batch once; the sum of the first, ``(b,)``, has the gradient of the sum of all outputs."""

    def columns(self, batch: Any, output: Tensor, seen: Any) -> dict[str, Tensor]:
        """Give the values of each sample, ``(b,)``, from both results of :meth:`forward`, detached."""

    def sample_outputs(self, batch: Any, batch_size: int) -> Tensor:
        """Compute the outputs so that each has its own gradient, ``(b,)``, however slowly."""

    def functional_output(self, params: Mapping[str, Tensor], batch: Any) -> Tensor:
        """Compute the output of one sample at given parameters, ``(1,)``."""

    def total_loss(self, params: Mapping[str, Tensor], batch: Any, batch_size: int) -> Tensor:
        """Sum the training loss over the samples of a batch at given parameters, ``()``."""

    def losses(self, params: Mapping[str, Tensor], batch: Any, batch_size: int) -> Tensor:
        """Compute the training loss of each sample at given parameters, ``(b,)``, each with its own gradient."""


def check_module(module: Any) -> None:
    """Check that a module can be attributed at all."""
    if has_mixin(module):
        return
    name = type(module).__name__
    if not has_training_step(module):
        raise TypeError(
            f"Expected {name} to have lightning_attr.AttributionMixin among its bases, or to be a LightningModule with "
            f"a `training_step`, but it is neither. Write `class Attributed{name}(AttributionMixin, {name})`, with an "
            "`attribution_step`."
        )
    check_training_step(module)


def completed(module: Any, batch: Any, draw: Draw) -> Any:
    """Complete a batch with what the module's mixin draws for its samples.

    Returns what is attributed takes this batch.
    """
    if not has_mixin(module):
        return batch
    if isinstance(batch, SamplesApart):
        draws = (replace(draw, rows=[row]) for row in draw.rows)
        return SamplesApart(completed(module, one, own) for one, own in zip(batch, draws, strict=True))
    return called(module, "attribution_batch", lambda own: module.attribution_batch(own, draw), batch)


def set_up(module: Any, samples: Samples, snapshot: str) -> None:
    """Let the module's mixin compute what it needs of the training samples at a snapshot."""
    if has_mixin(module):
        with torch.no_grad(), lasting_call(module, "attribution_setup"):
            module.attribution_setup(samples, snapshot)


def needs_setup(module: Any) -> bool:
    """Say whether the module's mixin computes anything of the training samples.

    Returns whether its class overrides ``attribution_setup``.

    Example:
        >>> needs_setup(nn.Linear(1, 1))
        False
    """
    return has_mixin(module) and type(module).attribution_setup is not AttributionMixin.attribution_setup


def draws_of(module: Any) -> int:
    """Count the draws that a model output is the mean of.

    Example:
        >>> draws_of(nn.Linear(1, 1))
        1
    """
    count = getattr(module, "attribution_draws", 1) if has_mixin(module) else 1
    if not (isinstance(count, int) and count >= 1):
        raise ValueError(
            f"Expected `attribution_draws` of {type(module).__name__} to be a positive integer, but got {count!r}."
        )
    return count


@full_precision()
def batch_objective(module: Any, batch: Any, batch_size: int) -> Objective:
    """Choose what of a module is attributed, and check it on a few samples.

    Returns the model output of a module with :class:`lightning_attr.AttributionMixin`, the training loss of any other.
    """
    check_module(module)
    if not has_mixin(module):
        return checked_training_loss(module, batch, batch_size)
    check_batch_independence(lambda batch: _mixin_output(module, batch)[0], batch, batch_size)
    with torch.enable_grad():  # some steps differentiate
        outputs, targets = map_tensors(attribution_outputs(module, batch), Tensor.detach)
    _check_losses(module, outputs, targets, batch_size)
    check_model_output(module.model_output, outputs, targets, dtype=None)
    return MixinOutput(module)


def _check_losses(module: Any, outputs: Any, targets: Any, batch_size: int) -> None:
    """Refuse samples whose loss is NaN or Inf where their output is not: it is their target, and not the functions."""
    with torch.no_grad():
        losses = module.model_output.loss(outputs, targets)
    if not isinstance(losses, Tensor) or losses.shape != (batch_size,) or losses.isfinite().all():
        return
    bad = (~losses.isfinite()).nonzero().flatten().tolist()
    raise NonFiniteGradientError(
        f"The loss by {type(module.model_output).__name__} is NaN or Inf (positions {bad} of the {batch_size} samples "
        "that were tried), although the outputs are finite. Check the targets.",
        bad,
        batch_size,
    )


def measured(module: Any, batch: Any) -> Tensor:
    """Run a module once for what is attributed of it, before it is known whether it can be.

    Returns the model outputs of a module with :class:`lightning_attr.AttributionMixin`, the training loss of any other.
    """
    return _mixin_output(module, batch)[0] if has_mixin(module) else training_loss(module, batch)


def describe_output(module: Any) -> str:
    """Say in words what of a module is attributed, for the record.

    Returns the model output with its plain arguments, or the training loss.

    Example:
        >>> from lightning_attr import AttributionMixin
        >>> class Classifier(AttributionMixin, nn.Linear): ...
        >>> describe_output(Classifier(1, 1))
        'the model output MulticlassMargin(temperature=1.0)'
    """
    if not has_mixin(module):
        return "the loss of `training_step`"
    output = module.model_output
    plain = [f"{k}={v!r}" for k, v in sorted(vars(output).items()) if isinstance(v, (bool, int, float, str))]
    return f"the model output {type(output).__name__}({', '.join(plain)})"


def has_mixin(module: Any) -> bool:
    """Say whether a module says itself what is attributed.

    Returns whether it is a module with the attributes of :class:`lightning_attr.AttributionMixin`.

    Example:
        >>> has_mixin(nn.Linear(1, 1))
        False
    """
    return isinstance(module, nn.Module) and hasattr(module, "attribution_step") and hasattr(module, "model_output")


def sample_values(module: Any, batch: Any, batch_size: int) -> Tensor:
    """Compute what is attributed of each sample, before anything about the module is known.

    Returns the model outputs, of the shape that the module gives them; else the negative loss of each sample, ``(b,)``.

    Example:
        >>> from lightning_attr import AttributionMixin
        >>> class Classifier(AttributionMixin, nn.Linear): ...
        >>> sample_values(Classifier(2, 3), (torch.ones(4, 2), torch.tensor([0, 1, 2, 0])), 4).shape
        torch.Size([4])
    """
    if has_mixin(module):
        return _mixin_output(module, batch)[0]
    return TrainingLoss(module, "mean", captured=False).sample_outputs(batch, batch_size)


# The mixin's model output ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MixinOutput:
    """The model output of a module with :class:`lightning_attr.AttributionMixin`."""

    module: Any = field(repr=False, compare=False)

    def forward(self, batch: Any, batch_size: int) -> tuple[Tensor, Any]:
        """Output of each sample, ``(b,)``, and what it was computed from."""
        return _mixin_output(self.module, batch)

    def columns(self, batch: Any, output: Tensor, seen: Any) -> dict[str, Tensor]:
        """Output, loss, its derivatives, and the label if the targets are class labels."""
        outputs, targets = seen
        model_output: ModelOutput = self.module.model_output
        with torch.no_grad():
            values = {"output": output, **model_output.values(outputs, targets, output)}
        integral = isinstance(targets, Tensor) and not (targets.dtype.is_floating_point or targets.dtype.is_complex)
        if integral and targets.shape == values["loss"].shape:
            values["label"] = targets.long()
        return values

    def sample_outputs(self, batch: Any, batch_size: int) -> Tensor:
        """Output of each sample, ``(b,)``; each is its own already."""
        return _mixin_output(self.module, batch)[0]

    def functional_output(self, params: Mapping[str, Tensor], batch: Any) -> Tensor:
        """Output at given parameters."""
        output: Tensor = self.module.functional_output(params, {}, batch)
        return output

    def total_loss(self, params: Mapping[str, Tensor], batch: Any, batch_size: int) -> Tensor:
        """Sum of the losses at given parameters, ``()``."""
        return self.losses(params, batch, batch_size).sum()

    def losses(self, params: Mapping[str, Tensor], batch: Any, batch_size: int) -> Tensor:
        """Losses at given parameters, ``(b,)``."""
        losses: Tensor = self.module.functional_loss(params, {}, batch)
        return losses


def _mixin_output(module: Any, batch: Any) -> tuple[Tensor, tuple[Any, Any]]:
    outputs, targets = attribution_outputs(module, batch)
    return module.model_output.output(outputs, targets), (outputs, targets)
