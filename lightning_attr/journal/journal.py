"""Reads the journal of a run: its steps, of all processes together, and how often each sample was trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_attr.errors import CorruptedStoreError
from lightning_attr.journal.chunks import BatchEntry, StepEntry
from lightning_attr.journal.folder import FOLDER, Chunk, JournalRecord, RankFolder, rank_folders
from lightning_attr.journal.steps import JournalBatch, JournalStep

_NO_ROWS = torch.zeros(0, dtype=torch.int64)


class Journal:
    """What a run did, step by step. ``FeatureStore.journal`` gives it.

    Args:
        path: directory of the store.
        store: id of the store.
        records: of the processes that wrote it.

    Example:
        >>> import tempfile
        >>> from lightning_attr.journal.steps import GroupStep
        >>> from lightning_attr.journal.writer import JournalWriter
        >>> folder = tempfile.TemporaryDirectory()
        >>> writer = JournalWriter(Path(folder.name), JournalRecord("ab", 0, 4), 0, 1)
        >>> writer.batch([2, 0], epoch=0, batch_idx=0)
        >>> writer.step(0, 0, 0, [GroupStep(0.1, 0.0)])
        >>> writer.flush()
        >>> journal = Journal.open(folder.name, "ab")
        >>> journal.exposure(4)
        tensor([1, 0, 1, 0])
        >>> [(step.rows, step.groups[0].lr) for step in journal.steps()]
        [((tensor([2, 0]),), 0.1)]
        >>> folder.cleanup()
    """

    def __init__(self, path: Path, store: str, records: Mapping[int, JournalRecord]) -> None:
        self.path = path
        self.store = store
        self._records = dict(records)
        self._read: dict[int, list[Chunk]] = {}
        self._listed: dict[int, list[BatchEntry]] = {}

    @classmethod
    def open(cls, path: str | Path, store: str) -> Journal | None:
        """Open the journal of a store.

        Args:
            path: directory of the store.
            store: its id.

        Returns:
            The journal; None where the store has none.

        Raises:
            CorruptedStoreError: if a record is damaged, or of another store.
        """
        place = Path(path).absolute()
        records = {}
        for folder in rank_folders(place):
            record = folder.record()
            if record is None:
                continue
            if record.store != store:
                raise CorruptedStoreError(
                    f"{folder.path} is not the journal that belongs here: it is of the store {record.store[:40]}, not "
                    f"{store[:40]}. Delete {place / FOLDER} to go on without the journal."
                )
            records[folder.rank] = record
        return cls(place, store, records) if records else None

    @property
    def unknown(self) -> str | None:
        """Why it is not known which samples the steps were taken on; None if it is."""
        return next((record.unknown for record in self._records.values() if record.unknown is not None), None)

    @property
    def length(self) -> int:
        """Rows of the training data set."""
        return next(iter(self._records.values())).length

    @property
    def settings(self) -> Mapping[str, Any]:
        """What a replay needs beside the steps: optimizers with their groups, clipping, workers."""
        return next(iter(self._records.values())).settings

    @property
    def complete(self) -> bool:
        """Whether the steps follow one another from the first of the run to the last that was written."""
        return self.gap() is None

    def gap(self, last: int | None = None) -> str | None:
        """Find the first step that is missing.

        Args:
            last: how many steps the run has taken up to the moment of interest; by default those that were written.

        Returns:
            What is missing, in words; None if nothing is.
        """
        expected = 0
        for step, entries in self._entries():
            if last is not None and expected >= last:
                return None
            if step != expected:
                return f"the steps {expected} to {step - 1} are missing"
            processes = next(iter(entries.values()))[0].processes
            if set(entries) != set(range(processes)):
                absent = sorted(set(range(processes)) - set(entries))
                return f"step {step} of process {absent[0] if absent else processes} is missing"
            expected += 1
        return None if last is None or expected >= last else f"the steps from {expected} on are missing"

    def steps(self, first: int = 0, last: int | None = None) -> Iterator[JournalStep]:
        """Give the steps, in order.

        Args:
            first: number of the first.
            last: number of the one behind the last; None for all.

        Returns:
            An iterator over them.

        Raises:
            CorruptedStoreError: if a file is damaged, or not of this run.
        """
        for number, entries in self._entries():
            if last is not None and number >= last:
                return
            if number >= first:
                yield self._joined(entries)

    def exposure(self, n: int, last: int | None = None) -> Tensor:
        """Count how often each sample was trained on.

        Args:
            n: rows of the training data set.
            last: up to this step; None for all.

        Returns:
            ``(n,)``, int64: batches that each sample was in, in all processes, if a step came of them. A batch that
            several optimizers step on counts once.

        Raises:
            CorruptedStoreError: if a file is damaged, or names rows that are not there.
        """
        counts = torch.zeros(n, dtype=torch.int64)
        for rank in self._records:
            behind = 0  # the first batch that no step has come of
            for chunk in self._chunks(rank):
                for step in chunk.steps:
                    if last is not None and step.global_step >= last:
                        break
                    first = max(step.first, behind, chunk.first_batch)
                    for entry in chunk.batches[first - chunk.first_batch : step.last + 1 - chunk.first_batch]:
                        if len(entry.rows) and int(entry.rows.max()) >= n:
                            raise CorruptedStoreError(
                                f"{RankFolder(self.path, rank).path} names row {int(entry.rows.max())} of a data set "
                                f"of {n}. Delete {self.path / FOLDER} to go on without the journal."
                            )
                        counts += torch.bincount(entry.rows, minlength=n)
                    behind = max(behind, step.last + 1)
        return counts

    def _chunks(self, rank: int) -> list[Chunk]:
        if rank not in self._read:
            self._read[rank] = list(RankFolder(self.path, rank).chunks(self.store))
        return self._read[rank]

    def _entries(self) -> Iterator[tuple[int, dict[int, tuple[Chunk, StepEntry]]]]:
        """Steps in order, each with what every process has of it."""
        found: dict[int, dict[int, tuple[Chunk, StepEntry]]] = {}
        for rank in self._records:
            for chunk in self._chunks(rank):
                for step in chunk.steps:
                    found.setdefault(step.global_step, {})[rank] = (chunk, step)
        yield from sorted(found.items())

    def _joined(self, entries: Mapping[int, tuple[Chunk, StepEntry]]) -> JournalStep:
        batches = [
            self._batch(entry, rank)
            for rank, (_, step) in sorted(entries.items())
            for entry in self._batches(rank)[step.first : step.last + 1]
        ]
        step = entries[min(entries)][1]
        clip = None if step.clip_factor != step.clip_factor else step.clip_factor
        return JournalStep(
            step.epoch, step.global_step, step.optimizer, tuple(batches), step.groups, clip, step.loss_scale
        )

    def _batches(self, rank: int) -> list[BatchEntry]:
        if rank not in self._listed:
            self._listed[rank] = [entry for chunk in self._chunks(rank) for entry in chunk.batches]
        return self._listed[rank]

    def _batch(self, entry: BatchEntry, rank: int) -> JournalBatch:
        rows = entry.rows if self.unknown is None else _NO_ROWS
        states = [
            {stream: torch.frombuffer(bytearray(state), dtype=torch.uint8) for stream, state in found.items()} or None
            for found in (entry.before, entry.reading)
        ]
        return JournalBatch(rows, rank, entry.epoch, entry.batch_idx, *states)
