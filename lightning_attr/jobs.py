"""The batches that one process featurizes, of several snapshots and data sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lightning_attr.loader import OrderedLoader

__all__ = ["Jobs"]


class Jobs:
    """All batches of a process, one after the other, each with its snapshot and whether its rows are training rows.

    Args:
        jobs: key of a snapshot, whether of training rows, and their batches.
        before: called with the snapshot before each loader starts: no thread may run while it forks its workers, and
            how samples are read may have to be found.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> from lightning_attr.loader import DataSource
        >>> source = DataSource.of(DataLoader([3.0, 4.0]), "training")
        >>> [(key, rows) for key, train, rows, batch in Jobs([("final", True, OrderedLoader(source, [[1]]))], print)]
        final
        [('final', [1])]
    """

    def __init__(self, jobs: Sequence[tuple[str, bool, OrderedLoader]], before: Callable[[str], object]) -> None:
        self.jobs = jobs
        self.before = before

    def __len__(self) -> int:
        return sum(len(loader) for _, _, loader in self.jobs)

    def __iter__(self) -> Iterator[tuple[str, bool, list[int], Any]]:
        for key, train, loader in self.jobs:
            self.before(key)
            for rows, batch in loader:
                yield key, train, rows, batch
