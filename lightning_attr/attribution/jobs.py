"""The division of work: the rows that one process featurizes and scores, and their batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_attr.attribution.ensemble import Part
from lightning_attr.data.loader import DataSource, OrderedLoader
from lightning_attr.store.feature_store import FeatureStore
from lightning_attr.store.manifest import Snapshot


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
        parts: the snapshots that score.
        train: the training data.
        targets: the target data, which may be the same.
        rank: number of this process.
        world_size: how many processes there are.
        featurizes: whether the method reads features of training samples, which are stored in whole shards.
    """

    store: FeatureStore
    parts: Sequence[Part]
    train: DataSource
    targets: DataSource
    rank: int
    world_size: int
    featurizes: bool

    @property
    def snapshots(self) -> list[Snapshot]:
        """All that score, in their order; the last one is of the run itself."""
        return [snapshot for part in self.parts for snapshot in part.snapshots]

    @property
    def shards(self) -> Sequence[int]:
        """Shards that this process scores."""
        return range(self.store.manifest.num_shards)[self.rank :: self.world_size]

    @property
    def blocks(self) -> list[range]:
        """Rows that this process scores: whole shards where features are stored, else an equal part in one piece."""
        if self.featurizes:
            return [self.store.rows(shard) for shard in self.shards]
        n, size = len(self.train), self.store.manifest.shard_rows
        first, end = (n * rank // self.world_size for rank in (self.rank, self.rank + 1))
        return [range(start, min(start + size, end)) for start in range(first, end, size)]

    @property
    def rows(self) -> list[int]:
        """The same, one by one."""
        return [row for block in self.blocks for row in block]

    @property
    def target_rows(self) -> range:
        """Rows of the target data, of all processes."""
        return range(len(self.targets))

    def jobs(self, before: Callable[[str], object]) -> Jobs:
        """List what this process featurizes, snapshot after snapshot: missing training rows, then targets.

        Returns the batches. A loader without any would leave this process out of the run: one that has no targets
        repeats a row that is another's.
        """
        own = self.target_rows[self.rank :: self.world_size] or self.target_rows[:1]
        jobs = []
        for snapshot in self.snapshots:
            batches = [batch for rows in self._missing(snapshot) for batch in self.train.batches(rows)]
            jobs.append((snapshot.key, True, OrderedLoader(self.train, batches)))
            jobs.append((snapshot.key, False, OrderedLoader(self.targets, self.targets.batches(own))))
        return Jobs(jobs, before)

    def _missing(self, snapshot: Snapshot) -> list[range]:
        """Training rows that this process has still to featurize."""
        if self.featurizes:
            return [self.store.rows(s) for s in self.store.missing(snapshot.key)[self.rank :: self.world_size]]
        # Only the values beside the features are wanted, for the result. A process without rows reads one that is
        # another's, for the form of the values.
        return (self.blocks or [range(1)]) if snapshot == self.snapshots[-1] else []
