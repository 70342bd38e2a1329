"""The files of a journal: a record and chunks for each process, below the store that it belongs to.

::

    journal/
      rank-00000/
        journal.json                 of which store, which run; why the order is not known, if it is not
        00000000.safetensors         steps and batches; each names the digest of the one before
        00000001.safetensors
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from lightning_attr.errors import CorruptedStoreError, StoreMismatchError
from lightning_attr.files.fields import integer, optional, plain, read_fields, text
from lightning_attr.files.headers import check_header
from lightning_attr.files.io import read_tensors, write_tensors
from lightning_attr.files.paths import check_regular, inside
from lightning_attr.files.sealed_records import read_record, write_record
from lightning_attr.journal.chunks import BatchEntry, StepEntry, from_tensors, to_tensors

FOLDER, RECORD, FORMAT = "journal", "journal.json", 1
_MOST_BYTES, _MOST_RANKS = 2**30, 2**16
_BEGINNING = "0" * 64
"""Digest before the first chunk."""


@dataclass(frozen=True)
class JournalRecord:
    """What a process says of its journal.

    Args:
        store: id of the store.
        rank: of the process.
        length: rows of the training data set.
        unknown: why the order of the samples is not known; None if it is.
        settings: what else a replay needs: optimizers and their groups, clipping, workers.
    """

    store: str
    rank: int
    length: int
    unknown: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


_CHECKS = {
    "store": text(100),
    "rank": integer(0, _MOST_RANKS),
    "length": integer(0),
    "unknown": optional(text()),
    "settings": plain,
}


@dataclass(frozen=True)
class Chunk:
    """A chunk as it was read.

    Args:
        steps: in order.
        batches: in order.
        first_batch: number of the first of them.
        processes: that trained together.
        content: digest, which the next chunk names.
    """

    steps: list[StepEntry]
    batches: list[BatchEntry]
    first_batch: int
    processes: int
    content: str


class RankFolder:
    """The journal of one process.

    Args:
        store: directory of the store.
        rank: of the process.
    """

    def __init__(self, store: Path, rank: int) -> None:
        self.store = store
        self.rank = rank

    @property
    def path(self) -> Path:
        """Where it is."""
        return inside(self.store, FOLDER, f"rank-{self.rank:05d}")

    def record(self) -> JournalRecord | None:
        """Read the record; None if there is no journal of this process."""
        if not self.path.exists():
            return None
        found = read_record(self.path / RECORD, "journal", FORMAT, _remedy(self.store))
        try:
            record = read_fields(JournalRecord, found, _CHECKS, ignored=("format",), whole=True)
        except ValueError as error:
            raise CorruptedStoreError(f"{self.path / RECORD} is damaged: {error}. {_remedy(self.store)}") from error
        if record.rank != self.rank:
            raise CorruptedStoreError(
                f"{self.path} is not the journal that belongs here: it is of process {record.rank}, not {self.rank}. "
                f"{_remedy(self.store)}"
            )
        return record

    def write_record(self, record: JournalRecord) -> None:
        """Write the record, at once."""
        self._check_there()
        write_record(self.path / RECORD, {"format": FORMAT, **asdict(record)})

    def files(self) -> list[Path]:
        """List the chunks, up to the first that is missing."""
        found: list[Path] = []
        while (file := inside(self.path, f"{len(found):08d}.safetensors")).exists():
            found.append(file)
        return found

    def chunks(self, store: str) -> Iterator[Chunk]:
        """Read the chunks, one after the other, each checked to follow the one before."""
        before, batches, step = _BEGINNING, 0, None
        for number, file in enumerate(self.files()):
            chunk = self._chunk(file, self._place(store, number, before), batches)
            if step is not None and chunk.steps and chunk.steps[0].global_step < step:
                raise CorruptedStoreError(f"{file} goes back to an earlier step. {_remedy(self.store)}")
            before, batches = chunk.content, batches + len(chunk.batches)
            step = chunk.steps[-1].global_step + 1 if chunk.steps else step
            yield chunk

    def _chunk(self, file: Path, place: Mapping[str, str], first_batch: int) -> Chunk:
        try:
            check_regular(file, _MOST_BYTES)
        except (OSError, ValueError) as error:
            raise CorruptedStoreError(f"{file} is damaged: {error}. {_remedy(self.store)}") from error
        tensors = read_tensors(file, remedy=_remedy(self.store), place=place)
        with safe_open(file, framework="pt") as opened:
            own = check_header(opened.metadata(), place)
        try:
            if set(place) - set(own) or not own.get("processes", "").isdecimal():
                raise ValueError("its header does not say which chunk it is")
            steps, batches = from_tensors(tensors, first_batch)
        except ValueError as error:
            raise CorruptedStoreError(f"{file} is damaged: {error}. {_remedy(self.store)}") from error
        return Chunk(steps, batches, first_batch, int(own["processes"][:6]), own["sha256"])

    def write(
        self,
        store: str,
        number: int,
        before: str | None,
        steps: list[StepEntry],
        batches: list[BatchEntry],
        processes: int,
    ) -> str:
        """Write a chunk, at once.

        Returns its digest.
        """
        self._check_there()
        file = inside(self.path, f"{number:08d}.safetensors")
        place = self._place(store, number, before or _BEGINNING)
        return write_tensors(file, to_tensors(steps, batches), {**place, "processes": str(processes)})

    def _check_there(self) -> None:
        if not self.store.is_dir():
            raise StoreMismatchError(
                f"{self.store} was deleted while it was in use, and the journal in it. Let nothing clean that "
                "directory up, or choose another one."
            )

    def _place(self, store: str, number: int, before: str) -> dict[str, str]:
        return {"kind": FOLDER, "store": store, "rank": str(self.rank), "number": str(number), "before": before}


def rank_folders(store: Path) -> list[RankFolder]:
    """Find the journals of all processes, in order."""
    folder = inside(store, FOLDER)
    if not folder.is_dir():
        return []
    names = sorted(place.name for place in folder.iterdir() if place.name.startswith("rank-"))
    return [RankFolder(store, int(name[5:])) for name in names if name[5:].isdecimal() and len(name) == 10]


def _remedy(store: Path) -> str:
    return f"Delete {store / FOLDER} to go on without the journal: snapshots and features do not need it."
