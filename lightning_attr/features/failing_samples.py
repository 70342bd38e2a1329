"""Where running a batch fails because of one of its samples, a label out of range for instance, that is named."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from lightning_attr.data.sample_errors import failure_of
from lightning_attr.errors import AttributionError, SampleRunError

_TRIED = 64


@contextmanager
def named_failures(module: Any, rows: Sequence[int], alone: Callable[[int], object]) -> Iterator[None]:
    """Say for which samples of a batch the module's code fails, if others go through.

    Example:
        >>> module, labels = torch.nn.Linear(1, 3), torch.tensor([0, 5, 2])
        >>> with named_failures(module, [7, 8, 9], lambda i: torch.eye(3)[labels[i]]):
        ...     torch.eye(3)[labels]
        Traceback (most recent call last):
        ...
        lightning_attr.errors.SampleRunError: Linear fails for dataset[8] and not for others of its batch: IndexError...
    """
    try:
        yield
    except Exception as error:
        known = isinstance(error, (AttributionError, torch.OutOfMemoryError, MemoryError))
        failed = {} if known or len(rows) < 2 else _failures(rows[:_TRIED], alone)
        if not failed or len(failed) == len(rows[:_TRIED]):
            raise
        row, first = next(iter(failed.items()))
        named = ", ".join(f"dataset[{number}]" for number in list(failed)[:8])
        more = f" and {len(failed) - 8} more" if len(failed) > 8 else ""
        raise SampleRunError(
            f"{type(module).__name__} fails for {named}{more} and not for others of its batch: "
            f"{type(first).__name__}: {str(first).rstrip('. ')}. Look at dataset[{row}]: at its label, which may be no "
            "class, and at what else its inputs have that others have not."
        ) from first


def _failures(rows: Sequence[int], alone: Callable[[int], object]) -> dict[int, Exception]:
    """Run samples alone: row -> what its run raises."""
    found = ((row, failure_of(alone, position)) for position, row in enumerate(rows))
    return {row: error for row, error in found if error is not None}
