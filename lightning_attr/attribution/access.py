"""How an attribution uses a store: it adds what is missing, or only reads, where another process writes or none may."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from torch import nn

from lightning_attr.attribution.checkpoint_snapshots import CheckpointSnapshots
from lightning_attr.errors import AttributionError, IncompleteFeaturesError
from lightning_attr.files.writer_lock import WriterLock
from lightning_attr.parameters.trainable import trainable_names
from lightning_attr.parameters.weights import weights_of
from lightning_attr.store.directory import MANIFEST
from lightning_attr.store.feature_store import FeatureStore
from lightning_attr.store.manifest import Fingerprint, Snapshot

log = logging.getLogger(__name__)


def take(path: Path) -> tuple[WriterLock | None, str | None]:
    """Take the right to write a store, if it is to be had.

    Returns the right, or None and why the store can only be read.
    """
    try:
        return WriterLock(path, patience=False), None
    except AttributionError as error:
        if not FeatureStore.exists(path):
            raise
        return None, str(error)


def leave(lock: WriterLock, path: Path) -> None:
    """Give the right to write back; of a store that never came about no folder stays, either."""
    lock.release()
    if not FeatureStore.exists(path):
        for folder in (path / "claims", path):
            with suppress(OSError):  # something else is in it
                folder.rmdir()


def ready_store(
    path: Path,
    fingerprint: Fingerprint,
    module: nn.Module,
    *,
    batch_size: int,
    feature_dtype: str,
    epoch: int,
    global_step: int,
    checkpoints: CheckpointSnapshots | None = None,
) -> None:
    """Make a store of a module's current weights where there is none; else enter what a killed run left."""
    new = not FeatureStore.exists(path)
    if new:
        FeatureStore.create(path, fingerprint, batch_size=batch_size, feature_dtype=feature_dtype)
    store = FeatureStore.open(path)
    if checkpoints is not None:
        try:
            checkpoints.enter(store)
        except BaseException:
            if new:  # of checkpoints that cannot be used nothing stays
                _undo(path)
            raise
    elif not store.snapshots:
        # Nothing was recorded while these weights were trained, and so no learning rate either.
        store.add_snapshot(
            "current",
            weights_of(module),
            epoch=epoch,
            global_step=global_step,
            learning_rate=0.0,
            trainable=trainable_names(module),
        )
    for snapshot in store.snapshots:
        store.adopt(snapshot.key)


def _undo(path: Path) -> None:
    (path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path / "snapshots", ignore_errors=True)


def open_store(path: Path, writer: bool, only_read: str | None) -> FeatureStore:
    """Open a store as one of the processes of an attribution.

    Returns the store; what is complete but not on record counts, in this process's memory, where nothing can be
    written.
    """
    store = FeatureStore.open(path, writer and only_read is None)
    if only_read is not None:
        for snapshot in store.snapshots:
            store.adopt(snapshot.key)
    return store


def usable_snapshots(store: FeatureStore, only_read: str | None, featurized: bool) -> Sequence[Snapshot]:
    """List the snapshots that can be attributed at.

    Returns all that are usable; where features are needed and none can be added, those that are complete.
    """
    snapshots = store.manifest.usable
    if only_read is None or not featurized:
        return snapshots
    complete = [snapshot for snapshot in snapshots if not store.missing(snapshot.key)]
    if not complete:
        raise IncompleteFeaturesError(
            f"No snapshot of {store.path} has the features of all training rows, and none can be added: {only_read}"
        )
    if len(complete) < len(snapshots):
        left = ", ".join(snapshot.key for snapshot in snapshots if snapshot not in complete)
        log.warning("Scores are without %s: features are missing there, and none can be added. %s", left, only_read)
    return complete
