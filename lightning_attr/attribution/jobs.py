"""The batches that one process featurizes, of several snapshots and data sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_attr.data.loader import OrderedLoader
from lightning_attr.store.feature_store import FeatureStore


class Jobs:
    """All batches of a process, one after the other, each with its snapshot and whether its rows are training rows.

    Args:
        jobs: key of a snapshot, whether of training rows, and their batches.
        before: called with the snapshot before each loader starts: no thread may run while it forks its workers, and
            how samples are read may have to be found.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> from lightning_attr.data.loader import DataSource
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


@dataclass(frozen=True)
class WorkDivision:
    """Divides the rows of an attribution among its processes.

    Args:
        store: of the run.
        n_train: training samples.
        rank: number of this process.
        count: how many processes there are.
        by_shards: whether features are stored, in whole shards.
    """

    store: FeatureStore
    n_train: int
    rank: int
    count: int
    by_shards: bool

    @property
    def shards(self) -> Sequence[int]:
        """Shards that this process scores."""
        return range(self.store.manifest.num_shards)[self.rank :: self.count]

    @property
    def blocks(self) -> list[range]:
        """Rows that this process scores: whole shards where features are stored, else an equal part in one piece."""
        if self.by_shards:
            return [self.store.rows(shard) for shard in self.shards]
        part = range(self.n_train)[
            self.n_train * self.rank // self.count : self.n_train * (self.rank + 1) // self.count
        ]
        size = self.store.manifest.shard_rows
        return [part[start : start + size] for start in range(0, len(part), size)]

    @property
    def rows(self) -> list[int]:
        """The same, one by one."""
        return [row for block in self.blocks for row in block]

    def targets(self, rows: range) -> Sequence[int]:
        """Choose this process's targets.

        Args:
            rows: of all targets.

        Returns:
            Those of this process. A loader without batches would leave it out of the run: one that has none repeats a
            row that is another's.
        """
        return rows[self.rank :: self.count] or rows[:1]
