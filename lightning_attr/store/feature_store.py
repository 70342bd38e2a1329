"""The feature store: a directory of snapshots and features, safetensors and one manifest.

::

    attribution/
      manifest.json                                 what, how, which rows; checksums
      claims/writer.0                               who writes, while somebody does
      snapshots/epoch=0003-step=000092/
        weights.safetensors                         parameters and buffers
        frozen.safetensors                          linked, where most weights are frozen, as under adapters
        optimizer.safetensors                       moments of the optimizer, if they were asked for
        features/00000.safetensors                  rows 0 .. shard_rows - 1 in data set order
        features/00001.safetensors                  ...

A shard holds for each of its rows ``features`` ``(rows, dim)`` and ``output``, ``loss``, ``out_to_loss``,
``newton_weight`` ``(rows,)``; row ``i`` of the store belongs to ``dataset[i]``. Of some or all of them there are second
directions (see :mod:`lightning_attr.features.second_direction`), ``second_features`` ``(number, directions, dim)`` with
their places ``second_rows`` ``(number,)``. Features are in half precision by default, see
:mod:`lightning_attr.store.feature_dtype`; without this package they are read by

>>> from safetensors.torch import load_file
>>> def read_features(path):
...     shard = load_file(path)
...     return shard["features"].float() * shard.get("features_scale", 1.0)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from lightning_attr.arguments.checks import check_instance, check_int, check_path
from lightning_attr.errors import CorruptedStoreError, IncompleteFeaturesError, StoreMismatchError
from lightning_attr.files.io import digest, read_tensors, remains, write_tensors
from lightning_attr.files.paths import inside
from lightning_attr.files.writer_lock import WriterLock, one_writer
from lightning_attr.store.feature_dtype import (
    by_row,
    check_columns,
    check_feature_dtype,
    decode,
    decode_features,
    encode,
)
from lightning_attr.store.manifest import Fingerprint, Manifest
from lightning_attr.store.snapshot_store import OPTIMIZER, SnapshotStore


class FromCheckpoints(Protocol):
    """How ``FeatureStore.from_checkpoints`` is called, for type checkers: the function itself needs a Trainer."""

    def __call__(
        self,
        ckpt_path: str | Path | Sequence[str | Path],
        model: Any,
        datamodule: Any = None,
        *,
        dirpath: str | Path,
        train_dataloaders: Any = None,
        method: Any = None,
        trainer: Any = None,
        feature_dtype: str = "float16",
        memory_budget: int | None = None,
        optimizer_state: bool = False,
        mode: str | None = None,
    ) -> FeatureStore:
        """Make a store of the checkpoints of a run."""


_SHARD_ROWS = 512
"""Fewest rows a shard: what a killed run loses at most."""
_MOST_SHARDS = 256


class FeatureStore(SnapshotStore):
    """Snapshots of a run and the features of its training set at each of them.

    Args:
        path: the directory.
        manifest: its manifest. Use :meth:`create` and :meth:`open`.
        writer: whether this process writes the manifest; of several processes that share a store, one does.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> store = FeatureStore.create(folder.name, Fingerprint(3, None, {"w": (2,)}, None), batch_size=2)
        >>> snapshot = store.add_snapshot("epoch=0", {"w": torch.ones(2)}, epoch=0, global_step=2, learning_rate=0.1)
        >>> for shard in store.missing(snapshot.key):
        ...     store.write_shard(snapshot.key, shard, {"features": torch.ones(3, 2), "loss": torch.zeros(3)})
        >>> FeatureStore.open(folder.name).column("epoch=0", "loss")
        tensor([0., 0., 0.])
        >>> folder.cleanup()
    """

    from_checkpoints: ClassVar[FromCheckpoints]
    """See :func:`lightning_attr.attribution.checkpoint_store.from_checkpoints`; ``lightning_attr`` sets it."""

    def __init__(self, path: str | Path, manifest: Manifest, writer: bool = True) -> None:
        super().__init__(path, manifest, writer)
        self._verified: set[str] = set()  # digests: a name may come to mean another shard

    @classmethod
    def create(
        cls,
        path: str | Path,
        fingerprint: Fingerprint,
        *,
        batch_size: int = 1,
        run: str | None = None,
        feature_dtype: str = "float16",
    ) -> FeatureStore:
        """Start an empty store.

        Args:
            path: a directory that holds no store yet.
            fingerprint: what is attributed.
            batch_size: samples per batch while featurizing; shards hold whole batches, so that a resumed run computes
                the same batches as an unbroken one.
            run: digest of the weights that the run starts from.
            feature_dtype: "float16", "bfloat16" or "float32", for float32 features; those of a float64 module stay so.

        Returns:
            The store.

        Raises:
            StoreMismatchError: if the directory holds a store already.
            ValueError: if the dtype is none of these.
        """
        check_feature_dtype(feature_dtype)
        check_instance("FeatureStore.create", "fingerprint", fingerprint, Fingerprint, "a Fingerprint")
        batch_size = check_int("FeatureStore.create", "batch_size", batch_size, minimum=1)
        if cls.exists(check_path("FeatureStore.create", "path", path)):
            raise StoreMismatchError(f"{path} already holds an attribution store. Open it, or use another directory.")
        rows = max(_SHARD_ROWS, -(-fingerprint.length // _MOST_SHARDS))
        shard_rows = -(-rows // batch_size) * batch_size
        store = cls(path, Manifest(fingerprint, shard_rows, run, feature_dtype=feature_dtype))
        with WriterLock(store.path):
            if cls.exists(path):  # by now: another process was first
                raise StoreMismatchError(f"{path} already holds an attribution store, made this very moment. Open it.")
            store._save(store.manifest)
        return store

    @one_writer
    def mark_training(self, settings: Mapping[str, Any]) -> None:
        """Note how the run is trained, so that pilots can be trained like it.

        Args:
            settings: as :func:`lightning_attr.pilots.run_settings` gives them. What they do not name stays.
        """
        settings = {**(self.manifest.training or {}), **settings}
        if self.manifest.training != settings:
            self._save(replace(self.manifest, training=dict(settings)))

    # Features -------------------------------------------------------------------------------------------------------

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

    @one_writer
    def set_directions(self, key: str, directions: int, curvature: str) -> None:
        """Note that features of a snapshot have second directions, before any is computed.

        Args:
            key: the snapshot.
            directions: how many a sample.
            curvature: what they are of, "rest" or "whole".
        """
        self._enter(key, directions=directions, curvature=curvature)

    @one_writer
    def note_losses(self, key: str, losses: Sequence[float]) -> None:
        """Note the losses of the first samples at a snapshot that has no features yet.

        Args:
            key: the snapshot.
            losses: of the rows 0, 1, ...
        """
        self._enter(key, losses=tuple(losses))

    @one_writer
    def write_shard(self, key: str, shard: int, columns: Mapping[str, Tensor]) -> None:
        """Store the rows of a shard.

        Args:
            key: the snapshot.
            shard: its number.
            columns: column name -> values of the rows, ``(rows, ...)``, finite.

        Raises:
            ValueError: if a column has another number of rows than the shard, or holds NaN or Inf.
        """
        check_columns(columns, self.rows(shard))
        stored = encode(columns, self.manifest.feature_dtype)
        content = write_tensors(self._shard_path(key, shard), stored, self._shard_place(key, shard))
        self._enter(key, shards={**self.snapshot(key).shards, shard: content})

    @one_writer
    def adopt(self, key: str) -> None:
        """Enter the shards that other processes, or one that was killed, wrote without entering them.

        Args:
            key: the snapshot.
        """
        found = {}
        for shard in self.missing(key):
            with suppress(CorruptedStoreError):  # not there, or damaged: still to be computed
                columns = read_tensors(self._shard_path(key, shard), place=self._shard_place(key, shard))
                self._check_rows(key, shard, columns)
                found[shard] = digest(columns)
                self._verified.add(found[shard])
        if found:
            self._enter(key, shards={**self.snapshot(key).shards, **found})

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

    def _check_rows(self, key: str, shard: int, columns: Mapping[str, Tensor]) -> None:
        lengths = {values.shape[:1] for values in by_row(columns).values()}
        if lengths - {(len(self.rows(shard)),)}:
            raise CorruptedStoreError(
                f"{self._shard_path(key, shard)} has columns of another length than its {len(self.rows(shard))} rows. "
                f"`FeatureStore.open({str(self.path)!r}).set_aside([{key!r}])` goes on without this snapshot."
            )

    # Upkeep ---------------------------------------------------------------------------------------------------------

    @one_writer
    def repair(self) -> list[Path]:
        """Drop shards and optimizer states that are missing or damaged, and the remains of killed runs.

        Returns:
            The files dropped. Rows of a shard count as not computed: ``trainer.attribute`` computes them again. A
            snapshot without its optimizer state serves all methods that do not need it.
        """
        dropped = []

        def intact(path: Path, content: str, place: Mapping[str, str]) -> bool:
            try:
                read_tensors(path, content, place=place)
            except CorruptedStoreError:
                self._verified.discard(content)
                path.unlink(missing_ok=True)
                dropped.append(path)
                return False
            return True

        for snapshot in self.snapshots:
            key, state, file = snapshot.key, snapshot.optimizer, inside(self.path, snapshot.folder, OPTIMIZER)
            shards = {
                shard: content
                for shard, content in snapshot.shards.items()
                if intact(self._shard_path(key, shard), content, self._shard_place(key, shard))
            }
            state = state if state and intact(file, state, self.place(key, "optimizer")) else None
            self._enter(key, shards=shards, optimizer=state)
        for rest in remains(self.path):
            rest.unlink()
            dropped.append(rest)
        return dropped

    def _shard_path(self, key: str, shard: int) -> Path:
        return inside(self.path, self.snapshot(key).folder, "features", f"{shard:05d}.safetensors")
