"""Columns of training samples and targets at each snapshot: in memory where nobody reads them later, else on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lightning_attr.attribution.jobs import WorkDivision
from lightning_attr.attribution.processes import Processes
from lightning_attr.data.memory import free_bytes
from lightning_attr.store.shard_writer import RowTable, ShardWriter

_MOST_OF_MEMORY = 0.25
"""Of what is free, for features that nobody reads later."""


class FeaturizedRows:
    """What one process has featurized.

    Args:
        work: which rows are its own, and the store.
        processes: all that attribute together.
        scratch: whether the store is thrown away in the end.
    """

    def __init__(self, work: WorkDivision, processes: Processes, scratch: bool) -> None:
        self.work = work
        self.processes = processes
        self.scratch = scratch
        self.layers: dict[str, Mapping[str, slice] | None] = {}
        """Which features are of which layer, at each snapshot."""
        self._train: dict[str, RowTable] = {}
        self._targets = {snapshot.key: RowTable(len(work.target_rows)) for snapshot in work.snapshots}

    def begin(self, key: str, dim: int, layers: Mapping[str, slice] | None) -> None:
        """Decide where the training rows of a snapshot go: into memory if nobody reads them later and they fit."""
        self.layers[key] = layers
        if dim == 0 or (self.scratch and self.processes.world_size == 1 and self._fit(dim)):
            self._train[key] = RowTable(len(self.work.train))

    def _fit(self, dim: int) -> bool:
        free = free_bytes(torch.device("cpu")) or 0
        return 8 * dim * len(self.work.train) * len(self.work.snapshots) <= _MOST_OF_MEMORY * free

    def table(self, key: str, train: bool, writer: ShardWriter) -> RowTable | ShardWriter:
        """Give the place of the rows of a snapshot."""
        return self._train.get(key, writer) if train else self._targets[key]

    def blocks(self, key: str) -> Iterator[tuple[range, Mapping[str, Tensor]]]:
        """Read this process's training rows of a snapshot, block after block."""
        if key not in self._train:
            yield from self.work.store.blocks(key, self.work.shards)
            return
        columns = self._train[key].columns
        for own in self.work.blocks:
            yield own, {name: values[own.start : own.stop] for name, values in columns.items()}

    def targets(self, key: str) -> Mapping[str, Tensor]:
        """Give the columns of all targets at a snapshot, of all processes."""
        own = self.work.target_rows[self.work.rank :: self.work.world_size]
        return self.processes.placed(self.processes.joined(self._targets[key].columns, own))

    def loss_and_labels(self, key: str) -> tuple[Tensor, Tensor | None]:
        """Give loss and, if there is one, label of every training sample, ``(n,)``, of all processes."""
        if key in self._train:
            columns = self.processes.joined(self._train[key].columns, self.work.rows)
            return columns["loss"], columns.get("label")
        store = self.work.store
        labelled = "label" in store.shard(key, 0)
        return store.column(key, "loss"), store.column(key, "label") if labelled else None
