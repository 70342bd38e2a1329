"""Which path gives each parameter's per-sample gradients, decided by comparing with autograd on a few samples."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_attr.batch import select_rows
from lightning_attr.errors import BatchDependenceError, NonFiniteGradientError
from lightning_attr.gradients.execution import plain_execution
from lightning_attr.gradients.factored import ParameterGradient, materialise
from lightning_attr.gradients.functional import FunctionalOutput, loop_gradients, vmap_gradients
from lightning_attr.gradients.hooks import hooked_gradients, hooked_layers

__all__ = ["GradientPlan", "check_batch_independence", "plan_gradients"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GradientPlan:
    """The path of each trainable parameter.

    Args:
        hooked: names covered by a layer's rule.
        fallback: names without a rule, or whose rule does not see every use of them.
        vectorised: whether the fallback is ``vmap(grad)``; a loop over samples otherwise.

    Example:
        >>> GradientPlan(hooked=("weight",), fallback=(), vectorised=True).hooked
        ('weight',)
    """

    hooked: tuple[str, ...]
    fallback: tuple[str, ...]
    vectorised: bool


def plan_gradients(
    module: nn.Module,
    forward: Callable[[Any], Tensor],
    functional_output: FunctionalOutput,
    batch: Any,
    batch_size: int,
) -> GradientPlan:
    """Choose the path of each trainable parameter; every choice is checked against autograd, sample by sample.

    Args:
        module: the module, in eval mode.
        forward: runs it on a batch and returns the model output of each sample, ``(b,)``.
        functional_output: the same at given parameters.
        batch: a few samples; two to four are enough to tell.
        batch_size: number of samples in it.

    Returns:
        The plan. A log line names the parameters that go through the fallback, and their share.

    Raises:
        BatchDependenceError: if no path agrees with autograd, because samples of a batch affect each other.
        NonFiniteGradientError: if a gradient is NaN or Inf.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch.func import functional_call
        >>> layer, x = nn.Linear(2, 1), torch.randn(3, 2)
        >>> plan_gradients(layer, lambda x: layer(x)[:, 0], lambda p, x: functional_call(layer, dict(p), x)[:, 0], x, 3)
        GradientPlan(hooked=('weight', 'bias'), fallback=(), vectorised=True)
    """
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    reference = _autograd_rows(forward, trainable, batch, batch_size)
    if not all(rows.isfinite().all() for rows in reference.values()):
        _raise_not_finite(reference, loop_gradients(functional_output, trainable, batch, batch_size))
    hooked = _hooked_rows(module, forward, trainable, batch, batch_size)
    covered = {name for name, rows in hooked.items() if _agree(rows, reference[name])}
    fallback = {name: p for name, p in trainable.items() if name not in covered}
    vectorised = True
    if fallback:
        vectorised = _vmap_agrees(functional_output, fallback, batch, batch_size, reference)
        if not vectorised:
            rows = loop_gradients(functional_output, fallback, batch, batch_size)
            wrong = [name for name in fallback if not _agree(rows[name], reference[name])]
            if wrong:
                raise BatchDependenceError(
                    f"The gradient of a sample's model output in {_some(wrong)} changes with the samples beside it in "
                    "the batch. Attribution needs outputs that are computed for each sample on its own: look for "
                    "statistics or comparisons over the batch in `attribution_step` and `model_output`."
                )
        _log_fallback(module, trainable, fallback, vectorised)
    names = tuple(name for name in trainable if name in covered)
    return GradientPlan(names, tuple(fallback), vectorised)


def check_batch_independence(forward: Callable[[Any], Tensor], batch: Any, batch_size: int) -> None:
    """Check that each sample's model output is its own: compare a batch with its two halves.

    Args:
        forward: returns the model output of each sample of a batch, ``(b,)``.
        batch: a few samples.
        batch_size: number of samples in it; with one there is nothing to compare.

    Raises:
        BatchDependenceError: if the halves give other outputs than the whole.
        NonFiniteGradientError: if an output is NaN or Inf.
        ValueError: if the output has not one value a sample.

    Example:
        >>> import torch
        >>> check_batch_independence(lambda x: x.square(), torch.ones(4), 4)
        >>> check_batch_independence(lambda x: x - x.mean(), torch.arange(4.0), 4)
        Traceback (most recent call last):
        ...
        lightning_attr.errors.BatchDependenceError: ...
    """
    half = batch_size // 2
    with torch.no_grad():
        whole = forward(batch)
        if whole.shape != (batch_size,):
            raise ValueError(
                f"Expected `model_output.output` to return one value a sample, of shape ({batch_size},), but got "
                f"{tuple(whole.shape)}."
            )
        if not whole.isfinite().all():
            rows = (~whole.isfinite()).nonzero().flatten().tolist()
            raise NonFiniteGradientError(
                f"The model output of the first samples is NaN or Inf (positions {rows} of the first batch). Check the "
                "inputs and the weights."
            )
        if half == 0:
            return
        parts = (list(range(half)), list(range(half, batch_size)))
        halves = [forward(select_rows(batch, batch_size, part)) for part in parts]
    for part, outputs in zip(parts, halves, strict=True):
        if outputs.shape != (len(part),):
            raise ValueError(
                f"Expected a part of {len(part)} of the {batch_size} samples to give outputs of shape ({len(part)},), "
                f"but got {tuple(outputs.shape)}. A batch is split along the first dimension of its tensors: let "
                "the collate function give tensors of shape (b, ...), padded where samples differ in size, rather than "
                "lists of one tensor a sample."
            )
    split = torch.cat(halves)
    tolerance = _tolerance(whole.dtype) * (1 + whole.abs().max())
    worst = (whole - split).abs().max()
    if worst > tolerance:
        raise BatchDependenceError(
            f"The model output of a sample depends on the samples beside it: the same {batch_size} samples in one "
            f"batch and in two differ by up to {worst:.3g}. Attribution needs outputs that are computed for each "
            "sample on its own: look for random numbers (dropout outside eval mode), contrastive losses, or means over "
            "the batch in `attribution_step` and `model_output`."
        )


def _autograd_rows(
    forward: Callable[[Any], Tensor], trainable: Mapping[str, Tensor], batch: Any, batch_size: int
) -> dict[str, Tensor]:
    with torch.enable_grad(), plain_execution():
        output = forward(batch)
        rows = [
            torch.autograd.grad(output[i], list(trainable.values()), retain_graph=True, materialize_grads=True)
            for i in range(batch_size)
        ]
    return {name: torch.stack(gradients) for name, gradients in zip(trainable, zip(*rows, strict=True), strict=True)}


def _raise_not_finite(reference: Mapping[str, Tensor], loop: Mapping[str, Tensor]) -> None:
    """Name parameters and samples; only the loop tells which, as zero times infinity is NaN for the neighbours, too."""
    names = [name for name, rows in reference.items() if not rows.isfinite().all()]
    finite = torch.stack([rows.isfinite().reshape(len(rows), -1).all(1) for rows in loop.values()]).all(0)
    raise NonFiniteGradientError(
        f"The gradient of the first samples' model output in {_some(names)} is NaN or Inf (positions "
        f"{(~finite).nonzero().flatten().tolist()} of the first batch). Look for an infinite slope in "
        "`attribution_step` and `model_output`, such as that of a root or a norm at zero."
    )


def _hooked_rows(
    module: nn.Module,
    forward: Callable[[Any], Tensor],
    trainable: Mapping[str, Tensor],
    batch: Any,
    batch_size: int,
) -> dict[str, Tensor]:
    rows: dict[str, Tensor] = {}

    def add(name: str, gradient: ParameterGradient) -> None:
        tensor = materialise(gradient, tuple(trainable[name].shape))
        rows[name] = rows[name] + tensor if name in rows else tensor

    names = {name for own in hooked_layers(module).values() for name in own.values()}
    skipped: set[str] = set()
    hooked_gradients(module, lambda: forward(batch), batch_size, names, add, skipped)
    return {name: row for name, row in rows.items() if name not in skipped}


def _vmap_agrees(
    functional_output: FunctionalOutput,
    params: Mapping[str, Tensor],
    batch: Any,
    batch_size: int,
    reference: Mapping[str, Tensor],
) -> bool:
    try:
        rows = vmap_gradients(functional_output, params, batch, batch_size)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        # That is what vmap says of models that it cannot trace.
        log.info("vmap(grad) does not work for this module, falling back to a loop over samples: %s", error)
        return False
    return all(_agree(rows[name], reference[name]) for name in params)


def _agree(rows: Tensor, reference: Tensor) -> bool:
    difference = (rows - reference.to(rows.dtype)).norm()
    return bool(difference <= _tolerance(reference.dtype) * reference.norm() + 1e-12)


def _tolerance(dtype: torch.dtype) -> float:
    return max(1e-3 if dtype == torch.float32 else 1e-8, 8 * torch.finfo(dtype).eps)


def _log_fallback(
    module: nn.Module, trainable: Mapping[str, Tensor], fallback: Mapping[str, Tensor], vectorised: bool
) -> None:
    share = sum(p.numel() for p in fallback.values()) / sum(p.numel() for p in trainable.values())
    log.warning(
        "%s: %s (%.1f%% of the trainable parameters) have no gradient rule and go through %s, which is slower.",
        type(module).__name__,
        _some(list(fallback)),
        100 * share,
        "vmap(grad)" if vectorised else "a loop over samples",
    )


def _some(names: list[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more parameters"
