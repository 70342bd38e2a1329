"""Whether a gradient rule gives what autograd gives, one sample after the other."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from lightning_attr.batches.nested import float_tensors
from lightning_attr.batches.tolerance import assert_close, in_dtype
from lightning_attr.gradients.factored import ParameterGradient, materialise
from lightning_attr.gradients.hooks import hooked_gradients, hooked_layers


def check_gradient_rule(layer: nn.Module, *inputs: Tensor) -> None:
    """Check the rule of a layer against autograd, one sample after the other, in float64.

    The rule must give the gradient of every parameter, whether the layer is called once or twice in one forward pass,
    for the whole batch and for a batch of one; for a bfloat16 copy of the layer it must give finite values. The layer
    is checked in eval mode, on copies; a layer that does not run in bfloat16 is not asked to.

    Args:
        layer: the layer, its parameters at values that are not special (a weight of ones hides errors).
        inputs: its inputs, ``(b, ...)`` each, ``b`` at least 2; the rule sees the first.

    Raises:
        AssertionError: if a gradient is missing, not finite, of a wrong shape, or not autograd's; the message says of
            which parameter, and by how much.
        ValueError: if the layer has no rule or no parameters, or the inputs are not a batch.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_attr.gradients import gradient_rule
        >>> check_gradient_rule(nn.Linear(3, 2), torch.randn(4, 3))
        >>> class Scale(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight = nn.Parameter(torch.randn(3))
        ...     def forward(self, x):
        ...         return x * self.weight
        >>> @gradient_rule(Scale)
        ... def scale(layer, activations, backprops):
        ...     return {"weight": backprops}                      # forgets the input
        >>> check_gradient_rule(Scale(), torch.randn(4, 3))
        Traceback (most recent call last):
        ...
        AssertionError: Scale: expected the rule to give autograd's gradient of `weight` (called once, a batch of 4)...
    """
    name, b = type(layer).__name__, len(inputs[0]) if inputs and inputs[0].ndim else 0
    if b < 2 or any(x.ndim == 0 or len(x) != b for x in inputs):
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        raise ValueError(
            f"Expected `inputs` to be tensors of shape (b, ...) with one b >= 2, but got {shapes or 'none'}."
        )
    if not hooked_layers(copy.deepcopy(layer).requires_grad_(True)):
        raise ValueError(f"Expected {name} to have parameters and a gradient rule: register one with `gradient_rule`.")
    double = copy.deepcopy(layer).double().eval().requires_grad_(True)
    inputs = tuple(in_dtype(x, torch.float64) for x in inputs)
    # Two calls see different rows, so that a rule that keeps something from one call to the next is found.
    once, twice = ([inputs], [inputs, tuple(x.roll(1, 0) for x in inputs)])
    for calls, count in ((once, "once"), (twice, "twice")):
        for rows in (b, 1):
            where = f"{name}: expected the rule to give {{}} (called {count}, a batch of {rows}"
            _check_rule(double, [tuple(x[:rows] for x in call) for call in calls], rows, where)
    half = copy.deepcopy(double).bfloat16()
    halves = tuple(in_dtype(x, torch.bfloat16) for x in inputs)
    if _runs_on(half, halves):
        for parameter, gradient in _rule_rows(half, [halves], b, f"{name}: expected the rule to give {{}} (").items():
            assert gradient.isfinite().all(), (
                f"{name}: expected the rule to give finite gradients of `{parameter}` in bfloat16, but "
                f"{int((~gradient.isfinite()).sum())} of {gradient.numel()} values are NaN or Inf."
            )


def _check_rule(layer: nn.Module, calls: list[tuple[Tensor, ...]], rows: int, where: str) -> None:
    found = _rule_rows(layer, calls, rows, where)
    params = dict(layer.named_parameters())
    with torch.enable_grad():
        loop = [
            torch.autograd.grad(
                _weighted_outputs(layer, [tuple(x[i : i + 1] for x in call) for call in calls], 1).sum(),
                list(params.values()),
                materialize_grads=True,
            )
            for i in range(rows)
        ]
    for name, *expected in zip(params, *loop, strict=True):
        assert name in found, f"{where.format(f'a gradient of `{name}`')}), but it gives none."
        message = where.format(f"autograd's gradient of `{name}`") + ")"
        assert_close([found[name]], [torch.stack(expected)], message)


def _rule_rows(layer: nn.Module, calls: list[tuple[Tensor, ...]], rows: int, where: str) -> dict[str, Tensor]:
    """Per-sample gradients by the layer's rule, ``(rows, *shape)`` for each parameter that it gives."""
    found: dict[str, Tensor] = {}

    def add(name: str, gradient: ParameterGradient) -> None:
        shape = tuple(layer.get_parameter(name).shape)
        size = tuple(gradient.shape) if isinstance(gradient, Tensor) else tuple(gradient.materialise().shape)
        expected = (rows, *shape)
        matches = size == expected if isinstance(gradient, Tensor) else size == (rows, shape[0], size[2])
        assert matches, f"{where.format(f'a gradient of `{name}` of shape {expected}')}), but got {size}."
        found[name] = found.get(name, torch.zeros(())) + materialise(gradient, shape)

    names = [name for own in hooked_layers(layer).values() for name in own.values()]
    hooked_gradients(layer, lambda: _weighted_outputs(layer, calls, rows), rows, names, add)
    return found


def _weighted_outputs(layer: nn.Module, calls: list[tuple[Tensor, ...]], rows: int) -> Tensor:
    """One value a sample that weighs every entry of the outputs, and every call, differently."""
    total = torch.zeros(rows, device=calls[0][0].device)
    for scale, call in enumerate(calls, start=1):
        for output in float_tensors(layer(*call)):
            flat = output.reshape(rows, -1)
            total = total + ((scale * flat).sin() * torch.linspace(-1, 2, flat.shape[1]).to(flat)).sum(1)
    return total


def _runs_on(layer: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
    """Whether a layer runs on inputs of this precision."""
    try:
        with torch.no_grad():
            layer(*inputs)
    except (RuntimeError, NotImplementedError):
        return False
    return True
