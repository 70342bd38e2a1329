"""Rows that training draws: what the index sampler of its loader gives, in the order of its batches.

A loader's iterator takes its indices from the (batch) sampler, ahead of time where workers prefetch, and gives batches
in that order. While the iterator is made, a watched sampler stands in the place of the user's; the loader itself keeps
its own, and so does whoever looks at it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset

_HOOK = "_get_iterator"
"""What ``DataLoader.__iter__`` calls for a new iterator."""

States = Mapping[str, bytes]


class Draw(NamedTuple):
    """What was drawn for a batch.

    Args:
        rows: indices; None where what was drawn are none.
        reading: states of the random streams before the samples were read; None with workers.
    """

    rows: list[int] | None
    reading: States | None


class DrawnRows:
    """Listens to what the iterators of loaders draw.

    Args:
        states: gives the states of the random streams.

    Example:
        >>> loader = DataLoader([3.0, 4.0, 5.0], batch_size=2)
        >>> drawn = DrawnRows(dict)
        >>> drawn.watch(loader)
        >>> batches = list(loader)
        >>> [draw.rows for draw in drawn.latest()], list(vars(loader)).count("_get_iterator")
        ([[0, 1], [2]], 0)
    """

    def __init__(self, states: Callable[[], States]) -> None:
        self._states = states
        self._latest: deque[Draw] | None = None

    def watch(self, loader: DataLoader[Any]) -> None:
        """Listen to the next iterator that the loader makes."""
        vars(loader)[_HOOK] = partial(self._iterator, loader)

    @staticmethod
    def release(loader: Any) -> None:
        """Leave a loader as it was, if it has made no iterator."""
        vars(loader).pop(_HOOK, None)

    def latest(self) -> deque[Draw] | None:
        """What the latest pass through the data has drawn, and goes on to draw; None if none was heard."""
        found, self._latest = self._latest, None
        return found

    def _iterator(self, loader: DataLoader[Any]) -> Iterator[Any]:
        """Make an iterator that draws from a watched sampler."""
        self.release(loader)
        name = "sampler" if loader.batch_sampler is None else "batch_sampler"
        sampler, own = vars(loader)[name], vars(loader)
        # A DataLoader that was made refuses to have these set.
        own[name] = _WatchedSampler(sampler, self, reads=loader.num_workers == 0)
        try:
            made: Iterator[Any] = loader._get_iterator()
        finally:
            own[name] = sampler
        return made

    def begin(self) -> deque[Draw]:
        """Begin a pass."""
        self._latest = deque()
        return self._latest

    def states(self) -> States:
        """States of the random streams now."""
        return self._states()


class _WatchedSampler:
    """A sampler or batch sampler, and in all but iteration that of the user."""

    def __init__(self, sampler: Any, drawn: DrawnRows, reads: bool) -> None:
        self._sampler = sampler
        self._drawn = drawn
        self._reads = reads

    def __iter__(self) -> Iterator[Any]:
        return _WatchedDraws(iter(self._sampler), self._drawn, self._reads)

    def __len__(self) -> int:
        return len(self._sampler)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)


class _WatchedDraws:
    """An iterator over a sampler. Its pass begins with its first draw: of two that are made, one may stay unused."""

    def __init__(self, draws: Iterator[Any], drawn: DrawnRows, reads: bool) -> None:
        self._draws = draws
        self._drawn = drawn
        self._reads = reads
        self._pass: deque[Draw] | None = None

    def __iter__(self) -> _WatchedDraws:
        return self

    def __next__(self) -> Any:
        item = next(self._draws)
        if self._pass is None:
            self._pass = self._drawn.begin()
        self._pass.append(Draw(_rows(item), self._drawn.states() if self._reads else None))
        return item


def _rows(item: Any) -> list[int] | None:
    """Indices of a batch; None where they are something else. A sampler may go on to use its own list."""
    try:
        values = item.tolist() if isinstance(item, torch.Tensor) or hasattr(item, "tolist") else item
        values = list(values) if isinstance(values, (list, tuple)) else [values]
        return [value.__index__() for value in values]
    except Exception:  # whatever a stranger's items raise: they are no indices
        return None


def unknown_order(loader: Any) -> str | None:
    """Say why nobody can tell which rows the batches of a loader hold.

    Returns a clause for the user; None where the sampler tells.

    Example:
        >>> unknown_order(DataLoader([1.0])) is None
        True
    """
    kind = type(loader).__name__
    if not isinstance(loader, DataLoader):
        return f"{kind} is no torch DataLoader, so that nothing tells which samples its batches hold"
    if isinstance(loader.dataset, IterableDataset):
        return f"{type(loader.dataset).__name__} is an IterableDataset, whose samples have no index"
    if type(loader).__iter__ is not DataLoader.__iter__:
        return f"{kind} makes its batches in an `__iter__` of its own"
    if not getattr(loader, "in_order", True) and loader.num_workers > 0:
        return "the loader gives batches as its workers finish them (in_order=False)"
    return None
