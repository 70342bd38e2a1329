"""The directory of a store, its manifest, and what is noted there without a file of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from typing_extensions import Self

from lightning_attr.arguments.checks import check_path
from lightning_attr.errors import StoreMismatchError
from lightning_attr.files.io import file_state
from lightning_attr.files.paths import inside, is_there
from lightning_attr.files.writer_lock import one_writer
from lightning_attr.journal.journal import Journal
from lightning_attr.store.manifest import Fingerprint, Manifest, Snapshot, Stopped

MANIFEST = "manifest.json"


class StoreDirectory:
    """A directory with a manifest: opened, read again when another process has written it, and written.

    Args:
        path: the directory.
        manifest: its manifest. Use :meth:`open`.
        writer: whether this process writes the manifest; of several processes that share a store, one does.
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

        Raises:
            CorruptedStoreError: if the directory cannot be looked into.
        """
        return is_there(Path(path) / MANIFEST)

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

    def journal(self) -> Journal | None:
        """Open the journal of the run.

        Returns:
            The journal; None where none was kept, as in a store that was merged.

        Raises:
            CorruptedStoreError: if it is damaged, or of another run.
        """
        return Journal.open(self.path, self.manifest.id)

    def _enter(self, key: str, **changes: Any) -> None:
        """Record which files a snapshot has."""
        snapshots = tuple(replace(s, **changes) if s.key == key else s for s in self.snapshots)
        self._save(replace(self.manifest, snapshots=snapshots))

    def _save(self, manifest: Manifest) -> None:
        if self.writer:
            manifest.write(inside(self.path, MANIFEST))
            self._state = file_state(self.path / MANIFEST)
        self.manifest = manifest


class StoreNotes(StoreDirectory):
    """What the manifest of a store says of its run and its snapshots, beside their files."""

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
    def mark_training(self, settings: Mapping[str, Any]) -> None:
        """Note how the run is trained, so that pilots can be trained like it.

        Args:
            settings: as :func:`lightning_attr.pilots.run_settings` gives them. What they do not name stays.
        """
        settings = {**(self.manifest.training or {}), **settings}
        if self.manifest.training != settings:
            self._save(replace(self.manifest, training=dict(settings)))

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
