"""Which samples stand for a data set when a module is checked: spread over all of it, and unlike each other."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from lightning_attr.batches.nested import map_tensors
from lightning_attr.data.labels_at_hand import without_label
from lightning_attr.data.loader import DataSource
from lightning_attr.user_code.reading_state import unchanged_data

_LOOKED_AT, _SECONDS = 256, 0.5


def probe_rows(source: DataSource, count: int = 8) -> list[int]:
    """Choose samples for the check of a module, the most unlike first.

    Some hundred samples across the data set are read, as far as half a second allows. Chosen are the ends of the data
    set, the shortest and the longest sample, those with values or structures that others have not (missing labels, a
    None in place of what cannot be read), one of each class, and some more.

    Returns at most ``count`` rows, not in order.
    """
    spread = list(dict.fromkeys([*without_label(source.dataset), *_spread(len(source))]))
    traits: dict[int, tuple[Any, ...]] = {}
    read, stop = source.reader(), time.monotonic() + _SECONDS
    with unchanged_data(source.dataset):
        for row in spread:
            traits[row] = _traits(read(row))
            if time.monotonic() > stop and len(traits) >= count:
                break
    return _unlike(traits, count)


def _spread(size: int) -> list[int]:
    """The ends, and others in a random order that is always the same."""
    ends = [0, size - 1] if size > 1 else [0]
    others = random.Random(0).sample(range(1, size - 1), min(max(0, size - 2), _LOOKED_AT)) if size > 2 else []
    return [*ends, *others]


def _unlike(traits: Mapping[int, tuple[Any, ...]], count: int) -> list[int]:
    """Take a row of each kind in turn, rare kinds first, then rows in the order they were read."""
    rows = list(traits)
    by_size = sorted(rows, key=lambda row: traits[row][0])
    # Unequal sizes first, for the closest comparisons are made on the first few.
    chosen = [by_size[0], by_size[-1]] if traits[by_size[0]][0] != traits[by_size[-1]][0] else []
    for trait in (1, 2):  # structure and missing values, then classes
        kinds: dict[Any, list[int]] = {}
        for row in rows:
            kinds.setdefault(traits[row][trait], []).append(row)
        if len(kinds) > 1:
            chosen += [min(kind) for kind in sorted(kinds.values(), key=len)]
    chosen += rows
    return list(dict.fromkeys(chosen))[:count]


def _traits(sample: Any) -> tuple[int, str, str]:
    """Size, structure with missing values, and class of a sample."""
    arrays: list[Any] = []
    sizes: list[int] = []
    words: list[str] = []

    def look(value: Any) -> None:
        if isinstance(value, (torch.Tensor, np.ndarray)):
            arrays.append(value)
            sizes.append(int(value.numel()) if isinstance(value, torch.Tensor) else value.size)
            words.append(f"{value.ndim}{_marks(value)}")
        elif isinstance(value, Mapping):
            words.append("{")
            for key in value:
                words.append(str(key))
                look(value[key])
        elif isinstance(value, (list, tuple)):
            words.append(type(value).__name__)
            sizes.append(len(value))
            for item in value[:64]:
                look(item)
        elif isinstance(value, (str, bytes)):
            sizes.append(len(value))
            words.append("text")
        else:
            words.append("nan" if isinstance(value, float) and value != value else type(value).__name__)
            stored = getattr(value, "__dict__", None)
            if stored:  # a graph, for instance, which counts its own tensors
                map_tensors(list(stored.values()), lambda t: sizes.append(t.numel()) or t)  # type: ignore[func-returns-value]

    look(sample)
    # Lists of numbers are sequences of many lengths, which are sizes and no structures.
    structure = " ".join(dict.fromkeys(words)) if len(words) > 16 else " ".join(words)
    return sum(sizes), structure, _label(sample)


def _marks(values: Any) -> str:
    """What is special about the values of an array: missing ones, negative labels that count for nothing."""
    array = values.detach().cpu().numpy() if _readable(values) else values
    if not isinstance(array, np.ndarray) or array.size == 0:
        return ""
    if np.issubdtype(array.dtype, np.inexact):
        return "" if np.isfinite(array).all() else "nan"
    if np.issubdtype(array.dtype, np.signedinteger):
        return "none" if (array < 0).all() else "some" if (array < 0).any() else ""
    return ""


def _readable(values: Any) -> bool:
    known = isinstance(values, torch.Tensor) and values.layout is torch.strided
    return known and values.dtype is not torch.bfloat16 and not values.is_quantized


def _label(sample: Any) -> str:
    """The class of a sample, where it has one in a usual place."""
    label: Any = None
    if isinstance(sample, Mapping):
        label = next((sample[key] for key in ("label", "labels", "y", "target", "targets") if key in sample), None)
    elif isinstance(sample, (list, tuple)) and len(sample) > 1:
        label = sample[-1]
    if isinstance(label, (torch.Tensor, np.ndarray)):
        one = (label.numel() if isinstance(label, torch.Tensor) else label.size) == 1
        label = label.item() if one else None
    return str(label) if isinstance(label, (bool, int, np.integer, str)) and len(str(label)) < 64 else ""
