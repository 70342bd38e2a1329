"""Reads the features of a store, shard by shard."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lightning_attr.errors import CorruptedStoreError, IncompleteFeaturesError
from lightning_attr.files.io import read_tensors
from lightning_attr.files.paths import inside
from lightning_attr.store.feature_dtype import by_row, decode, decode_features, senseless
from lightning_attr.store.manifest import Manifest
from lightning_attr.store.snapshot_reader import SnapshotReader


class FeatureReader(SnapshotReader):
    """A store whose features can be read: which rows a shard has, which shards are missing, what is in them."""

    def __init__(self, path: str | Path, manifest: Manifest, writer: bool = True) -> None:
        super().__init__(path, manifest, writer)
        self._verified: set[str] = set()  # digests: a name may come to mean another shard

    def rows(self, shard: int) -> range:
        """Rows of a shard.

        Args:
            shard: its number.

        Returns:
            The row numbers.
        """
        start = shard * self.manifest.shard_rows
        return range(start, min(start + self.manifest.shard_rows, self.fingerprint.length))

    def missing(self, key: str) -> list[int]:
        """List the shards of a snapshot that are still to be computed.

        Args:
            key: its name.

        Returns:
            Shard numbers, ascending.
        """
        return [shard for shard in range(self.manifest.num_shards) if shard not in self.snapshot(key).shards]

    def shard(self, key: str, shard: int) -> dict[str, Tensor]:
        """Read a shard; its checksum is verified the first time.

        Args:
            key: the snapshot.
            shard: its number.

        Returns:
            Column name -> values, mapped from the file; features in half precision are copied to float32.

        Raises:
            IncompleteFeaturesError: if it was not computed yet.
        """
        return decode(self._stored(key, shard))

    def blocks(self, key: str, shards: Sequence[int] | None = None) -> Iterator[tuple[range, dict[str, Tensor]]]:
        """Read shard after shard; only the one at hand is in memory.

        Args:
            key: the snapshot.
            shards: their numbers; all by default.

        Yields:
            ``(rows, columns)``, as :meth:`shard` gives them.
        """
        for shard in range(self.manifest.num_shards) if shards is None else shards:
            yield self.rows(shard), self.shard(key, shard)

    def column(self, key: str, name: str) -> Tensor:
        """Read a column of all rows.

        Args:
            key: the snapshot.
            name: the column.

        Returns:
            Values ``(n, ...)``.
        """
        stored = (self._stored(key, shard) for shard in range(self.manifest.num_shards))
        return torch.cat([decode_features(columns) if name == "features" else columns[name] for columns in stored])

    def _stored(self, key: str, shard: int) -> dict[str, Tensor]:
        content = self.snapshot(key).shards.get(shard)
        if content is None:
            rows = self.rows(shard)
            raise IncompleteFeaturesError(
                f"The rows {rows.start} to {rows.stop - 1} of snapshot {key!r} in {self.path} have no features yet. "
                "`trainer.attribute` computes them."
            )
        remedy = f"`FeatureStore.open({str(self.path)!r}).repair()` drops it; `trainer.attribute` adds it anew."
        # Opened each time: small tensors kept in between would scatter the memory that decoding frees.
        path, place, hashed = self._shard_path(key, shard), self._shard_place(key, shard), content not in self._verified
        columns = read_tensors(path, content, remedy, hashed, place)
        self._check_rows(key, shard, columns)
        wrong = senseless(columns) if hashed else None
        if wrong is None and "features" not in columns and self.fingerprint.projector is not None:
            wrong = "`features` is missing"
        if wrong is not None:
            raise CorruptedStoreError(f"{path} is damaged: {wrong}. {remedy}")
        self._verified.add(content)
        return columns

    def _shard_place(self, key: str, shard: int) -> dict[str, str]:
        """All that the values of a shard depend on, beside the code."""
        rows, written = self.rows(shard), self.fingerprint
        snapshot = self.snapshot(key)
        known = {
            "data": written.data,
            "output": written.output,
            "optimizer": snapshot.optimizer,
            "basis": snapshot.basis,
            "curvature": snapshot.curvature,
            "directions": None if snapshot.directions is None else str(snapshot.directions),
            "mode": None if written.mode == "auto" else written.mode,
            "projection": written.projector_digest,
        }
        place = {**self.place(key, "features"), "rows": f"{rows.start}-{rows.stop - 1}"}
        return {**place, **{name: value for name, value in known.items() if value is not None}}

    def _shard_path(self, key: str, shard: int) -> Path:
        return inside(self.path, self.snapshot(key).folder, "features", f"{shard:05d}.safetensors")

    def _check_rows(self, key: str, shard: int, columns: Mapping[str, Tensor]) -> None:
        lengths = {values.shape[:1] for values in by_row(columns).values()}
        if lengths - {(len(self.rows(shard)),)}:
            raise CorruptedStoreError(
                f"{self._shard_path(key, shard)} has columns of another length than its {len(self.rows(shard))} rows. "
                f"`FeatureStore.open({str(self.path)!r}).set_aside([{key!r}])` goes on without this snapshot."
            )
