"""The snapshots of a store: the manifest, the weights, and what the optimizer knew; see :mod:`lightning_attr.store`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from typing_extensions import Self

from lightning_attr.arguments.checks import check_instance, check_path
from lightning_attr.errors import StoreMismatchError
from lightning_attr.files.io import digest, link_file, link_files, move_aside, write_tensors
from lightning_attr.files.paths import check_key, inside, names_in, regular_files
from lightning_attr.files.writer_lock import WriterLock, one_writer
from lightning_attr.store.manifest import Manifest, Snapshot
from lightning_attr.store.snapshot_reader import BASIS, FROZEN, OPTIMIZER, WEIGHTS, SnapshotReader
from lightning_attr.store.unfinished import clear_unfinished


class SnapshotStore(SnapshotReader):
    """A directory with the snapshots of a run.

    Args:
        path: the directory.
        manifest: its manifest. Use :meth:`open`.
        writer: whether this process writes the manifest; of several processes that share a store, one does.

    Example:
        >>> import tempfile, torch
        >>> from lightning_attr.store.manifest import Fingerprint
        >>> folder = tempfile.TemporaryDirectory()
        >>> store = SnapshotStore(folder.name, Manifest(Fingerprint(3, None, {"w": (2,)}, None), 512, None))
        >>> _ = store.add_snapshot("epoch=0", {"w": torch.ones(2)}, epoch=0, global_step=2, learning_rate=0.1)
        >>> SnapshotStore.open(folder.name).weights("epoch=0")
        {'w': tensor([1., 1.])}
        >>> folder.cleanup()
    """

    @one_writer
    def add_snapshot(
        self,
        key: str,
        weights: Mapping[str, Tensor],
        *,
        epoch: int,
        global_step: int,
        learning_rate: float,
        optimizer: Mapping[str, Tensor] | None = None,
        trainable: tuple[str, ...] | None = None,
        rates: Mapping[str, float] | None = None,
        pilot: int | None = None,
    ) -> Snapshot:
        """Store the weights of a moment of training.

        Args:
            key: a name that no other snapshot of the store has.
            weights: parameter or buffer name -> tensor.
            epoch: index of the epoch.
            global_step: optimizer steps taken.
            learning_rate: its sum over the steps since the snapshot before.
            optimizer: the optimizer's state, as :meth:`OptimizerState.tensors` gives it; None for none.
            trainable: names of the parameters that are not frozen; None for all.
            rates: that sum for each trainable parameter, where they differ.
            pilot: number of the pilot that ends here; None for the recorded run.

        Returns:
            The snapshot.

        Raises:
            StoreMismatchError: if the name is taken.
            ValueError: if it is no name for a folder; see :func:`lightning_attr.files.paths.check_key`.
        """
        check_key(key)
        if any(snapshot.key == key for snapshot in self.snapshots):
            raise StoreMismatchError(f"{self.path} already holds the snapshot {key!r}.")
        folder = f"snapshots/{key}"
        if not clear_unfinished(inside(self.path, folder), (WEIGHTS, FROZEN, OPTIMIZER)):
            self._abandon(folder)
        own, frozen = self._write_weights(folder, key, weights, trainable)
        content = own if frozen is None else digest(weights)
        place = {"kind": "optimizer", "store": self.manifest.id, "snapshot": key, "weights": content}
        state = None if optimizer is None else write_tensors(inside(self.path, folder, OPTIMIZER), optimizer, place)
        snapshot = Snapshot(
            key,
            epoch,
            global_step,
            learning_rate,
            folder,
            content,
            projection=key,
            optimizer=state,
            frozen=frozen,
            trainable=trainable,
            rates=rates,
            pilot=pilot,
        )
        self._save(replace(self.manifest, snapshots=(*self.snapshots, snapshot)))
        return snapshot

    def _write_weights(
        self, folder: str, key: str, weights: Mapping[str, Tensor], trainable: tuple[str, ...] | None
    ) -> tuple[str, str | None]:
        """Write weights, the frozen ones under adapters once for all snapshots; return the digests of both files."""
        place = {"kind": "weights", "store": self.manifest.id, "snapshot": key}
        shared = {"kind": "frozen", "store": self.manifest.id}
        file, beside = (inside(self.path, folder, name) for name in (WEIGHTS, FROZEN))
        moving = frozenset(self.fingerprint.layout if trainable is None else trainable)
        frozen = {name: tensor for name, tensor in weights.items() if name not in moving}
        trained = {name: tensor for name, tensor in weights.items() if name not in frozen}
        if sum(tensor.nbytes for tensor in frozen.values()) <= sum(tensor.nbytes for tensor in trained.values()):
            return write_tensors(file, weights, place), None
        own = write_tensors(file, trained, place)
        content = digest(frozen)
        before = next((s for s in reversed(self.snapshots) if s.frozen == content and s.origin is None), None)
        if before is None:
            return own, write_tensors(beside, frozen, shared)
        link_file(inside(self.path, before.folder, FROZEN), beside)
        return own, content

    @one_writer
    def add_basis(self, key: str, basis: Mapping[str, Tensor]) -> None:
        """Keep what the projection of a snapshot has learned, before any feature is computed with it.

        Args:
            key: the snapshot.
            basis: as :meth:`basis` gives it.
        """
        file = inside(self.path, self.snapshot(key).folder, BASIS)
        self._enter(key, basis=write_tensors(file, basis, self.place(key, "basis")))

    @one_writer
    def set_aside(self, keys: Iterable[str]) -> None:
        """Take snapshots out of the store; their files move to ``abandoned/``, nothing is deleted.

        Args:
            keys: names of snapshots, of a branch of training that was given up, for instance.
        """
        gone = [self.snapshot(key) for key in keys]
        self._save(replace(self.manifest, snapshots=tuple(s for s in self.snapshots if s not in gone)))
        for snapshot in gone:
            self._abandon(snapshot.folder)

    def _abandon(self, folder: str) -> None:
        move_aside(inside(self.path, folder), inside(self.path, "abandoned", *Path(folder).parts[1:]))

    @classmethod
    def merge(cls, stores: Sequence[str | Path | SnapshotStore], path: str | Path) -> Self:
        """Join the snapshots of several runs into one ensemble; the files are linked where the file system allows.

        Args:
            stores: stores of the same data, model and projection, its seed among them.
            path: a new directory.

        Returns:
            The ensemble. Its snapshots are named ``run<i>/<key>``.

        Raises:
            StoreMismatchError: if data, parameters, projection or shards differ, or the directory is not empty.
            ValueError: if no store is given.
        """
        check_instance("merge", "stores", stores, (list, tuple), "a list of stores, or of their directories")
        sources = [store if isinstance(store, SnapshotStore) else cls.open(store) for store in stores]
        merged = cls(check_path("merge", "path", path), Manifest.joined([(s.path, s.manifest) for s in sources]))
        if names_in(merged.path):
            raise StoreMismatchError(f"{path} already holds a store, or something else. Use another directory.")
        files = [(s.path / n.folder, regular_files(s.path, n.folder)) for s in sources for n in s.manifest.usable]
        with WriterLock(merged.path):
            for (folder, own), snapshot in zip(files, merged.snapshots, strict=True):
                link_files(own, folder, merged.path / snapshot.folder)
            merged._save(merged.manifest)
        return merged
