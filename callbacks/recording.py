"""The store of a run in training: begun or continued, and rid of the snapshots of a course that training left."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import (  # type: ignore[attr-defined]  # re-exported with its logger set up
    rank_zero_info,
    rank_zero_warn,
)
from torch import Tensor, nn

from lightning_attr.errors import AttributionError, StoreMismatchError
from lightning_attr.files.io import digest
from lightning_attr.parameters.weights import weights_of
from lightning_attr.store.feature_store import FeatureStore
from lightning_attr.store.manifest import Fingerprint, Snapshot, Stopped

FINAL = "final"
"""Key of the snapshot of the weights that a run ends with, where those are not the last epoch's."""


@dataclass(frozen=True)
class Recording:
    """How far a run has recorded itself, and what that means for the store that it finds.

    One process uses it, the one that writes the manifest.

    Args:
        epoch: of the last snapshot; -1 before the first.
        global_step: of the last snapshot.
        weights: digest of the last snapshot's weights.

    Example:
        >>> import tempfile, torch
        >>> fingerprint = Fingerprint(3, None, {"w": (2,)}, None)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     begun = {"batch_size": 1, "started": "ab", "feature_dtype": "float16"}
        ...     Recording().begin(Path(folder), fingerprint, **begun)
        ...     store = FeatureStore.open(folder)
        ...     Recording().add(store, "epoch=0", {"w": torch.ones(2)}, epoch=0, global_step=1, learning_rate=0.1)
        ...     [snapshot.key for snapshot in Recording().ahead(store)]
        ['epoch=0']
    """

    epoch: int = -1
    global_step: int = -1
    weights: str = ""

    def begin(
        self,
        path: Path,
        fingerprint: Fingerprint,
        *,
        batch_size: int,
        started: str | None,
        feature_dtype: str,
    ) -> None:
        """Make the store, or see to it that the one that is there is of this run."""
        if FeatureStore.exists(path):
            store = FeatureStore.open(path)
            self.check(store, fingerprint, started, feature_dtype)
            store.mark_stopped(None)
        else:
            FeatureStore.create(path, fingerprint, batch_size=batch_size, run=started, feature_dtype=feature_dtype)

    def check(self, store: FeatureStore, fingerprint: Fingerprint, started: str | None, feature_dtype: str) -> None:
        """Refuse a store of another run, or with features in another dtype; it is only read."""
        store.fingerprint.check(fingerprint, str(store.path))
        stored = store.manifest.feature_dtype
        if stored != feature_dtype:
            raise StoreMismatchError(
                f"{store.path} keeps features in {stored}, but here `feature_dtype` is {feature_dtype!r}. Pass "
                f"feature_dtype={stored!r} to go on, or choose another `dirpath`; nothing in it was changed."
            )
        self._check_run(store, started)

    def _check_run(self, store: FeatureStore, started: str | None) -> None:
        """See that a store is of this run; its snapshots are compared one by one when training comes to them."""
        remedy = (
            "Choose another `dirpath` (one for each run; FeatureStore.merge joins them), or delete this one; nothing "
            "in it was changed."
        )
        if started is not None:
            if store.manifest.run not in {None, started}:
                raise StoreMismatchError(
                    f"{store.path} holds another training run: it started from other weights. To run the same one "
                    f"again, seed it. {remedy}"
                )
        elif self.weights and all(snapshot.weights != self.weights for snapshot in store.snapshots):
            raise StoreMismatchError(
                f"{store.path} holds another training run: the snapshot of step {self.global_step}, after which this "
                f"checkpoint was written, is not in it. {remedy}"
            )

    def ahead(self, store: FeatureStore) -> list[Snapshot]:
        """List the snapshots of an earlier run through here that this one has not come to.

        Returns those after the last recorded one; pilots are no part of the run.
        """
        return [s for s in store.snapshots if s.pilot is None and s.global_step > self.global_step]

    def add(
        self,
        store: FeatureStore,
        key: str,
        weights: Mapping[str, Tensor],
        *,
        epoch: int,
        global_step: int,
        learning_rate: float,
        optimizer: Mapping[str, Tensor] | None = None,
        trainable: tuple[str, ...] | None = None,
        rates: Mapping[str, float] | None = None,
    ) -> None:
        """Store the next snapshot, unless an earlier run through here did; see :meth:`FeatureStore.add_snapshot`."""
        if not FeatureStore.exists(store.path):
            raise AttributionError(f"{store.path} is gone: something moved or deleted it while the run was recorded.")
        ahead = self.ahead(store)
        for expected in ahead[:1]:
            same = expected.key == key and expected.trainable == trainable
            same = same and (expected.learning_rate, expected.rates) == (learning_rate, rates)
            same = same and (optimizer is None or expected.optimizer == digest(optimizer))
            if same and expected.weights == digest(weights):
                return  # this run again, after it was killed
        give_up(store, [*ahead, *(end for end in store.snapshots if end.key == FINAL and end not in ahead)])
        store.add_snapshot(
            key,
            weights,
            epoch=epoch,
            global_step=global_step,
            learning_rate=learning_rate,
            optimizer=optimizer,
            trainable=trainable,
            rates=rates,
        )

    def finish(
        self,
        store: FeatureStore,
        weights: Mapping[str, Tensor],
        *,
        epoch: int,
        optimizer: Mapping[str, Tensor] | None = None,
        trainable: tuple[str, ...] | None = None,
    ) -> bool:
        """Store the weights that a run ends with, if something changed them after the last snapshot: averages do.

        Returns whether there is such a snapshot. No optimizer step led to it, so that its learning rate is zero.
        """
        content = digest(weights)
        before = [snapshot for snapshot in store.snapshots if snapshot.key == FINAL]
        if content != self.weights and [snapshot.weights for snapshot in before] == [content]:
            return True  # this run again
        give_up(store, before)
        if content == self.weights:
            return False
        store.add_snapshot(
            FINAL,
            weights,
            epoch=epoch,
            global_step=self.global_step,
            learning_rate=0.0,
            optimizer=optimizer,
            trainable=trainable,
        )
        return True


