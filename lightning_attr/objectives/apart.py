"""What is attributed of samples that cannot be taken from a batch: each is run as a batch of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_attr.batches.samples_apart import SamplesApart
from lightning_attr.errors import BatchDependenceError, NonFiniteGradientError
from lightning_attr.gradients.plain_execution import plain_execution
from lightning_attr.objectives.mixin import attribution_outputs
from lightning_attr.objectives.objective import MixinOutput, Objective, TrainingLoss, batch_objective, has_mixin
from lightning_attr.outputs.check import check_model_output


@dataclass(frozen=True)
class OutputApart:
    """An output, sample by sample.

    Args:
        inner: the output of a batch of one sample.

    Example:
        >>> from lightning_attr.objectives.target_function import MeasuredOutput
        >>> layer = torch.nn.Linear(1, 1)
        >>> total = OutputApart(MeasuredOutput(layer, lambda module, nodes: module(nodes).sum().reshape(1)))
        >>> total.forward(SamplesApart([torch.ones(2, 1), torch.ones(3, 1)]), 2)[0].shape
        torch.Size([2])
    """

    inner: Objective

    @property
    def module(self) -> Any:
        """Whose output it is."""
        return self.inner.module

    def forward(self, batch: SamplesApart, batch_size: int) -> tuple[Tensor, Any]:
        """Output of each sample, ``(b,)``, and what the inner one keeps of each."""
        found = [self.inner.forward(one, 1) for one in batch]
        return torch.cat([output for output, _ in found]), [(output.detach(), seen) for output, seen in found]

    def columns(self, batch: SamplesApart, output: Tensor, seen: Any) -> dict[str, Tensor]:
        """Values of each sample, ``(b,)``."""
        each = [self.inner.columns(one, out, kept) for one, (out, kept) in zip(batch, seen, strict=True)]
        return {name: torch.cat([columns[name] for columns in each]) for name in each[0]}

    def sample_outputs(self, batch: SamplesApart, batch_size: int) -> Tensor:
        """Output of each sample, ``(b,)``, each with its own gradient."""
        return self.forward(batch, batch_size)[0]

    def functional_output(self, params: Mapping[str, Tensor], batch: SamplesApart) -> Tensor:
        """Output at given parameters, ``(b,)``."""
        return torch.cat([self.inner.functional_output(params, one) for one in batch])

    def total_loss(self, params: Mapping[str, Tensor], batch: SamplesApart, batch_size: int) -> Tensor:
        """Sum of the losses at given parameters, ``()``."""
        return torch.stack([self.inner.total_loss(params, one, 1) for one in batch]).sum()

    def losses(self, params: Mapping[str, Tensor], batch: SamplesApart, batch_size: int) -> Tensor:
        """Losses at given parameters, ``(b,)``."""
        return torch.cat([self.inner.losses(params, one, 1) for one in batch])


def objective_of(module: Any, batch: Any, batch_size: int) -> Objective:
    """Choose what of a module is attributed, and check it: of samples in a batch, or apart.

    Returns as :func:`lightning_attr.objectives.objective.batch_objective` and :func:`apart_objective` do.

    Example:
        >>> import lightning as L
        >>> class Nodes(L.LightningModule):
        ...     def training_step(self, batch):
        ...         return batch.square().mean()
        >>> objective_of(Nodes(), torch.tensor([1.0, 2.0, 4.0]), 3)
        TrainingLoss(reduction='mean', captured=True)
    """
    if isinstance(batch, SamplesApart):
        return apart_objective(module, batch)
    return batch_objective(module, batch, batch_size)


def apart_objective(module: Any, batch: SamplesApart) -> OutputApart:
    """Choose what of a module is attributed, and check it on samples that are apart.

    Returns the model output of a module with the mixin, the training loss of any other.

    Example:
        >>> import lightning as L
        >>> class Nodes(L.LightningModule):
        ...     def training_step(self, batch):
        ...         return batch.square().mean()
        >>> apart_objective(Nodes(), SamplesApart([torch.ones(2), torch.ones(3)])).inner
        TrainingLoss(reduction='mean', captured=False)
    """
    mixin = has_mixin(module)
    objective = OutputApart(MixinOutput(module) if mixin else TrainingLoss(module, "mean", captured=False))
    with torch.enable_grad(), plain_execution():  # a step may differentiate inside
        values, again = (objective.forward(batch, len(batch))[0].detach() for _ in range(2))
    bad = (~values.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise NonFiniteGradientError(
            f"The {'model output' if mixin else 'training loss'} of samples is NaN or Inf. Check the inputs and the "
            "weights.",
            bad,
            len(batch),
        )
    if not torch.allclose(values, again, rtol=1e-4):
        raise BatchDependenceError(
            f"What is attributed of {type(module).__name__} is random: the same samples give {values.tolist()}, then "
            f"{again.tolist()}. Look for noise or dropout that does not heed eval mode (`self.training`)."
        )
    if mixin:
        for one in batch:
            with torch.no_grad():
                outputs, targets = attribution_outputs(module, one)
            check_model_output(module.model_output, outputs, targets, dtype=None)
    return objective
