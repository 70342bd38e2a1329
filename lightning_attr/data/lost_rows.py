"""Why a batch holds other samples than were asked for: found by reading them again and leaving them out in turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from lightning_attr.data.loader import DataSource
from lightning_attr.errors import BatchRowsError
from lightning_attr.user_code.reading_state import unchanged_data

_TRIED = 64
"""Rows that are left out in turn to find the one that has no part in its batch."""


def refuse_lost_rows(source: DataSource, rows: Sequence[int], size: int, hooks: Sequence[str]) -> NoReturn:
    """Say that a batch has not one row per sample, and which samples it lacks, where that can be found.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> readable = lambda items: torch.tensor([item for item in items if item is not None])
        >>> source = DataSource.of(DataLoader([3.0, None, 5.0], collate_fn=readable), "training")
        >>> refuse_lost_rows(source, [0, 1, 2], 2, [])
        Traceback (most recent call last):
        ...
        lightning_attr.errors.BatchRowsError: The `collate_fn` ... returned 2 samples for the 3 rows [0, 1, 2]: ...
    """
    who = f"The {source.description}" + (f", or {', '.join(hooks)}," if hooks else "")
    shown = f"[{', '.join(map(str, rows[:8]))}{', ...' if len(rows) > 8 else ''}]"
    missing = _unreadable(source, rows)
    if missing:
        named = f": {_named(missing)} is None" if len(missing) == 1 else f": {_named(missing)} are None"
    else:
        missing = dropped_rows(source, rows)
        named = f": {_named(missing)} left out" if missing else ""
    size = size or (len(rows) - len(missing) if missing else 0)
    found = f"{size} samples" if size else "no tensors with one row a sample"
    raise BatchRowsError(
        f"{who} returned {found} for the {len(rows)} rows {shown}{named}. Row i of the scores is dataset[i], and so "
        "each row asked for has to be in its batch, in its place. Leave samples that cannot be used out of the data "
        "set, before training: `torch.utils.data.Subset(dataset, usable)` with the list of their indices."
    )


def dropped_rows(source: DataSource, rows: Sequence[int]) -> list[int]:
    """Find the rows that have no part in their batch: without them it is the same.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> positive = lambda items: torch.tensor([item for item in items if item > 0])
        >>> source = DataSource.of(DataLoader([3.0, -4.0, 5.0], collate_fn=positive), "training")
        >>> dropped_rows(source, [0, 1, 2])
        [1]
    """
    if len(rows) < 2 or source.form.apart:
        return []
    whole = source.collated(rows)
    return [
        row
        for number, row in enumerate(rows[:_TRIED])
        if same_content(whole, source.collated([*rows[:number], *rows[number + 1 :]]))
    ]


def same_content(first: Any, second: Any, depth: int = 8) -> bool:
    """Compare batches bit by bit.

    Returns whether all of it is known to be equal; objects that cannot be compared are not.

    Example:
        >>> same_content({"x": torch.ones(2)}, {"x": torch.ones(2)}), same_content([object()], [object()])
        (True, False)
    """
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        return _same_tensors(first, second)
    if depth == 0 or type(first) is not type(second):
        return False
    if isinstance(first, Mapping):
        return first.keys() == second.keys() and all(same_content(first[key], second[key], depth - 1) for key in first)
    if isinstance(first, (list, tuple)):
        pairs = zip(first, second, strict=False)
        return len(first) == len(second) and all(same_content(one, other, depth - 1) for one, other in pairs)
    if first is None or isinstance(first, (str, bytes, int, float)):
        return bool(first == second or (first != first and second != second))
    if isinstance(first, (np.ndarray, np.generic)) and first.dtype.kind in "biufc":
        return bool(np.array_equal(first, second, equal_nan=first.dtype.kind in "fc"))
    stored = getattr(first, "__dict__", None)
    return bool(stored) and same_content(stored, vars(second), depth - 1)


def _same_tensors(first: Any, second: Any) -> bool:
    if not (isinstance(first, Tensor) and isinstance(second, Tensor)):
        return False
    if first.shape != second.shape or first.dtype != second.dtype or first.layout != second.layout:
        return False
    if first.layout is not torch.strided:
        first, second = first.to_dense(), second.to_dense()
    return bool(((first == second) | ((first != first) & (second != second))).all())


def _unreadable(source: DataSource, rows: Sequence[int]) -> list[int]:
    read = source.reader()
    with unchanged_data(source.dataset):
        return [row for row in rows if read(row) is None]


def _named(rows: Sequence[int]) -> str:
    shown = ", ".join(f"dataset[{row}]" for row in rows[:4])
    return shown if len(rows) <= 4 else f"{shown} and {len(rows) - 4} more"
