"""Checks and slow references that a user can call on a model output, a gradient rule or a module of their own."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lightning_attr.batch import float_tensors, map_tensors
from lightning_attr.gradients.factored import ParameterGradient, materialise
from lightning_attr.gradients.hooks import hooked_gradients, hooked_layers
from lightning_attr.outputs import ModelOutput

__all__ = ["check_gradient_rule", "check_model_output"]


def check_model_output(
    model_output: ModelOutput, outputs: Any, targets: Any, dtype: torch.dtype | None = torch.float64
) -> None:
    r"""Check that the three functions of a model output belong together, on outputs of a few samples.

    The shapes are ``(b,)``, no sample's value depends on another's outputs, the loss depends on the outputs only
    through :math:`f`, so that :math:`d\ell = -q\,df`, the Newton weight :math:`w` is not negative, and, where the class
    overrides ``newton_weight``, :math:`dq = -w\,df`; a loss that is not curved in the output (:math:`q` constant) may
    weigh every sample one. An output whose ``exact`` is False is not held to the two derivatives.

    Args:
        model_output: what is checked.
        outputs: outputs of ``b`` samples, as ``model_output`` takes them, with at least one floating-point tensor.
        targets: their targets.
        dtype: floating-point tensors are converted to it first; None checks them as they are, with a wider tolerance.

    Raises:
        AssertionError: if a property does not hold; the message says which, and by how much.
        ValueError: if the outputs hold no floating-point tensor.

    Example:
        >>> import torch
        >>> from lightning_attr.outputs import MulticlassMargin
        >>> check_model_output(MulticlassMargin(), torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))
        >>> class Wrong(MulticlassMargin):
        ...     def out_to_loss(self, outputs, targets):
        ...         return -super().out_to_loss(outputs, targets)
        >>> check_model_output(Wrong(), torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))
        Traceback (most recent call last):
        ...
        AssertionError: Wrong: expected grad loss = -out_to_loss * grad output...
    """
    name = type(model_output).__name__
    outputs = map_tensors(map_tensors(outputs, lambda t: _convert(t, dtype)), _as_leaf)
    targets = map_tensors(targets, lambda t: _convert(t, dtype))
    leaves = float_tensors(outputs)
    if not leaves:
        raise ValueError(f"Expected the outputs for {name} to hold a floating-point tensor, but found none.")
    with torch.enable_grad():
        parts = ("output", "loss", "out_to_loss", "newton_weight")
        f, loss, q, w = (getattr(model_output, part)(outputs, targets) for part in parts)
        for part, value in zip(parts, (f, loss, q, w), strict=True):
            shape = tuple(f.shape) if f.ndim == 1 else "(b,)"
            assert tuple(value.shape) == shape, (
                f"{name}: expected `{part}` to return one value a sample, of shape {shape}, but got "
                f"{tuple(value.shape)}."
            )
        _check_independence(name, f, leaves)
        # One weight a sample tells the samples apart in a single backward pass.
        weight = torch.linspace(1, 2, len(f)).to(f)
        dl, dq = (_gradient(part, weight, leaves) for part in (loss, q))
        if model_output.exact:
            expected = _gradient(f, -weight * q, leaves)
            _assert_close(dl, expected, f"{name}: expected grad loss = -out_to_loss * grad output")
        assert not (w < 0).any(), f"{name}: expected `newton_weight` not to be negative, but got {w.min().item():.3g}."
        flat = bool((w == 1).all()) and not any(part.any() for part in dq)
        if model_output.exact and type(model_output).newton_weight is not ModelOutput.newton_weight and not flat:
            expected = _gradient(f, -weight * w, leaves)
            _assert_close(dq, expected, f"{name}: expected grad out_to_loss = -newton_weight * grad output")


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
    inputs = tuple(_convert(x, torch.float64) for x in inputs)
    # Two calls see different rows, so that a rule that keeps something from one call to the next is found.
    once, twice = ([inputs], [inputs, tuple(x.roll(1, 0) for x in inputs)])
    for calls, count in ((once, "once"), (twice, "twice")):
        for rows in (b, 1):
            where = f"{name}: expected the rule to give {{}} (called {count}, a batch of {rows}"
            _check_rule(double, [tuple(x[:rows] for x in call) for call in calls], rows, where)
    half = copy.deepcopy(double).bfloat16()
    halves = tuple(_convert(x, torch.bfloat16) for x in inputs)
    if _runs(half, halves):
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
                _probe(layer, [tuple(x[i : i + 1] for x in call) for call in calls], 1).sum(),
                list(params.values()),
                materialize_grads=True,
            )
            for i in range(rows)
        ]
    for name, *expected in zip(params, *loop, strict=True):
        assert name in found, f"{where.format(f'a gradient of `{name}`')}), but it gives none."
        message = where.format(f"autograd's gradient of `{name}`") + ")"
        _assert_close([found[name]], [torch.stack(expected)], message)


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
    hooked_gradients(layer, lambda: _probe(layer, calls, rows), rows, names, add)
    return found


def _probe(layer: nn.Module, calls: list[tuple[Tensor, ...]], rows: int) -> Tensor:
    """One value a sample that weighs every entry of the outputs, and every call, differently."""
    total = torch.zeros(rows)
    for scale, call in enumerate(calls, start=1):
        for output in float_tensors(layer(*call)):
            flat = output.reshape(rows, -1)
            total = total + ((scale * flat).sin() * torch.linspace(-1, 2, flat.shape[1]).to(flat)).sum(1)
    return total


def _runs(layer: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
    """Whether a layer runs on inputs of this precision."""
    try:
        with torch.no_grad():
            layer(*inputs)
    except (RuntimeError, NotImplementedError):
        return False
    return True


def _convert(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.detach().to(dtype) if dtype is not None and tensor.dtype.is_floating_point else tensor.detach()


def _as_leaf(tensor: Tensor) -> Tensor:
    return tensor.clone().requires_grad_() if tensor.dtype.is_floating_point else tensor


def _gradient(values: Tensor, weight: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Gradient of the weighted sum of the samples' values in each leaf."""
    if not values.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    cotangent = weight.detach().to(values)
    return list(torch.autograd.grad(values, leaves, cotangent, retain_graph=True, materialize_grads=True))


def _check_independence(name: str, f: Tensor, leaves: list[Tensor]) -> None:
    first = torch.zeros_like(f)
    first[0] = 1
    for gradient in _gradient(f, first, leaves):
        others = gradient[1:] if gradient.ndim and len(gradient) == len(f) else gradient[:0]
        assert not others.any(), f"{name}: expected each sample's output to depend on its own outputs only."


def _assert_close(found: list[Tensor], expected: list[Tensor], message: str) -> None:
    for a, b in zip(found, expected, strict=True):
        error = (a - b).abs().max().item()
        scale = max(a.abs().max().item(), b.abs().max().item())
        tolerance = {torch.float64: 1e-8, torch.float32: 1e-3}.get(a.dtype, 0.1)
        assert error <= tolerance * scale + 1e-12, (
            f"{message}, but they differ by up to {error:.3g} (largest value {scale:.3g})."
        )
