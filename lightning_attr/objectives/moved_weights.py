"""The losses of a step with other weights than it has: what cannot be told apart at the start is told apart there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_attr.batches.nested import select_rows
from lightning_attr.gradients.functional import call_with
from lightning_attr.gradients.plain_execution import plain_execution
from lightning_attr.user_code.training_step import training_loss

__all__ = ["losses_elsewhere"]


def losses_elsewhere(
    module: Any, batch: Any, batch_size: int, batches: Sequence[Any]
) -> list[tuple[Tensor, list[Tensor]]]:
    """Give the losses of samples and of batches with weights moved a little, where there are such losses.

    A head that starts at zero gives all samples the same loss, of which every weighted mean is the mean.
    """
    if any(isinstance(layer, torch.jit.ScriptModule) for layer in module.modules()):
        return []  # nothing can be put into the places of its parameters
    generator = torch.Generator().manual_seed(0)
    moved = {
        name: (p + 0.1 * (1 + p.abs().mean()) * torch.randn(p.shape, generator=generator).to(p)).detach()
        for name, p in module.named_parameters()
        if p.requires_grad
    }

    def value(part: Any) -> Tensor:
        loss: Tensor = call_with(module, moved, lambda own: training_loss(module, own), part)
        return loss.detach()

    with plain_execution():
        losses = torch.stack([value(select_rows(batch, batch_size, [i])) for i in range(batch_size)])
        found = [value(part) for part in batches]
    return [(losses, found)] if losses.isfinite().all() else []
