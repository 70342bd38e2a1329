"""Gradient rules of the scales and shifts that follow a normalisation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_attr.gradients.factored import ParameterGradient
from lightning_attr.gradients.rules import gradient_rule


@gradient_rule(nn.LayerNorm)
def layer_norm(layer: nn.LayerNorm, activations: Tensor, backprops: Tensor) -> dict[str, ParameterGradient]:
    """Scale and shift after normalising over the last dimensions."""
    normalised = F.layer_norm(activations, layer.normalized_shape, eps=layer.eps)
    keep = 1 + len(layer.normalized_shape)
    return {
        "weight": _sum_positions(normalised.mul_(backprops), keep),
        "bias": _sum_positions(backprops, keep),
    }


@gradient_rule(nn.RMSNorm)
def rms_norm(layer: nn.RMSNorm, activations: Tensor, backprops: Tensor) -> dict[str, ParameterGradient]:
    """Scale after dividing by the root mean square over the last dimensions."""
    shape = list(layer.normalized_shape)
    normalised = F.rms_norm(activations, shape, eps=layer.eps)
    return {"weight": _sum_positions(normalised.mul_(backprops), 1 + len(shape))}


# Norms of transformers in Python. Without a rule, their scales would be followed through every function of the module.
@gradient_rule("transformers.models.t5.modeling_t5.T5LayerNorm", "transformers.models.mt5.modeling_mt5.MT5LayerNorm")
def t5_norm(layer: Any, activations: Tensor, backprops: Tensor) -> dict[str, ParameterGradient]:
    """Scale after dividing by the root mean square, which is in single precision whatever the input."""
    variance = activations.to(torch.float32).square().mean(-1, keepdim=True)
    normalised = activations * torch.rsqrt(variance + layer.variance_epsilon)
    return {"weight": _sum_positions(normalised.mul_(backprops), 2)}


@gradient_rule(
    "transformers.models.llama.modeling_llama.LlamaRMSNorm",
    "transformers.models.mistral.modeling_mistral.MistralRMSNorm",
    "transformers.models.phi3.modeling_phi3.Phi3RMSNorm",
    "transformers.models.qwen2.modeling_qwen2.Qwen2RMSNorm",
    "transformers.models.qwen3.modeling_qwen3.Qwen3RMSNorm",
)
def llama_norm(layer: Any, activations: Tensor, backprops: Tensor) -> dict[str, ParameterGradient]:
    """The same, all of it in single precision."""
    normalised = F.rms_norm(activations.to(torch.float32), activations.shape[-1:], eps=layer.variance_epsilon)
    return {"weight": _sum_positions(normalised.to(backprops.dtype) * backprops, 2)}


@gradient_rule(nn.GroupNorm)
def group_norm(layer: nn.GroupNorm, activations: Tensor, backprops: Tensor) -> dict[str, ParameterGradient]:
    """Scale and shift a channel after normalising over groups of channels."""
    return _scale_and_shift(F.group_norm(activations, layer.num_groups, eps=layer.eps), backprops)


@gradient_rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def batch_norm(layer: nn.BatchNorm1d, activations: Tensor, backprops: Tensor) -> dict[str, ParameterGradient]:
    """Scale and shift a channel, with the running statistics as constants."""
    assert layer.running_mean is not None  # `check_layers` saw to that
    assert layer.running_var is not None
    normalised = _by_running_statistics(activations, layer.running_mean, layer.running_var, layer.eps)
    return _scale_and_shift(normalised, backprops)


@gradient_rule(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def instance_norm(layer: nn.InstanceNorm1d, activations: Tensor, backprops: Tensor) -> dict[str, ParameterGradient]:
    """Scale and shift a channel after normalising each channel of a sample, or by running statistics in eval mode."""
    if layer.training or layer.running_mean is None or layer.running_var is None:
        return _scale_and_shift(F.instance_norm(activations, eps=layer.eps), backprops)
    normalised = _by_running_statistics(activations, layer.running_mean, layer.running_var, layer.eps)
    return _scale_and_shift(normalised, backprops)


def _by_running_statistics(activations: Tensor, mean: Tensor, variance: Tensor, eps: float) -> Tensor:
    return F.batch_norm(activations, mean.to(activations), variance.to(activations), eps=eps)


def _sum_positions(values: Tensor, keep: int) -> Tensor:
    """Sum over all dimensions between the first and the last ``keep - 1``."""
    between = tuple(range(1, values.ndim - keep + 1))
    return values.sum(between) if between else values


def _scale_and_shift(normalised: Tensor, backprops: Tensor) -> dict[str, ParameterGradient]:
    """Gradients of a weight and bias a channel, ``(b, c)``, for values ``(b, c, ...)``."""
    return {
        "weight": normalised.mul_(backprops).reshape(*backprops.shape[:2], -1).sum(2),
        "bias": backprops.reshape(*backprops.shape[:2], -1).sum(2),
    }
