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

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor

from lightning_attr.arguments.checks import check_instance, check_int, check_path
from lightning_attr.errors import CorruptedStoreError, StoreMismatchError
from lightning_attr.files.io import digest, read_tensors, remains, write_tensors
from lightning_attr.files.paths import inside
from lightning_attr.files.writer_lock import WriterLock, one_writer
from lightning_attr.store.feature_dtype import check_columns, check_feature_dtype, encode
from lightning_attr.store.feature_reader import FeatureReader
from lightning_attr.store.manifest import Fingerprint, Manifest
from lightning_attr.store.snapshot_reader import OPTIMIZER
from lightning_attr.store.snapshot_store import SnapshotStore

_SHARD_ROWS = 512
"""Fewest rows a shard: what a killed run loses at most."""
_MOST_SHARDS = 256


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


class FeatureStore(FeatureReader, SnapshotStore):
    """Snapshots of a run and the features of its training set at each of them.

    Args:
        path: the directory.
        manifest: its manifest. Use :meth:`create` and :meth:`open`.
        writer: whether this process writes the manifest; of several processes that share a store, one does.

    Example:
        >>> import tempfile, torch
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
