"""Whether the functions of a model output belong together: checked by autograd, on outputs of a few samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_attr.arguments.checks import check_instance
from lightning_attr.batches.nested import float_tensors, map_tensors
from lightning_attr.batches.tolerance import assert_close, in_dtype
from lightning_attr.outputs.base import ModelOutput


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
        TypeError: if ``model_output`` is no ModelOutput.
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
    check_instance("check_model_output", "model_output", model_output, ModelOutput, "a ModelOutput")
    if dtype is not None:
        check_instance("check_model_output", "dtype", dtype, torch.dtype, "a torch.dtype, or None")
    name = type(model_output).__name__
    outputs = map_tensors(map_tensors(outputs, lambda t: in_dtype(t, dtype)), _as_leaf)
    targets = map_tensors(targets, lambda t: in_dtype(t, dtype))
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
            assert_close(dl, expected, f"{name}: expected grad loss = -out_to_loss * grad output")
        assert not (w < 0).any(), f"{name}: expected `newton_weight` not to be negative, but got {w.min().item():.3g}."
        flat = bool((w == 1).all()) and not any(part.any() for part in dq)
        if model_output.exact and type(model_output).newton_weight is not ModelOutput.newton_weight and not flat:
            expected = _gradient(f, -weight * w, leaves)
            assert_close(dq, expected, f"{name}: expected grad out_to_loss = -newton_weight * grad output")


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
