"""Gradient rules of linear maps, and of the slopes that act on each feature."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_attr.gradients.factored import OuterSum, ParameterGradient, RowSum
from lightning_attr.gradients.rules import gradient_rule


@gradient_rule(nn.Linear)
def linear(layer: nn.Linear, activations: Tensor, backprops: Tensor) -> dict[str, ParameterGradient]:
    """``y = x W^T + b``, over any number of positions between batch and features."""
    weight = OuterSum(positions(backprops), positions(activations))
    return {"weight": weight, "bias": RowSum(weight)}


# Before transformers 4.22 it lived in `modeling_utils`.
@gradient_rule("transformers.pytorch_utils.Conv1D", "transformers.modeling_utils.Conv1D")
def transposed_linear(layer: nn.Module, activations: Tensor, backprops: Tensor) -> dict[str, ParameterGradient]:
    """``y = x W + b``: the Conv1D of transformers, whose weight is ``(in, out)``."""
    delta = positions(backprops)
    return {"weight": OuterSum(positions(activations), delta), "bias": delta.sum(1)}


@gradient_rule(nn.PReLU)
def prelu(layer: nn.PReLU, activations: Tensor, backprops: Tensor) -> dict[str, ParameterGradient]:
    """Slopes where the input is negative: one, or one a channel."""
    slopes = backprops * activations.clamp(max=0)
    return {"weight": slopes.reshape(len(slopes), layer.num_parameters, -1).sum(2)}


def positions(values: Tensor) -> Tensor:
    """View ``(b, ..., d)`` as ``(b, s, d)``."""
    return values.reshape(values.shape[0], -1, values.shape[-1])
