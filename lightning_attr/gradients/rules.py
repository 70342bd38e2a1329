"""One rule a layer type: the per-sample gradients of its parameters, from its input and the gradient at its output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_attr.errors import UnsupportedLayerError
from lightning_attr.gradients.factored import ParameterGradient

GradientRule: TypeAlias = Callable[[Any, Tensor, Tensor], dict[str, ParameterGradient]]
Attach: TypeAlias = Callable[[GradientRule, Tensor, Tensor], Tensor]
ExplicitForward: TypeAlias = Callable[..., Any]

CHECKED_LAYERS = (_BatchNorm, nn.Embedding, nn.EmbeddingBag)

_RULES: dict[type[nn.Module] | str, GradientRule] = {}
_FORWARDS: dict[type[nn.Module], ExplicitForward] = {}


def gradient_rule(*layer_types: type[nn.Module] | str, replace: bool = False) -> Callable[[GradientRule], GradientRule]:
    """Register the rule of one or more layer types.

    A rule takes ``(layer, activations, backprops)``: the layer, its first input ``(b, ...)`` and the gradient at its
    output ``(b, ...)``. It returns, for each of its own parameters by local name, the per-sample gradients: a tensor
    ``(b, *parameter.shape)`` or a factored form of it.

    Args:
        layer_types: the types; subclasses share the rule unless they override ``forward``. A type of a library that is
            not imported here goes by its qualified name, such as ``"transformers.pytorch_utils.Conv1D"``.
        replace: put the rule in the place of the one that a type already has, on purpose.

    Returns:
        A decorator that returns the rule unchanged. It raises ValueError if a type already has another rule.

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
            known = _RULES.get(layer_type, rule)
            if known is not rule and not replace:
                name = layer_type if isinstance(layer_type, str) else layer_type.__name__
                raise ValueError(
                    f"{name} already has the gradient rule `{known.__name__}`; registering `{rule.__name__}` as well "
                    "would make results depend on the order of imports. Pass `replace=True` to override it."
                )
        _RULES.update(dict.fromkeys(layer_types, rule))
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
        rule = _RULES.get(cls) or _RULES.get(f"{cls.__module__}.{cls.__qualname__}")
        if rule is not None:
            return rule if _runs_forward_of(cls, layer) else None
    return None


def explicit_forward(layer_type: type[nn.Module]) -> Callable[[ExplicitForward], ExplicitForward]:
    """Register a forward of a layer type that shows what its parameters act on, where inputs and output do not tell.

    It takes ``(layer, attach, *args, **kwargs)`` and returns what the layer's own forward would. Each use of parameters
    goes through ``output = attach(rule, activations, output)``; what does not goes through the fallback.

    Returns a decorator that returns the forward unchanged.
    """

    def register(forward: ExplicitForward) -> ExplicitForward:
        _FORWARDS[layer_type] = forward
        return forward

    return register


def forward_for(layer: nn.Module) -> ExplicitForward | None:
    """Find the explicit forward of a layer.

    Returns that of its type, or of the nearest base whose ``forward`` it still uses; None if there is none.
    """
    for cls in type(layer).__mro__:
        if cls in _FORWARDS:
            return _FORWARDS[cls] if _runs_forward_of(cls, layer) else None
    return None


def _runs_forward_of(layer_type: Any, layer: nn.Module) -> bool:
    return type(layer).forward is layer_type.forward


def check_layers(module: nn.Module) -> None:
    """Check that no layer is in a state in which per-sample gradients do not exist."""
    for name, layer in module.named_modules():
        check_layer(name, layer)


def check_layer(name: str, layer: nn.Module) -> None:
    """Check one layer as :func:`check_layers` does; only those of ``CHECKED_LAYERS`` can fail."""
    if isinstance(layer, _BatchNorm) and (layer.training or layer.running_mean is None):
        state = "is in train mode" if layer.training else "has no running statistics (track_running_stats=False)"
        raise UnsupportedLayerError(
            f"`{name}` ({type(layer).__name__}) {state}, so that each sample's output depends on the whole batch "
            "and per-sample gradients do not exist. Put the module into eval mode (`module.eval()`) and keep "
            "running statistics, or use GroupNorm."
        )
    if not isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) or not layer.weight.requires_grad:
        return
    if layer.max_norm is not None or layer.scale_grad_by_freq:
        raise UnsupportedLayerError(
            f"`{name}` ({type(layer).__name__}) with `max_norm` or `scale_grad_by_freq` has no per-sample "
            "gradient: the first changes the weights in the forward pass, the second divides by counts over the "
            "batch. Build the layer without them, or freeze it."
        )


def supported_layers() -> tuple[type[nn.Module] | str, ...]:
    """List the layer types that have a rule.

    Returns:
        The types, in the order of registration; a type that goes by its qualified name is given by it.

    Example:
        >>> import torch
        >>> torch.nn.Conv2d in supported_layers()
        True
    """
    return (*_RULES, *_FORWARDS)
