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

    Args:
        loader: the training loader, as the trainer uses it.
        batches: how many of its batches an epoch takes at most.
        processes: among which the batches are shared out.

    Returns:
        ``(n,)``, bool: False for rows that are never drawn. None where that is not known: a sampler that nobody knows
        and that draws other rows each time, or what is no ``DataLoader``.

    Example:
        >>> data = [0.0, 1.0, 2.0, 3.0, 4.0]
        >>> drawable_rows(DataLoader(data, sampler=SubsetRandomSampler([0, 3])))
        tensor([ True, False, False,  True, False])
        >>> drawable_rows(DataLoader(data, batch_size=2), batches=1)
        tensor([ True,  True, False, False, False])
        >>> drawable_rows(DataLoader(data, batch_size=2, shuffle=True), batches=1)
        tensor([True, True, True, True, True])
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

    Args:
        mask: ``(n,)``, bool.

    Returns:
        Hexadecimal; bit ``i % 8`` of byte ``i // 8`` is row ``i``.

    Example:
        >>> to_bitmap(torch.tensor([True, False, True]))
        '05'
    """
    return np.packbits(mask.numpy(), bitorder="little").tobytes().hex()


def from_bitmap(text: str, n: int) -> Tensor:
    """Read what :func:`to_bitmap` wrote.

    Args:
        text: hexadecimal.
        n: rows.

    Returns:
        ``(n,)``, bool.

    Example:
        >>> from_bitmap("05", 3)
        tensor([ True, False,  True])
    """
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8), count=n, bitorder="little")
    return torch.from_numpy(bits.astype(bool))


def masked(
    blocks: Iterator[tuple[range, Mapping[str, Tensor]]], mask: Tensor | None
) -> Iterator[tuple[range, Mapping[str, Tensor]]]:
    """Take rows that training never draws out of what methods learn from: their features count as zero.

    Args:
        blocks: rows, and their columns.
        mask: ``(n,)``, bool: rows that training draws; None for all.

    Yields:
        The blocks.

    Example:
        >>> columns = {"features": torch.ones(2, 1), "loss": torch.ones(2)}
        >>> next(masked(iter([(range(2), columns)]), torch.tensor([True, False])))[1]
        {'features': tensor([[1.],
                [0.]]), 'loss': tensor([1., 1.])}
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
