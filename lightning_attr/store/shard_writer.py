"""Collects featurized batches into the shards of a store, or into one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_attr.files.writer_lock import beat
from lightning_attr.store.feature_store import FeatureStore
from lightning_attr.store.landing import Landing, Settle


class ShardWriter:
    """Writes a shard as soon as all of its rows are there, in a thread beside the one that computes them.

    One shard is on its way at a time: :meth:`add` waits for the shard before, so that two are in memory at most.
    Encoding, hashing, flushing to the disk and the manifest are the thread's. From the first full shard to
    :meth:`close`, nothing else changes the store: it has one writer at a time.

    Args:
        store: where to.
        key: the snapshot.
        spare: memory for the features of a shard that earlier ones have left, for this writer and the next; memory that
            is new comes page by page, which takes longer than a small model.

    Example:
        >>> import tempfile
        >>> from lightning_attr.store.manifest import Fingerprint
        >>> folder = tempfile.TemporaryDirectory()
        >>> store = FeatureStore.create(folder.name, Fingerprint(3, None, {"w": (2,)}, None))
        >>> _ = store.add_snapshot("final", {"w": torch.ones(2)}, epoch=0, global_step=1, learning_rate=0.1)
        >>> with ShardWriter(store, "final") as writer:
        ...     writer.add([0, 1], {"loss": torch.tensor([1.0, 2.0])})
        ...     writer.add([2], {"loss": torch.tensor([3.0])})
        >>> store.column("final", "loss")
        tensor([1., 2., 3.])
        >>> folder.cleanup()
    """

    def __init__(self, store: FeatureStore, key: str, spare: list[Tensor] | None = None) -> None:
        self.store = store
        self.key = key
        self.spare = [] if spare is None else spare
        self.features: Tensor | None = None  # of the shard that is being filled
        self.parts: list[Mapping[str, Tensor]] = []
        self.rows: list[int] = []
        self._landing = Landing(self._add)
        self._thread: ThreadPoolExecutor | None = None
        self._writing: Future[None] | None = None

    def add(self, rows: Sequence[int], columns: Mapping[str, Tensor], settle: Settle | None = None) -> None:
        """Add a batch; the batches of a shard come one after the other, in order.

        Shapes: columns (b, ...).
        """
        beat(self.store.path)
        self._landing.add(rows, columns, settle)

    def _add(self, rows: Sequence[int], columns: Mapping[str, Tensor]) -> None:
        own = dict(columns)
        if self._landing.landed and "features" in own and not self.rows:  # the next batch was given its place
            self.output_buffer(rows, own["features"].shape[1], own["features"].dtype)
        if self.features is not None:
            _put(own.pop("features"), self.features[len(self.rows) :][: len(rows)])
        self.parts.append(own)
        self.rows += rows
        shard = rows[0] // self.store.manifest.shard_rows
        if self.rows == list(self.store.rows(shard)):
            whole = {name: torch.cat([part[name] for part in self.parts]) for name in self.parts[0]}
            features, self.features = self.features, None
            if features is not None:
                whole["features"] = features[: len(self.rows)]
            self.parts, self.rows = [], []
            self._wait()
            # Started this late, it is seldom there when a loader forks its workers.
            self._thread = self._thread or ThreadPoolExecutor(1, "attribution-shards")
            self._writing = self._thread.submit(self._write, shard, whole, features)

    def output_buffer(self, rows: Sequence[int], dim: int, dtype: torch.dtype) -> Tensor | None:
        """Give the place of the next batch's features, where :meth:`add` looks for them.

        Returns ``(b, dim)``, with any values; None in the middle of a shard that began without.
        """
        if self.features is None and not self.rows:
            shape, spare = (self.store.manifest.shard_rows, dim), self.spare.pop() if self.spare else None
            fits = spare is not None and (spare.shape, spare.dtype) == (shape, dtype)
            self.features = spare if fits else torch.empty(shape, dtype=dtype)
        return None if self.features is None else self.features[len(self.rows) :][: len(rows)]

    def _write(self, shard: int, columns: Mapping[str, Tensor], features: Tensor | None) -> None:
        self.store.write_shard(self.key, shard, columns)
        if features is not None:
            self.spare.append(features)

    def close(self) -> None:
        """Wait until everything is written; the thread is gone then, and more can be added all the same."""
        try:
            self._landing.finish()
            self._wait()
        finally:
            thread, self._thread = self._thread, None
            if thread is not None:
                thread.shutdown()

    def _wait(self) -> None:
        writing, self._writing = self._writing, None  # an error is raised once
        if writing is not None:
            writing.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.close()
            return
        self._landing.drop()
        with suppress(Exception):  # what went wrong first is what matters
            self.close()


class RowTable:
    """Keeps columns in memory, rows in any order.

    Args:
        num_rows: of the table.

    Example:
        >>> table = RowTable(2)
        >>> table.add([1], {"loss": torch.tensor([5.0])})
        >>> table.columns["loss"]
        tensor([0., 5.])
    """

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self._columns: dict[str, Tensor] = {}
        self._landing = Landing(self._add)

    @property
    def columns(self) -> dict[str, Tensor]:
        """Column name -> values ``(num_rows, ...)`` of all rows that were added."""
        self._landing.finish()
        return self._columns

    def add(self, rows: Sequence[int], columns: Mapping[str, Tensor], settle: Settle | None = None) -> None:
        """Add a batch.

        Shapes: columns (b, ...).
        """
        self._landing.add(rows, columns, settle)

    def _add(self, rows: Sequence[int], columns: Mapping[str, Tensor]) -> None:
        ordered = _ordered(rows)
        for name, values in columns.items():
            if name not in self._columns:
                self._columns[name] = values.new_zeros(self.num_rows, *values.shape[1:])
            if ordered:  # copied at once
                _put(values, self._columns[name][rows[0] : rows[0] + len(rows)])
            else:
                self._columns[name][list(rows)] = values

    def output_buffer(self, rows: Sequence[int], dim: int, dtype: torch.dtype) -> Tensor | None:
        """Give the place of a batch's features, where :meth:`add` looks for them.

        Returns ``(b, dim)``; None where rows are not in sequence.
        """
        if not _ordered(rows):
            return None
        if "features" not in self._columns:
            self._columns["features"] = torch.zeros(self.num_rows, dim, dtype=dtype)
        return self._columns["features"][rows[0] : rows[0] + len(rows)]


def _ordered(rows: Sequence[int]) -> bool:
    return list(rows) == list(range(rows[0], rows[0] + len(rows)))


def _put(values: Tensor, place: Tensor) -> None:
    """Copy values, unless they are there already."""
    if values.data_ptr() != place.data_ptr():
        place.copy_(values)
