"""A value repeated for every sample: `expand`, `repeat` and their kin."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_attr.gradients.direct_use.use import Use, handles

_REPETITIONS = {"expand", "broadcast_to", "repeat", "tile", "repeat_interleave"}


def repeats_rows(func: Any, args: Any, kwargs: Any, single: bool) -> bool:
    """Tell whether a call without values of the batch repeats a value along a new, or single, first dimension."""
    if func.__name__ not in _REPETITIONS or not isinstance(args[0], Tensor):
        return False
    value = args[0].detach()
    output = func(value, *args[1:], **kwargs)
    before = value.shape[0] if 0 < value.ndim == output.ndim else 1
    return bool(output.ndim > 0 and (output.shape[0] != before or (single and before == 1)))


@handles(*_REPETITIONS)
def repeat(use: Use) -> Any:
    """Repetition along a new, or single, first dimension: that is the batch, or nothing for us."""
    value = use.args[0]
    if not use.is_derived(value):
        return NotImplemented
    output = use.run_detached()
    if output.ndim == 0 or output.shape[0] != use.mode.batch_size:
        return NotImplemented
    copy = use.mode.copy(value, output.ndim)
    if copy is None:
        return NotImplemented
    if use.func.__name__ in {"repeat", "tile"}:
        return copy.repeat(1, *(n // m for n, m in zip(output.shape[1:], copy.shape[1:], strict=True)))
    return copy.expand(output.shape)


@handles("expand_as")
def expand_as(use: Use) -> Any:
    """Repetition to the shape of a tensor of the batch."""
    return repeat(use) if all(use.is_batch(row) for row in use.rows) else NotImplemented
