"""Writes the journal of a process while it trains: an open chunk in memory, whole chunks on disk."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lightning_attr.files.paths import inside
from lightning_attr.journal.chunks import BatchEntry, StepEntry
from lightning_attr.journal.folder import FOLDER, Chunk, JournalRecord, RankFolder, rank_folders
from lightning_attr.journal.steps import GroupStep

_MOST_STEPS, _MOST_ROWS = 4096, 2**18
"""Of a chunk; the open one is written again and again until it has so many."""
_SECONDS = 30.0
"""After which the open chunk is written: what a killed run loses at most."""
_MOST_STATE_BYTES = 2**26
"""Of random states in a journal: those of a few thousand batches; later ones are not kept."""


class JournalWriter:
    """The journal of one process.

    Args:
        store: directory of the store.
        record: what the journal says of itself.
        global_step: steps that training has taken already: what a journal has beyond is dropped.
        processes: that train together.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> writer = JournalWriter(Path(folder.name), JournalRecord("ab", 0, 4), 0, 1)
        >>> writer.batch([2, 0], epoch=0, batch_idx=0)
        >>> writer.step(0, 0, 0, [GroupStep(0.1, 0.0)])
        >>> writer.flush()
        >>> [batch.rows.tolist() for chunk in RankFolder(Path(folder.name), 0).chunks("ab") for batch in chunk.batches]
        [[2, 0]]
        >>> folder.cleanup()
    """

    def __init__(self, store: Path, record: JournalRecord, global_step: int, processes: int) -> None:
        self._folder = RankFolder(store, record.rank)
        self._processes = processes
        self._steps: list[StepEntry] = []
        self._factors: list[Tensor | float] = []
        self._batches: list[BatchEntry] = []
        self._pending: list[BatchEntry] = []
        self._last_of: dict[int, int] = {}  # optimizer -> the batch of its last step
        self._states: set[bytes] = set()
        self._state_bytes, self._rows = 0, 0
        self._number, self._before, self._written = 0, "", 0
        self._written_at = time.monotonic()
        if global_step > 0:
            record = self._resume(record, global_step)
        self.record, self._resumed_at = record, self.batches
        self._folder.write_record(record)

    @property
    def batches(self) -> int:
        """Number of the batch that comes next."""
        return self._written + len(self._batches) + len(self._pending)

    def _resume(self, record: JournalRecord, global_step: int) -> JournalRecord:
        """Drop what was written beyond a checkpoint, and go on behind what stays."""
        kept = self._folder.record()
        if kept is None or kept.store != record.store:
            return record
        if record.rank == 0:  # of processes that are no longer there, too
            for other in rank_folders(self._folder.store):
                if other.rank >= self._processes:
                    _roll_back(other, record.store, global_step)
        last = _roll_back(self._folder, record.store, global_step)
        self._number, self._before, self._written = len(last), last[-1].content if last else "", _count(last)
        if last and last[-1].processes == self._processes and len(last[-1].steps) < _MOST_STEPS:
            self._reopen(last)
        return replace(record, unknown=record.unknown or kept.unknown)

    def _reopen(self, kept: list[Chunk]) -> None:
        """Go on in the last chunk, so that a resumed run writes what an unbroken one does."""
        *before, chunk = kept
        self._number, self._written = len(before), chunk.first_batch
        self._before = before[-1].content if before else ""
        self._steps, self._batches = list(chunk.steps), list(chunk.batches)
        self._factors = [step.clip_factor for step in chunk.steps]
        self._rows = sum(len(batch.rows) for batch in chunk.batches)

    def batch(
        self,
        rows: Sequence[int],
        *,
        epoch: int,
        batch_idx: int,
        before: Mapping[str, bytes] | None = None,
        reading: Mapping[str, bytes] | None = None,
    ) -> None:
        """Note a batch that is trained on; it is written with the step that it leads to."""
        numbers = torch.tensor(rows, dtype=torch.int64)
        self._pending.append(BatchEntry(numbers, epoch, batch_idx, self._kept(before), self._kept(reading)))

    def _kept(self, states: Mapping[str, bytes] | None) -> Mapping[str, bytes]:
        """States, as long as there is room for them."""
        states = states or {}
        new = [state for state in states.values() if state not in self._states]
        if self._state_bytes + sum(map(len, new)) > _MOST_STATE_BYTES:
            return {}
        self._state_bytes += sum(map(len, new))
        self._states = set(states.values()) | set(new)  # what is alike follows at once
        return states

    def step(
        self,
        global_step: int,
        epoch: int,
        optimizer: int,
        groups: Sequence[GroupStep],
        clip_factor: Tensor | float = 1.0,
        loss_scale: float = 1.0,
        again: bool = False,
    ) -> None:
        """Note a step of an optimizer, on the batches since its last one; if there is none, ``again`` on the last."""
        if self._steps and self._steps[-1].global_step == global_step:
            return  # an optimizer that evaluates the loss several times a step
        self._batches += self._pending
        self._rows += sum(len(batch.rows) for batch in self._pending)
        self._pending = []
        last = self.batches - 1
        before = self._last_of.get(optimizer, max(self._last_of.values(), default=self._resumed_at - 1))
        self._last_of[optimizer] = last
        first = min(before + 1, max(last, 0)) if again else before + 1
        self._steps.append(StepEntry(global_step, epoch, optimizer, first, last, tuple(groups), math.nan, loss_scale))
        self._factors.append(clip_factor)

    def unknown(self, cause: str) -> None:
        """Note that the order of the samples is not known; the first cause stays."""
        if self.record.unknown is None:
            self.record = replace(self.record, unknown=cause)
            self._folder.write_record(self.record)

    def flush_when_due(self) -> None:
        """Write the open chunk if it is large, or was not written for a while."""
        full = len(self._steps) >= _MOST_STEPS or self._rows >= _MOST_ROWS
        if full or time.monotonic() - self._written_at > _SECONDS:
            self.flush(close=full)

    def flush(self, close: bool = False) -> None:
        """Write the open chunk, and begin another one behind it if it is to be closed."""
        self._written_at = time.monotonic()
        if not self._steps:
            return
        self._steps = [
            replace(step, clip_factor=float(factor)) for step, factor in zip(self._steps, self._factors, strict=True)
        ]
        self._factors = [step.clip_factor for step in self._steps]
        chunk = self._steps, self._batches, self._processes
        content = self._folder.write(self.record.store, self._number, self._before or None, *chunk)
        if close:
            self._written += len(self._batches)
            self._number, self._before = self._number + 1, content
            self._steps, self._factors, self._batches, self._rows = [], [], [], 0


def _roll_back(folder: RankFolder, store: str, global_step: int) -> list[Chunk]:
    """Drop steps from ``global_step`` on.

    Returns the chunks that stay.
    """
    kept, files = list(folder.chunks(store)), folder.files()
    while kept and (not kept[-1].steps or kept[-1].steps[-1].global_step >= global_step):
        chunk = kept.pop()
        steps = [step for step in chunk.steps if step.global_step < global_step]
        before = kept[-1].content if kept else None
        if steps:
            batches = chunk.batches[: steps[-1].last + 1 - chunk.first_batch]
            content = folder.write(store, len(kept), before, steps, batches, chunk.processes)
            kept.append(replace(chunk, steps=steps, batches=batches, content=content))
        else:
            files[len(kept)].unlink()
    return kept


def _count(chunks: list[Chunk]) -> int:
    """Batches in chunks that follow one another."""
    return chunks[-1].first_batch + len(chunks[-1].batches) if chunks else 0


def begin_anew(store: Path) -> None:
    """Drop the journal of a run that is trained again from its start."""
    shutil.rmtree(inside(store, FOLDER), ignore_errors=True)
