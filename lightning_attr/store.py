"""The feature store: a directory of snapshots and features, safetensors and one manifest.

::

    attribution/
      manifest.json                                 what, how, which rows; checksums
      snapshots/epoch=0003-step=000092/
        weights.safetensors                         parameters and buffers
        features/00000.safetensors                  rows 0 .. shard_rows - 1 in data set order
        features/00001.safetensors                  ...

A shard holds for each of its rows ``features`` ``(rows, dim)`` and ``output``, ``loss``, ``out_to_loss``,
``newton_weight`` ``(rows,)``; row ``i`` of the store belongs to ``dataset[i]``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lightning_attr.errors import CorruptedStoreError, IncompleteFeaturesError, StoreMismatchError
from lightning_attr.files import digest, read_tensors, write_tensors
from lightning_attr.manifest import Fingerprint, Manifest, Snapshot

__all__ = ["FeatureStore"]

_SHARD_ROWS = 512
"""Fewest rows a shard: what a killed run loses at most."""
_MOST_SHARDS = 256


class FeatureStore:
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

    def __init__(self, path: str | Path, manifest: Manifest, writer: bool = True) -> None:
        self.path = Path(path)
        self.manifest = manifest
        self.writer = writer
        self._verified: dict[tuple[str, int], dict[str, Tensor]] = {}

    @classmethod
    def create(
        cls, path: str | Path, fingerprint: Fingerprint, *, batch_size: int = 1, run: str | None = None
    ) -> FeatureStore:
        """Start an empty store.

        Args:
            path: a directory that holds no store yet.
            fingerprint: what is attributed.
            batch_size: samples a batch while featurizing; shards hold whole batches, so that a resumed run computes the
                same batches as an unbroken one.
            run: digest of the weights that the run starts from.

        Returns:
            The store.

        Raises:
            StoreMismatchError: if the directory holds a store already.
        """
        folder = Path(path)
        if (folder / "manifest.json").exists():
            raise StoreMismatchError(f"{folder} already holds an attribution store. Open it, or use another directory.")
        rows = max(_SHARD_ROWS, -(-fingerprint.length // _MOST_SHARDS))
        store = cls(folder, Manifest(fingerprint, -(-rows // batch_size) * batch_size, run))
        store._save(store.manifest)
        return store

    @classmethod
    def open(cls, path: str | Path, writer: bool = True) -> FeatureStore:
        """Open a store.

        Args:
            path: its directory.
            writer: as in the constructor.

        Returns:
            The store.
        """
        return cls(path, Manifest.read(Path(path) / "manifest.json"), writer)

    def reload(self) -> None:
        """Read the manifest again, to see what another process entered."""
        self.manifest = Manifest.read(self.path / "manifest.json")

    @staticmethod
    def exists(path: str | Path) -> bool:
        """Whether a directory holds a store.

        Args:
            path: a directory, which need not exist.

        Returns:
            True if its manifest is there.
        """
        return (Path(path) / "manifest.json").exists()

    @property
    def fingerprint(self) -> Fingerprint:
        """What the store was written for."""
        return self.manifest.fingerprint

    @property
    def snapshots(self) -> tuple[Snapshot, ...]:
        """The snapshots, in the order of training."""
        return self.manifest.snapshots

    def snapshot(self, key: str) -> Snapshot:
        """Look a snapshot up.

        Args:
            key: its name.

        Returns:
            The snapshot.

        Raises:
            KeyError: if there is none of this name.
        """
        for snapshot in self.snapshots:
            if snapshot.key == key:
                return snapshot
        raise KeyError(f"{self.path} has no snapshot {key!r}; it has {[s.key for s in self.snapshots]}.")

    def check(self, fingerprint: Fingerprint) -> None:
        """Refuse another data set, model or projection than the store's; adopt the projection if it has none yet.

        Args:
            fingerprint: what is at hand.
        """
        self.fingerprint.check(fingerprint, str(self.path))
        if self.fingerprint.projector is None and fingerprint.projector is not None:
            self._save(replace(self.manifest, fingerprint=replace(self.fingerprint, projector=fingerprint.projector)))

    # Snapshots ------------------------------------------------------------------------------------------------------

    def add_snapshot(
        self, key: str, weights: Mapping[str, Tensor], *, epoch: int, global_step: int, learning_rate: float
    ) -> Snapshot:
        """Store the weights of a moment of training.

        Args:
            key: a name that no other snapshot of the store has.
            weights: parameter or buffer name -> tensor.
            epoch: index of the epoch.
            global_step: optimizer steps taken.
            learning_rate: its sum over the steps since the snapshot before.

        Returns:
            The snapshot.

        Raises:
            StoreMismatchError: if the name is taken.
        """
        if any(snapshot.key == key for snapshot in self.snapshots):
            raise StoreMismatchError(f"{self.path} already holds the snapshot {key!r}.")
        folder = f"snapshots/{key}"
        content = write_tensors(self.path / folder / "weights.safetensors", weights)
        snapshot = Snapshot(key, epoch, global_step, learning_rate, folder, content, projection=key)
        self._save(replace(self.manifest, snapshots=(*self.snapshots, snapshot)))
        return snapshot

    def weights(self, key: str) -> dict[str, Tensor]:
        """Read the weights of a snapshot.

        Args:
            key: its name.

        Returns:
            Parameter or buffer name -> tensor.
        """
        snapshot = self.snapshot(key)
        return read_tensors(self.path / snapshot.folder / "weights.safetensors", snapshot.weights)

    def set_aside(self, keys: Iterable[str]) -> None:
        """Take snapshots out of the store; their files move to ``abandoned/``, nothing is deleted.

        Args:
            keys: names of snapshots, of a branch of training that was given up, for instance.
        """
        gone = [self.snapshot(key) for key in keys]
        if not gone:
            return
        self._save(replace(self.manifest, snapshots=tuple(s for s in self.snapshots if s not in gone)))
        for snapshot in gone:
            target = self.path / "abandoned" / snapshot.key
            while target.exists():
                target = target.with_name(target.name + "+")
            target.parent.mkdir(exist_ok=True)
            (self.path / snapshot.folder).rename(target)

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

    def write_shard(self, key: str, shard: int, columns: Mapping[str, Tensor]) -> None:
        """Store the rows of a shard.

        Args:
            key: the snapshot.
            shard: its number.
            columns: column name -> values of the rows, ``(rows, ...)``.

        Raises:
            ValueError: if a column has another number of rows than the shard.
        """
        rows = len(self.rows(shard))
        for name, values in columns.items():
            if len(values) != rows:
                raise ValueError(f"Expected {rows} rows in column {name!r} of shard {shard}, but got {len(values)}.")
        self._record(key, {shard: write_tensors(self._shard_path(key, shard), columns)})

    def adopt(self, key: str) -> None:
        """Enter the shards that other processes, or one that was killed, wrote without entering them.

        Args:
            key: the snapshot.
        """
        found = {}
        for shard in self.missing(key):
            path = self._shard_path(key, shard)
            if path.exists():
                self._verified[key, shard] = read_tensors(path)
                found[shard] = digest(self._verified[key, shard])
        if found:
            self._record(key, found)

    def shard(self, key: str, shard: int) -> dict[str, Tensor]:
        """Read a shard; its checksum is verified the first time.

        Args:
            key: the snapshot.
            shard: its number.

        Returns:
            Column name -> values, mapped from the file.

        Raises:
            IncompleteFeaturesError: if it was not computed yet.
        """
        content = self.snapshot(key).shards.get(shard)
        if content is None:
            rows = self.rows(shard)
            raise IncompleteFeaturesError(
                f"The rows {rows.start} to {rows.stop - 1} of snapshot {key!r} in {self.path} have no features yet. "
                "`trainer.attribute` computes them."
            )
        if (key, shard) not in self._verified:
            self._verified[key, shard] = read_tensors(self._shard_path(key, shard), content)
        return self._verified[key, shard]

    def blocks(self, key: str, shards: Sequence[int] | None = None) -> Iterator[tuple[range, dict[str, Tensor]]]:
        """Read shard after shard.

        Args:
            key: the snapshot.
            shards: their numbers; all by default.

        Yields:
            ``(rows, columns)``.
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
        return torch.cat([columns[name] for _, columns in self.blocks(key)])

    # Upkeep ---------------------------------------------------------------------------------------------------------

    def repair(self) -> list[Path]:
        """Drop shards that are missing or damaged, and the remains of killed runs.

        Returns:
            The files dropped. Their rows count as not computed: ``trainer.attribute`` computes them again.
        """
        dropped = []
        for snapshot in self.snapshots:
            bad = []
            for shard in snapshot.shards:
                self._verified.pop((snapshot.key, shard), None)
                try:
                    self.shard(snapshot.key, shard)
                except CorruptedStoreError:
                    bad.append(shard)
            for shard in bad:
                path = self._shard_path(snapshot.key, shard)
                path.unlink(missing_ok=True)
                dropped.append(path)
            self._record(snapshot.key, {}, drop=bad)
        for rest in self.path.rglob(".*.tmp"):
            rest.unlink()
            dropped.append(rest)
        return dropped

    @classmethod
    def merge(cls, stores: Sequence[str | Path | FeatureStore], path: str | Path) -> FeatureStore:
        """Join the snapshots of several runs into one ensemble; the files are linked where the file system allows.

        Args:
            stores: stores of the same data, model and projection, its seed among them.
            path: a new directory.

        Returns:
            The ensemble. Its snapshots are named ``run<i>/<key>``.

        Raises:
            StoreMismatchError: if data, parameters or projection differ.
            ValueError: if no store is given.
        """
        sources = [store if isinstance(store, cls) else cls.open(store) for store in stores]  # type: ignore[arg-type]
        if not sources:
            raise ValueError("Expected argument `stores` to name at least one store, but got none.")
        first = sources[0]
        for source in sources[1:]:
            first.fingerprint.check(source.fingerprint, str(first.path))
            if source.manifest.shard_rows != first.manifest.shard_rows:
                raise StoreMismatchError(
                    f"{first.path} has {first.manifest.shard_rows} rows a shard, {source.path} has "
                    f"{source.manifest.shard_rows}. Featurize both with the same batch size."
                )
        if cls.exists(path):
            raise StoreMismatchError(f"{path} already holds an attribution store. Use another directory.")
        merged = cls(path, Manifest(first.fingerprint, first.manifest.shard_rows, None))
        snapshots = []
        for i, source in enumerate(sources):
            for snapshot in source.snapshots:
                folder = f"snapshots/run{i}/{snapshot.key}"
                shutil.copytree(source.path / snapshot.folder, merged.path / folder, copy_function=_link_or_copy)
                snapshots.append(replace(snapshot, folder=folder, key=f"run{i}/{snapshot.key}"))
        merged._save(replace(merged.manifest, snapshots=tuple(snapshots)))
        return merged

    def _record(self, key: str, found: Mapping[int, str], drop: Sequence[int] = ()) -> None:
        snapshots = []
        for snapshot in self.snapshots:
            if snapshot.key == key:
                kept = {shard: content for shard, content in snapshot.shards.items() if shard not in drop}
                snapshot = replace(snapshot, shards={**kept, **found})
            snapshots.append(snapshot)
        self._save(replace(self.manifest, snapshots=tuple(snapshots)))

    def _save(self, manifest: Manifest) -> None:
        if self.writer:
            manifest.write(self.path / "manifest.json")
        self.manifest = manifest

    def _shard_path(self, key: str, shard: int) -> Path:
        return self.path / self.snapshot(key).folder / "features" / f"{shard:05d}.safetensors"


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)
