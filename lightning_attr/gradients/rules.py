"""One rule a layer type: the per-sample gradients of its parameters, from its input and the gradient at its output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_attr.errors import UnsupportedLayerError
from lightning_attr.gradients.factored import ConvSum, GatherSum, OuterSum, ParameterGradient

__all__ = ["GradientRule", "check_layers", "gradient_rule", "rule_for", "supported_layers"]

GradientRule: TypeAlias = Callable[[Any, Tensor, Tensor], dict[str, ParameterGradient]]

_RULES: dict[type[nn.Module], GradientRule] = {}


def gradient_rule(*layer_types: type[nn.Module]) -> Callable[[GradientRule], GradientRule]:
    """Register the rule of one or more layer types.

    A rule takes ``(layer, activations, backprops)``: the layer, its first input ``(b, ...)`` and the gradient at its
    output ``(b, ...)``. It returns, for each of its own parameters by local name, the per-sample gradients: a tensor
    ``(b, *parameter.shape)`` or a factored form of it.

    Args:
        layer_types: the types; subclasses share the rule unless they override ``forward``.

    Returns:
        A decorator that returns the rule unchanged.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> class Scale(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight = nn.Parameter(torch.ones(3))
        ...     def forward(self, x):
        ...         return x * self.weight
        >>> @gradient_rule(Scale)
        ... def scale(layer, activations, backprops):
        ...     return {"weight": (activations * backprops).flatten(1, -2).sum(1) if activations.ndim > 2
        ...             else activations * backprops}
        >>> rule_for(Scale()) is scale
        True
    """

    def register(rule: GradientRule) -> GradientRule:
        for layer_type in layer_types:
            known = _RULES.setdefault(layer_type, rule)
            if known is not rule:
                raise ValueError(
                    f"{layer_type.__name__} already has the gradient rule `{known.__name__}`; registering "
                    f"`{rule.__name__}` as well would make results depend on the order of imports."
                )
        return rule

    return register


def rule_for(layer: nn.Module) -> GradientRule | None:
    """Find the rule of a layer.

    Args:
        layer: any module.

    Returns:
        The rule of its type, or of the nearest base whose ``forward`` it still uses; None if there is none.

    Example:
        >>> from torch import nn
        >>> rule_for(nn.Linear(1, 1)).__name__
        'linear'
        >>> rule_for(nn.LSTM(1, 1)) is None
        True
    """
    for cls in type(layer).__mro__:
        if cls in _RULES:
            return _RULES[cls] if type(layer).forward is cls.forward else None
    return None


def check_layers(module: nn.Module) -> None:
    """Check that no layer is in a state in which per-sample gradients do not exist.

    Args:
        module: any module.

    Raises:
        UnsupportedLayerError: if one is: BatchNorm in train mode or without running statistics, or a trainable
            Embedding with ``max_norm`` or ``scale_grad_by_freq``.

    Example:
        >>> from torch import nn
        >>> check_layers(nn.Sequential(nn.BatchNorm1d(3)).eval())
        >>> check_layers(nn.Sequential(nn.BatchNorm1d(3)).train())
        Traceback (most recent call last):
        ...
        lightning_attr.errors.UnsupportedLayerError: `0` (BatchNorm1d) is in train mode...
    """
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm) and (layer.training or layer.running_mean is None):
            state = "is in train mode" if layer.training else "has no running statistics (track_running_stats=False)"
            raise UnsupportedLayerError(
                f"`{name}` ({type(layer).__name__}) {state}, so that each sample's output depends on the whole batch "
                "and per-sample gradients do not exist. Put the module into eval mode (`module.eval()`) and keep "
                "running statistics, or use GroupNorm."
            )
        mixes = isinstance(layer, nn.Embedding) and (layer.max_norm is not None or layer.scale_grad_by_freq)
        if mixes and layer.weight.requires_grad:
            raise UnsupportedLayerError(
                f"`{name}` ({type(layer).__name__}) with `max_norm` or `scale_grad_by_freq` has no per-sample "
                "gradient: the first changes the weights in the forward pass, the second divides by counts over the "
                "batch. Build the layer without them, or freeze it."
            )


@gradient_rule(nn.Linear)
def linear(layer: nn.Linear, activations: Tensor, backprops: Tensor) -> dict[str, ParameterGradient]:
    """``y = x W^T + b``, over any number of positions between batch and features."""
    delta = _positions(backprops)
    return {"weight": OuterSum(delta, _positions(activations)), "bias": delta.sum(1)}


@gradient_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def convolution(
    layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, activations: Tensor, backprops: Tensor
) -> dict[str, ParameterGradient]:
    """Convolutions, with every padding mode of theirs."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(activations, _padding(layer), mode=mode)
    weight = ConvSum(padded, backprops, layer.kernel_size, layer.stride, layer.dilation, layer.groups)
    return {"weight": weight, "bias": backprops.flatten(2).sum(2)}


@gradient_rule(nn.Embedding)
def embedding(layer: nn.Embedding, activations: Tensor, backprops: Tensor) -> dict[str, ParameterGradient]:
    """Rows of a table; the padding row has no gradient."""
    ids, delta = activations.flatten(1) if activations.ndim > 1 else activations.unsqueeze(1), _positions(backprops)
    if layer.padding_idx is not None:
        delta = delta.masked_fill((ids == layer.padding_idx).unsqueeze(2), 0)
    return {"weight": GatherSum(ids, delta, layer.num_embeddings)}


@gradient_rule(nn.LayerNorm)
def layer_norm(layer: nn.LayerNorm, activations: Tensor, backprops: Tensor) -> dict[str, ParameterGradient]:
    """Scale and shift after normalising over the last dimensions."""
    normalised = F.layer_norm(activations, layer.normalized_shape, eps=layer.eps)
    keep = 1 + len(layer.normalized_shape)
    return {
        "weight": _sum_positions(normalised * backprops, keep),
        "bias": _sum_positions(backprops, keep),
    }


@gradient_rule(nn.GroupNorm)
def group_norm(layer: nn.GroupNorm, activations: Tensor, backprops: Tensor) -> dict[str, ParameterGradient]:
    """Scale and shift a channel after normalising over groups of channels."""
    return _scale_and_shift(F.group_norm(activations, layer.num_groups, eps=layer.eps), backprops)


@gradient_rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def batch_norm(layer: nn.BatchNorm1d, activations: Tensor, backprops: Tensor) -> dict[str, ParameterGradient]:
    """Scale and shift a channel, with the running statistics as constants."""
    assert layer.running_mean is not None  # `check_layers` saw to that
    assert layer.running_var is not None
    mean, variance = layer.running_mean.to(activations), layer.running_var.to(activations)
    normalised = F.batch_norm(activations, mean, variance, eps=layer.eps)
    return _scale_and_shift(normalised, backprops)


def _positions(values: Tensor) -> Tensor:
    """View ``(b, ..., d)`` as ``(b, s, d)``."""
    return values.reshape(values.shape[0], -1, values.shape[-1])


def _sum_positions(values: Tensor, keep: int) -> Tensor:
    """Sum over all dimensions between the first and the last ``keep - 1``."""
    between = tuple(range(1, values.ndim - keep + 1))
    return values.sum(between) if between else values


def _scale_and_shift(normalised: Tensor, backprops: Tensor) -> dict[str, ParameterGradient]:
    """Gradients of a weight and bias a channel, ``(b, c)``, for values ``(b, c, ...)``."""
    return {
        "weight": (normalised * backprops).reshape(*backprops.shape[:2], -1).sum(2),
        "bias": backprops.reshape(*backprops.shape[:2], -1).sum(2),
    }


def _padding(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> list[int]:
    """Padding as ``torch.nn.functional.pad`` wants it: before and after, last dimension first."""
    if layer.padding == "valid":
        return [0] * (2 * len(layer.kernel_size))
    pads: list[int] = []
    for i in reversed(range(len(layer.kernel_size))):
        if layer.padding == "same":
            total = layer.dilation[i] * (layer.kernel_size[i] - 1)
            pads += [total // 2, total - total // 2]
        else:
            pads += [int(layer.padding[i])] * 2
    return pads


def supported_layers() -> tuple[type[nn.Module], ...]:
    """List the layer types that have a rule.

    Returns:
        The types, in the order of registration.

    Example:
        >>> import torch
        >>> torch.nn.Conv2d in supported_layers()
        True
    """
    return tuple(_RULES)
