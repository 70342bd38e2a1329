"""The assembly: from the features of all snapshots to scores, and from scores to a result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_attr.attribution.device_limits import named_float64
from lightning_attr.attribution.ensemble import Ensemble
from lightning_attr.attribution.exposure import exposure_of
from lightning_attr.attribution.featurized_rows import FeaturizedRows
from lightning_attr.attribution.provenance import provenance_of
from lightning_attr.attribution.recorded_run import recorded_run
from lightning_attr.attribution.restorer import Restorer
from lightning_attr.attribution.scoring import score
from lightning_attr.data.exposure import from_bitmap, masked
from lightning_attr.features.second_direction import directions_of
from lightning_attr.features.snapshot_model import Replay, SnapshotModel
from lightning_attr.files.paths import inside
from lightning_attr.methods import SnapshotFeatures
from lightning_attr.parameters.trainable import set_trainable
from lightning_attr.results.result import AttributionResult
from lightning_attr.store.manifest import Snapshot


class Assembly:
    """Scores what the processes have featurized.

    Args:
        rows: what this process has featurized.
        restorer: gives the user's module at any snapshot, for methods that run it.
        folder: for scores too large for memory.
    """

    def __init__(self, rows: FeaturizedRows, restorer: Restorer, folder: Path) -> None:
        self.rows = rows
        self.work = rows.work
        self.restorer = restorer
        self.request = restorer.request
        self.folder = folder

    def result(self) -> AttributionResult:
        """Score every training sample for every target; the same in all processes."""
        work, method, own = self.work, self.request.method, self.work.rows
        train = Replay(lambda: self.restorer.samples(self.request.train).batches(own))
        snapshots = [self._features(snapshot, train) for snapshot in work.snapshots]
        ensemble = Ensemble(method, [(part.share, len(part.snapshots)) for part in work.parts])
        with named_float64(method, self.rows.processes.device):
            scores, self_influence = score(
                ensemble,
                snapshots,
                len(work.train),
                self.request.topk,
                lambda: self.folder,
                (work.rank, work.world_size),
                self.trained_on,
                slopes=snapshots[-1].targets["out_to_loss"].float().cpu(),
                candidates=self.request.candidates,
            )
        loss, labels = self.rows.loss_and_labels(work.snapshots[-1].key)
        return AttributionResult(
            replace(scores, provenance=self._provenance(snapshots, ensemble)),
            self_influence,
            loss=loss.float(),
            labels=labels,
            noise_mask=self.request.noise_mask,
            trained_on=self.trained_on,
            exposure=self.exposure,
        )

    @cached_property
    def exposure(self) -> Tensor | None:
        """How often the recorded run trained on each row."""
        return exposure_of(self.work.store, self.work.snapshots, len(self.work.train))

    @cached_property
    def trained_on(self) -> Tensor | None:
        """Which rows the recorded run has drawn by its journal, or else could draw; None for all."""
        if self.exposure is not None and self.exposure.any():
            drawn = self.exposure > 0
            return None if drawn.all() else drawn
        rows = self.work.store.manifest.trained_on
        return None if rows is None else from_bitmap(rows, len(self.work.train))

    def _provenance(self, snapshots: Sequence[SnapshotFeatures], ensemble: Ensemble) -> dict[str, Any]:
        return provenance_of(
            self.request.method,
            self.work.snapshots,
            snapshots,
            train_data=self.request.fingerprint.data,
            target_probe=self.request.target_digest,
            mode=self.restorer.plans.mode,
            stopped=self.work.store.manifest.stopped,
            topk=self.request.topk,
            target_function=self.request.target_function,
            parts=dict(zip((part.name for part in self.work.parts), ensemble.weights, strict=True)),
        )

    def _features(self, snapshot: Snapshot, train: Replay) -> SnapshotFeatures:
        key, trained_on = snapshot.key, self.trained_on
        return SnapshotFeatures(
            blocks=lambda: masked(self.rows.blocks(key), trained_on),
            targets=self.rows.targets(key),
            learning_rate=snapshot.learning_rate,
            reduce=self.rows.processes.sum,
            target_rows=self.work.target_rows,
            model=self._model(snapshot, train) if self.request.method.projector is None else None,
            layers=self.rows.layers[key],
            rates=snapshot.rates,
            n_drawn=0 if trained_on is None else int(trained_on.sum()),
            n_train=len(self.work.train),
            key=key,
            wanted=None if self.request.candidates is None else self.request.candidates.wanted,
            optimizers=(self.work.store.manifest.training or {}).get("optimizers"),
            optimizer_state=partial(self.work.store.optimizer_state, key),
            **directions_of(self.work.store, key, self.request.module),
        )

    def _model(self, snapshot: Snapshot, train: Replay) -> SnapshotModel:
        set_trainable(self.request.module, snapshot.trainable)
        plan = self.restorer.plans.current()[1]  # known: every snapshot was loaded before
        store = self.work.store

        def load() -> None:
            self.restorer.restore(snapshot.key)
            self.restorer.set_up(snapshot.projection)

        return SnapshotModel(
            self.request.module,
            plan,
            snapshot.projection,
            len(self.work.train),
            load=load,
            train_batches=train,
            target_batches=self.restorer.samples(self.work.targets).batches,
            target_plan=self.restorer.target_plan(plan),
            precision=self.restorer.precision,
            memory=self.request.memory,
            reduce=self.rows.processes.sum,
            folder=inside(store.path, snapshot.folder, "computed"),
            place=store.place(snapshot.key, "computed"),
            writer=self.restorer.trainer.is_global_zero,
            train_digest=self.request.fingerprint.data,
            target_digest=self.request.target_digest,
            first_target=self.request.first_target,
            run=partial(recorded_run, self.restorer, snapshot),
        )
