"""A sampler in front of another, which gives the places of some rows to others."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler

from lightning_attr.randomness.streams import hashed_seed


class CuratedSampler(Sampler[Any]):
    """Draws what another sampler draws, and in place of a row that is left out one of the others drawn in that epoch.

    An epoch keeps its length, in each process: schedules, limits and other processes notice nothing. While nothing is
    left out, it is the other sampler.

    Args:
        sampler: the other; it has a length.
        process: number of this process, for its random draws.

    Example:
        >>> sampler = CuratedSampler(range(6))
        >>> sampler.left_out = frozenset({1, 4})
        >>> drawn = list(sampler)
        >>> len(drawn), {1, 4} & {*drawn}, drawn[0], drawn[2:4]
        (6, set(), 0, [2, 3])
    """

    def __init__(self, sampler: Any, process: int = 0) -> None:
        self.sampler, self.process = sampler, process
        self.left_out: frozenset[int] = frozenset()
        self.weight = 0.0
        self.epoch = 0
        self.stranger: Any = None

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        """Tell the epoch, as Lightning does; the other sampler hears of it, too."""
        self.epoch = epoch
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        if not self.left_out:
            yield from self.sampler
            return
        drawn = list(self.sampler)
        generator = torch.Generator().manual_seed(hashed_seed("curation", self.epoch, self.process))
        spared = torch.rand(len(drawn), generator=generator) < self.weight
        leaves = [self._row(index) in self.left_out for index in drawn]
        others = [index for index, out in zip(drawn, leaves, strict=True) if not out]
        if not others:
            yield from drawn
            return
        instead = torch.randint(len(others), (len(drawn),), generator=generator)
        for index, out, spare, other in zip(drawn, leaves, spared.tolist(), instead.tolist(), strict=True):
            yield others[other] if out and not spare else index

    def _row(self, index: Any) -> int | None:
        """Its number, also of numpy and torch; what is none is remembered, and drawn as it is."""
        try:
            return operator.index(index)
        except TypeError:
            self.stranger = index if self.stranger is None else self.stranger
            return None


def curable(loader: Any) -> str | None:
    """Say why a training loader cannot draw through a :class:`CuratedSampler`.

    Returns what is in the way; None if nothing is.
    """
    if not isinstance(loader, DataLoader):
        return f"the training loader is a {type(loader).__name__}, and no DataLoader"
    if isinstance(loader.dataset, IterableDataset):
        return f"{type(loader.dataset).__name__} is a stream, whose samples no sampler chooses"
    group: Any = loader.batch_sampler
    if group is None:
        return "the DataLoader has batch_size=None: its data set makes the batches"
    if not isinstance(group, BatchSampler) or type(group).__iter__ is not BatchSampler.__iter__:
        return f"its batch sampler {type(group).__name__} makes batches in a way of its own"
    if not isinstance(group.sampler, Iterable) or not hasattr(group.sampler, "__len__"):
        return f"its sampler {type(group.sampler).__name__} has no length"
    return None
