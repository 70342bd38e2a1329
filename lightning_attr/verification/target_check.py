"""A few targets through the user's function before any is attributed: one value each, of its own, with a gradient."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from lightning_attr.batches.nested import select_rows
from lightning_attr.batches.samples_apart import SamplesApart
from lightning_attr.errors import BatchDependenceError, named_samples
from lightning_attr.gradients.plain_execution import plain_execution
from lightning_attr.objectives.objective import Objective, completed
from lightning_attr.randomness.draws import Draw, Samples

log = logging.getLogger(__name__)

_SAMPLES = 4


def check_target_function(
    measured: Objective,
    samples: Samples,
    snapshot: str,
    precision: Callable[[], AbstractContextManager[Any]],
    seeded: bool = False,
) -> None:
    """Try what is measured of targets on some of them.

    Example:
        >>> from lightning_attr.objectives.target_function import MeasuredOutput
        >>> layer, data = torch.nn.Linear(2, 1), torch.eye(2)
        >>> samples = Samples(2, lambda rows: iter([(rows, data[list(rows)])]))
        >>> def lost(module, batch):
        ...     return module(batch).detach().requires_grad_().sum(1)
        >>> check_target_function(MeasuredOutput(layer, lost), samples, "final", torch.enable_grad)
        Traceback (most recent call last):
        ...
        ValueError: Expected argument `target_function` to be differentiable in what Linear trains, but none of its ...
    """
    module, count = measured.module, min(_SAMPLES, len(samples))
    rows = sorted({number * (len(samples) - 1) // max(1, count - 1) for number in range(count)})
    parameters = [p for p in module.parameters() if p.requires_grad]
    found = False
    for numbers, batch in samples.batches(rows):
        given = completed(module, batch, Draw(numbers, snapshot, device=parameters[0].device))
        with torch.enable_grad(), plain_execution(), precision(), named_samples(numbers):
            values = measured.sample_outputs(given, len(numbers))
            gradients = torch.autograd.grad(values.sum(), parameters, allow_unused=True)
            if not (seeded or isinstance(given, SamplesApart)):
                _check_alone(measured, given, values.detach())
        if all(gradient is None for gradient in gradients):
            raise ValueError(
                f"Expected argument `target_function` to be differentiable in what {type(module).__name__} trains, but "
                f"none of its {len(parameters)} trainable parameters has a part in the result: all scores would be "
                "zero. Use the module that the function is given, no copy of it, and look for `detach()`, `.data` and "
                "`torch.tensor(...)` on the way from its outputs."
            )
        found = found or any(gradient is not None and bool((gradient != 0).any()) for gradient in gradients)
    if not found:
        log.warning(
            "`target_function` has a gradient of exactly zero in all that %s trains, for all of the %d targets that "
            "were tried (%s): so are their scores. Look for `round`, `sign`, `clamp` and comparisons.",
            type(module).__name__,
            len(rows),
            ", ".join(f"dataset[{row}]" for row in rows),
        )


def _check_alone(measured: Objective, batch: Any, values: Tensor) -> None:
    """Compare the values of targets in a batch with those of each on its own."""
    count = len(values)
    if count == 1:
        return
    alone = [measured.sample_outputs(select_rows(batch, count, [i]), 1).detach() for i in range(count)]
    difference = (torch.cat(alone) - values).abs().max()
    low = values.dtype.itemsize < 4 or torch.is_autocast_enabled(values.device.type)
    if difference > (0.05 if low else 1e-3) * (1e-2 + values.abs().max()):
        raise BatchDependenceError(
            f"`target_function` gives a target another value beside others: {count} targets in one batch and one by "
            f"one differ by up to {difference.item():.3g}. Measure each target on its own: look for means, maxima and "
            "softmax over dimension 0, which is the batch."
        )
