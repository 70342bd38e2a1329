"""Columns of the training samples at each snapshot: in memory where nobody reads them later, else in the store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lightning_attr.attribution.jobs import WorkDivision
from lightning_attr.attribution.processes import Processes
from lightning_attr.data.memory import free_bytes
from lightning_attr.store.shard_writer import RowTable

_KEPT_SHARE = 0.25
"""Of the free memory, for features that nobody reads later."""


class TrainingRows:
    """What one process has of the training samples.

    Args:
        work: which rows are its own, and the store.
        processes: all that attribute together.
        scratch: whether the store is thrown away in the end.
        snapshots: how many are used.
    """

    def __init__(self, work: WorkDivision, processes: Processes, scratch: bool, snapshots: int) -> None:
        self.work = work
        self.processes = processes
        self.scratch = scratch
        self.snapshots = snapshots
        self.tables: dict[str, RowTable] = {}

    def begin(self, key: str, dim: int) -> None:
        """Decide where the rows of a snapshot go: into memory if nobody reads them later and they fit."""
        if dim == 0 or (self.scratch and self.processes.count == 1 and self._fit(dim)):
            self.tables[key] = RowTable(self.work.n_train)

    def _fit(self, dim: int) -> bool:
        free = free_bytes(torch.device("cpu")) or 0
        return 8 * dim * self.work.n_train * self.snapshots <= _KEPT_SHARE * free

    def blocks(self, key: str) -> Iterator[tuple[range, Mapping[str, Tensor]]]:
        """Read this process's rows of a snapshot, block after block."""
        if key not in self.tables:
            yield from self.work.store.blocks(key, self.work.shards)
            return
        columns = self.tables[key].columns
        for own in self.work.blocks:
            yield own, {name: values[own.start : own.stop] for name, values in columns.items()}

    def loss_and_labels(self, key: str) -> tuple[Tensor, Tensor | None]:
        """Give loss and, if there is one, label of every training sample, ``(n,)``, of all processes."""
        if key in self.tables:
            columns = self.processes.joined(self.tables[key].columns, self.work.rows)
            return columns["loss"], columns.get("label")
        store = self.work.store
        labelled = "label" in store.shard(key, 0)
        return store.column(key, "loss"), store.column(key, "label") if labelled else None
