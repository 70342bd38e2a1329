"""The snapshots of a store: the manifest, the weights, and what the optimizer knew; see :mod:`lightning_attr.store`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from typing_extensions import Self

from lightning_attr.arguments.checks import check_instance, check_path
from lightning_attr.errors import AttributionError, CorruptedStoreError, StoreMismatchError
from lightning_attr.files.io import digest, file_state, link_file, link_files, move_aside, read_tensors, write_tensors
from lightning_attr.files.paths import check_key, inside, regular_files
from lightning_attr.files.writer_lock import WriterLock, one_writer
from lightning_attr.parameters.optimizer_state import OptimizerState
from lightning_attr.store.manifest import Fingerprint, Manifest, Snapshot, Stopped
from lightning_attr.store.unfinished import clear_unfinished

MANIFEST, OPTIMIZER = "manifest.json", "optimizer.safetensors"
WEIGHTS, FROZEN = "weights.safetensors", "frozen.safetensors"
BASIS = "basis.safetensors"


class SnapshotStore:
    """A directory with the snapshots of a run.

    Args:
        path: the directory.
        manifest: its manifest. Use :meth:`open`.
        writer: whether this process writes the manifest; of several processes that share a store, one does.

    Example:
        >>> import tempfile, torch
        >>> folder = tempfile.TemporaryDirectory()
        >>> store = SnapshotStore(folder.name, Manifest(Fingerprint(3, None, {"w": (2,)}, None), 512, None))
        >>> _ = store.add_snapshot("epoch=0", {"w": torch.ones(2)}, epoch=0, global_step=2, learning_rate=0.1)
        >>> SnapshotStore.open(folder.name).weights("epoch=0")
        {'w': tensor([1., 1.])}
        >>> folder.cleanup()
    """

    def __init__(self, path: str | Path, manifest: Manifest, writer: bool = True) -> None:
        self.path = Path(path).absolute()  # a run may change its working directory
        self.manifest = manifest
        self.writer = writer
        self._state = file_state(self.path / MANIFEST)

    @classmethod
    def open(cls, path: str | Path, writer: bool = True) -> Self:
        """Open a store.

        Args:
            path: its directory.
            writer: as in the constructor.

        Returns:
            The store.
        """
        place = check_path(f"{cls.__name__}.open", "path", path)
        return cls(place, Manifest.read(place.absolute() / MANIFEST), writer)

    def reload(self) -> None:
        """Read the manifest again, to see what another process entered.

        Raises:
            StoreMismatchError: if the store was deleted, or is another one by now.
        """
        self.check_there()
        state, manifest = file_state(self.path / MANIFEST), Manifest.read(self.path / MANIFEST)
        if manifest.id != self.manifest.id:
            raise StoreMismatchError(
                f"{self.path} holds another store than the one that was opened here: it was deleted and made anew. "
                "Open it again, or use another directory."
            )
        self.manifest, self._state = manifest, state

    def refresh(self) -> None:
        """Read the manifest again if it is not as this object left it."""
        if self._state is not None and self._state != file_state(self.path / MANIFEST):
            self.reload()

    def check_there(self) -> None:
        """See that the store is still there.

        Raises:
            StoreMismatchError: if it was deleted.
        """
        if self._state is not None and file_state(self.path / MANIFEST) is None:
            raise StoreMismatchError(
                f"{self.path} was deleted while it was in use: its {MANIFEST} is gone, and what was recorded. Let "
                "nothing clean that directory up, or choose another one."
            )

    @staticmethod
    def exists(path: str | Path) -> bool:
        """Whether a directory holds a store.

        Args:
            path: a directory, which need not exist.

        Returns:
            True if its manifest is there.
        """
        return (Path(path) / MANIFEST).exists()

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
        found = next((snapshot for snapshot in self.snapshots if snapshot.key == key), None)
        if found is None:
            raise KeyError(f"{self.path} has no snapshot {key!r}; it has {[known.key for known in self.snapshots]}.")
        return found

    def check(self, fingerprint: Fingerprint) -> None:
        """Refuse another data set, model or projection than the store's; adopt the projection if it has none yet.

        Args:
            fingerprint: what is at hand.
        """
        self.fingerprint.check(fingerprint, str(self.path))
        if self.fingerprint.projector is None and fingerprint.projector is not None:
            self._adopt_projector(fingerprint.projector)

    @one_writer
    def _adopt_projector(self, config: Mapping[str, Any]) -> None:
        self._save(replace(self.manifest, fingerprint=replace(self.fingerprint, projector=config)))

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

    def weights(self, key: str) -> dict[str, Tensor]:
        """Read the weights of a snapshot.

        Args:
            key: its name.

        Returns:
            Parameter or buffer name -> tensor.

        Raises:
            CorruptedStoreError: if they are missing or damaged.
        """
        snapshot = self.snapshot(key)
        place = {name: value for name, value in self.place(key, "weights").items() if name != "weights"}
        if snapshot.frozen is None:
            return self._tensors(key, WEIGHTS, snapshot.weights, place)
        shared = {"kind": "frozen", "store": place["store"]}
        frozen = self._tensors(key, FROZEN, snapshot.frozen, shared)
        tensors = {**frozen, **self._tensors(key, WEIGHTS, None, place)}
        if digest(tensors) != snapshot.weights:
            raise CorruptedStoreError(f"{self.path / snapshot.folder} is damaged: {WEIGHTS} is not this snapshot's.")
        return tensors

    def place(self, key: str, kind: str) -> dict[str, str]:
        """Say what a file of a snapshot is, for its header: of which store and snapshot, with which weights.

        Args:
            key: the snapshot.
            kind: of file.

        Returns:
            Name -> value, the same in a store that this one was merged into.
        """
        snapshot = self.snapshot(key)
        store = snapshot.origin or self.manifest.id
        return {"kind": kind, "store": store, "snapshot": snapshot.projection, "weights": snapshot.weights}

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

    def optimizer_state(self, key: str) -> OptimizerState:
        """Read what the optimizer knew at a snapshot.

        Args:
            key: its name.

        Returns:
            The state.

        Raises:
            AttributionError: if it was not recorded.
            CorruptedStoreError: if it is missing, damaged, or makes no sense.
        """
        content = self.snapshot(key).optimizer
        if content is None:
            raise AttributionError(
                f"The snapshot {key!r} in {self.path} has no optimizer state, which this method needs. Fit with "
                "AttributionCallback(optimizer_state=True), or with the method itself as the callback's `method`."
            )
        tensors = self._tensors(key, OPTIMIZER, content, self.place(key, "optimizer"))
        try:
            return OptimizerState.from_tensors(tensors)
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise CorruptedStoreError(
                f"{self.path / self.snapshot(key).folder / OPTIMIZER} holds no state of an optimizer ({error}). "
                f"{self._remedy(key)}"
            ) from error

    def basis(self, key: str) -> dict[str, Tensor] | None:
        """Read what the projection of a snapshot has learned.

        Args:
            key: the snapshot.

        Returns:
            As :attr:`lightning_attr.projectors.LearnedProjection.basis` gives it; None if there is none yet.

        Raises:
            CorruptedStoreError: if it is missing or damaged.
        """
        content = self.snapshot(key).basis
        return None if content is None else self._tensors(key, BASIS, content, self.place(key, "basis"))

    @one_writer
    def add_basis(self, key: str, basis: Mapping[str, Tensor]) -> None:
        """Keep what the projection of a snapshot has learned, before any feature is computed with it.

        Args:
            key: the snapshot.
            basis: as :meth:`basis` gives it.
        """
        file = inside(self.path, self.snapshot(key).folder, BASIS)
        self._enter(key, basis=write_tensors(file, basis, self.place(key, "basis")))

    def _enter(self, key: str, **changes: Any) -> None:
        """Record which files a snapshot has."""
        snapshots = tuple(replace(s, **changes) if s.key == key else s for s in self.snapshots)
        self._save(replace(self.manifest, snapshots=snapshots))

    def _tensors(self, key: str, file: str, content: str | None, place: Mapping[str, str]) -> dict[str, Tensor]:
        return read_tensors(inside(self.path, self.snapshot(key).folder, file), content, self._remedy(key), place=place)

    def _remedy(self, key: str) -> str:
        return f"Call `FeatureStore.open({str(self.path)!r}).set_aside([{key!r}])` to go on without this snapshot."

    @one_writer
    def mark_stopped(self, stopped: Stopped | None) -> None:
        """Note that the recording ended before the run did, or that it goes on after all.

        Args:
            stopped: when and why; None to go on.
        """
        if self.manifest.stopped != stopped:
            self._save(replace(self.manifest, stopped=stopped))

    @one_writer
    def mark_trained_on(self, rows: str | None) -> None:
        """Note which rows training can draw.

        Args:
            rows: as :func:`lightning_attr.data.exposure.to_bitmap` writes it; None where none are known to be left out.
        """
        if self.manifest.trained_on != rows:
            self._save(replace(self.manifest, trained_on=rows))

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
        if merged.path.exists() and any(merged.path.iterdir()):
            raise StoreMismatchError(f"{path} already holds a store, or something else. Use another directory.")
        files = [(s.path / n.folder, regular_files(s.path, n.folder)) for s in sources for n in s.manifest.usable]
        with WriterLock(merged.path):
            for (folder, own), snapshot in zip(files, merged.snapshots, strict=True):
                link_files(own, folder, merged.path / snapshot.folder)
            merged._save(merged.manifest)
        return merged

    def _save(self, manifest: Manifest) -> None:
        if self.writer:
            manifest.write(inside(self.path, MANIFEST))
            self._state = file_state(self.path / MANIFEST)
        self.manifest = manifest
