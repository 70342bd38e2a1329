"""Which rows training can draw at all, as far as its loader tells: samplers, limits and dropped ends leave rows out."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_attr.user_code.reading_state import unchanged_data

_PASSES = 4
"""Epochs of a sampler that nobody knows; rows that are in none of them, while all agree, count as left out."""
_MOST_ROWS = 10_000_000
_LEARNED_FROM = frozenset({"features", "second_features", "out_to_loss", "newton_weight"})


def drawable_rows(loader: Any, batches: float = math.inf, processes: int = 1) -> Tensor | None:
    """Find the rows that a loader can draw in training.

    Returns ``(n,)``, bool: False for rows that are never drawn. None where that is not known: a sampler that nobody
    knows and that draws other rows each time, or what is no ``DataLoader``.
    """
    if not isinstance(loader, DataLoader) or not hasattr(loader.dataset, "__len__"):
        return None
    n, group, size = len(loader.dataset), loader.batch_sampler, loader.batch_size or 1
    sampler: Any = loader.sampler
    if isinstance(group, BatchSampler) and type(group).__iter__ is BatchSampler.__iter__:
        sampler, size = group.sampler, group.batch_size
        size = size if isinstance(size, int) else 1
        if group.drop_last and batches == math.inf and hasattr(sampler, "__len__"):
            batches = len(sampler) // size
    elif group is not None:
        sampler, size = group, 1  # one of the user's own, whose elements are batches
    sampler = _unwrapped(sampler)
    most = batches * size * processes
    found = _known(sampler, n, most)
    if found is None:
        count = batches * processes if sampler is group else most
        found = _replayed(sampler, loader.dataset, n, count)
    if found is None:
        return None
    mask = torch.zeros(n, dtype=torch.bool)
    mask[found] = True
    return mask


def _unwrapped(sampler: Any) -> Any:
    """The user's sampler, out of what a distributed strategy puts around it."""
    inner = getattr(getattr(sampler, "dataset", None), "_sampler", None)
    return sampler if inner is None else inner


def _known(sampler: Any, n: int, most: float) -> Any:
    """Rows that samplers of torch can draw, whatever their random numbers; None for other samplers."""
    kind = type(sampler)
    if kind is SequentialSampler or (isinstance(sampler, DistributedSampler) and not sampler.shuffle):
        return slice(0, int(min(n, most)))
    if kind is RandomSampler or isinstance(sampler, DistributedSampler):
        return slice(0, n)
    if kind is SubsetRandomSampler:
        return torch.as_tensor(list(sampler.indices), dtype=torch.int64)
    if kind is WeightedRandomSampler:
        return (torch.as_tensor(sampler.weights) > 0).nonzero().flatten()
    return None


def _replayed(sampler: Any, dataset: Any, n: int, most: float) -> Tensor | None:
    """Rows of a few epochs of a copy of a sampler, if all have the same."""
    if n > _MOST_ROWS:
        return None
    seen: set[frozenset[int]] = set()
    try:
        own = copy.deepcopy(sampler, {id(dataset): dataset})
        with unchanged_data(sampler):
            for epoch in range(_PASSES):
                if hasattr(own, "set_epoch"):
                    own.set_epoch(epoch)
                seen.add(frozenset(_rows(islice(own, None if most == math.inf else int(most)), 4 * n)))
    except Exception:  # whatever a copy of a stranger's sampler does: it tells nothing then
        return None
    rows = next(iter(seen))
    if len(seen) > 1 or not rows or not all(isinstance(row, int) and 0 <= row < n for row in rows):
        return None
    return torch.tensor(sorted(rows))


def _rows(drawn: Iterable[Any], most: int) -> Iterator[int]:
    rows = chain.from_iterable(item if isinstance(item, (list, tuple)) else [item] for item in drawn)
    for count, row in enumerate(rows):
        if count > most:
            raise ValueError("a sampler without an end")
        yield int(row)


def to_bitmap(mask: Tensor) -> str:
    """Write a mask as text.

    Shapes: mask (n,). Returns hexadecimal; bit ``i % 8`` of byte ``i // 8`` is row ``i``.
    """
    return np.packbits(mask.numpy(), bitorder="little").tobytes().hex()


def from_bitmap(text: str, n: int) -> Tensor:
    """Read what :func:`to_bitmap` wrote.

    Returns ``(n,)``, bool.
    """
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8), count=n, bitorder="little")
    return torch.from_numpy(bits.astype(bool))


def masked(
    blocks: Iterator[tuple[range, Mapping[str, Tensor]]], mask: Tensor | None
) -> Iterator[tuple[range, Mapping[str, Tensor]]]:
    """Take rows that training never draws out of what methods learn from: their features count as zero.

    Shapes: mask (n,).
    """
    for rows, columns in blocks:
        if mask is None or mask[rows.start : rows.stop].all():
            yield rows, columns
            continue
        left_out = ~mask[rows.start : rows.stop]
        drawn = {
            name: values.masked_fill(left_out.view(-1, *[1] * (values.ndim - 1)), 0)
            for name, values in columns.items()
            if name in _LEARNED_FROM
        }
        yield rows, {**columns, **drawn}