def give_up(store: FeatureStore, gone: Sequence[Snapshot]) -> None:
    """Set snapshots aside: here the run takes a course of its own."""
    if gone:
        rank_zero_warn(
            f"{store.path} is written anew from step {gone[0].global_step} on; moved "
            f"{', '.join(snapshot.key for snapshot in gone)} to {store.path / 'abandoned'}."
        )
        store.set_aside(snapshot.key for snapshot in gone)


def snapshot_bytes(module: nn.Module, optimizer_state: bool) -> int:
    """Count what a snapshot keeps beside features."""
    moments = sum(p.nbytes for p in module.parameters() if p.requires_grad) if optimizer_state else 0
    return sum(tensor.nbytes for tensor in weights_of(module).values()) + 2 * moments


def announce(store: FeatureStore, *, bytes_a_row: int, weight_bytes: int, snapshots: int | None) -> None:
    """Say what will be written, before anything is."""
    rows = store.fingerprint.length
    total = (rows * bytes_a_row + weight_bytes) * (snapshots or 1)
    free = shutil.disk_usage(store.path).free
    what = f"features of {rows:,} training samples" if bytes_a_row else "weights"
    rank_zero_info(
        f"Attribution keeps the {what} at {f'{snapshots} snapshots, together' if snapshots else 'each snapshot,'} "
        f"about {total / 1e6:,.2f} MB, in {store.path} ({free / 1e9:,.1f} GB free)."
    )
    if total > free:
        rank_zero_warn(
            f"The attribution store needs about {total / 1e9:,.1f} GB, but only {free / 1e9:,.1f} GB are free in "
            f"{store.path}. Use fewer `snapshots` or a smaller `proj_dim`."
        )


def stopped_warning(store: FeatureStore, stopped: Stopped) -> str:
    """Say that recording is over while training goes on, and why."""
    if not FeatureStore.exists(store.path):
        kept = f"{store.path} is gone, and with it the snapshots before."
    else:
        try:
            store.mark_stopped(stopped)
            note = ""
        except AttributionError as error:  # the same disk, for instance; the note is not worth a training
            note = f" The store could not be told: {error}"
        keys = [snapshot.key for snapshot in store.manifest.snapshots if snapshot.key != stopped.incomplete]
        named = f"{len(keys)} complete snapshot{'s' * (len(keys) > 1)} ({', '.join(keys[:1] + keys[1:][-1:])})"
        kept = f"{store.path} has {named if keys else 'no complete snapshot'}.{note}"
    return (
        f"AttributionCallback: {stopped} Training goes on, unchanged. {kept} `trainer.attribute` works with what is "
        'there; AttributionCallback(on_error="raise") ends the training instead, with the traceback.'
    )
