"""The gradient of one sample that is a batch of its own: plain autograd, whatever its layers see as rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lightning_attr.gradients.functional import densely
from lightning_attr.gradients.plain_execution import plain_execution


def whole_gradients(forward: Callable[[], Tensor], params: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Differentiate the output of one sample in whole parameters.

    Shapes: forward (1,). Returns the output, detached, ``(1,)``, and parameter name -> gradient ``(1, *shape)``.
    """
    with torch.enable_grad(), plain_execution():
        output = forward()
        if not output.requires_grad:
            return output, {name: torch.zeros_like(p).unsqueeze(0) for name, p in params.items()}
        found = torch.autograd.grad(output.sum(), list(params.values()), allow_unused=True)
    gradients = (torch.zeros_like(p) if g is None else densely(g) for g, p in zip(found, params.values(), strict=True))
    return output.detach(), {name: gradient.unsqueeze(0) for name, gradient in zip(params, gradients, strict=True)}
