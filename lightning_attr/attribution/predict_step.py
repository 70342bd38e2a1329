"""The predict step that attributes: it featurizes what the store misses and the targets, then scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_attr.attribution.access import open_store, ready_store, take, usable_snapshots
from lightning_attr.attribution.ensemble import Ensemble, parts_of
from lightning_attr.attribution.jobs import Jobs, WorkDivision
from lightning_attr.attribution.processes import Processes
from lightning_attr.attribution.provenance import provenance_of
from lightning_attr.attribution.request import AttributionRequest
from lightning_attr.attribution.scoring import score
from lightning_attr.attribution.training_rows import TrainingRows
from lightning_attr.data.exposure import from_bitmap, masked
from lightning_attr.data.loader import DataSource, OrderedLoader
from lightning_attr.data.sources import named_targets
from lightning_attr.features.featurizer import AttributionPlan, Featurizer, apart_plan
from lightning_attr.features.learned_projection import learn_projection, settle_projection
from lightning_attr.features.second_direction import directions_of, settle_directions, training_featurizer
from lightning_attr.features.snapshot_model import Replay, SnapshotModel
from lightning_attr.features.transfer import placed, samples_on_device, set_up_at
from lightning_attr.files.paths import inside
from lightning_attr.files.writer_lock import WriterLock
from lightning_attr.methods import SnapshotFeatures
from lightning_attr.objectives.target_function import MeasuredOutput
from lightning_attr.parameters.trainable import set_trainable
from lightning_attr.parameters.weights import load_weights
from lightning_attr.randomness.draws import Samples
from lightning_attr.results.result import AttributionResult
from lightning_attr.store.manifest import Snapshot
from lightning_attr.store.shard_writer import RowTable, ShardWriter
from lightning_attr.user_code.calls import set_surroundings
from lightning_attr.user_code.step_world import StepWorld
from lightning_attr.verification.feature_check import check_features
from lightning_attr.verification.gradient_paths import Plans
from lightning_attr.verification.probe import look_at
from lightning_attr.verification.recorded_losses import check_recorded_losses
from lightning_attr.verification.target_check import check_target_function


class AttributionStep(nn.Module):
    """Stands in for the user's module during one predict run; all processes of the strategy run it.

    Made by :func:`lightning_attr.user_code.lightning_names.as_lightning_module` it is a ``LightningModule`` of the
    trainer's own package.

    Args:
        request: what is to be done.
        folder: for a store that is thrown away, and for a result that has to travel between processes.
    """

    trainer: L.Trainer

    def __init__(self, request: AttributionRequest, folder: Path) -> None:
        super().__init__()
        self.request = request
        self.module = request.module
        self.datamodule = request.datamodule
        self.method = request.method
        self.train_data = request.train
        self.target_data = request.targets
        self.scratch = request.store is None
        self.store_path = (request.store or folder / "store").absolute()  # what is run may change the working directory
        self.folder = folder / "result"
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.processes = Processes(0, 1, torch.device("cpu"))  # until the strategy is set up
        self.result: AttributionResult | None = None
        self.writer: ShardWriter | None = None
        self.lock: WriterLock | None = None
        self.spare: list[Tensor] = []
        self.world: StepWorld | None = None  # of the user's trainer, before it was lent

    # What is to be done --------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Open the store, or make one of the current weights; the process group is up by now."""
        strategy = self.trainer.strategy
        self.store_path, self.folder = strategy.broadcast((self.store_path, self.folder))
        self.processes = Processes(self.trainer.global_rank, self.trainer.world_size, strategy.root_device)
        only_read: str | None = None
        with self.processes.together():
            if self.trainer.is_global_zero:
                self.lock, only_read = take(self.store_path)
                if only_read is None:
                    ready_store(
                        self.store_path,
                        self.request.fingerprint,
                        self.module,
                        batch_size=self.train_data.batch_size,
                        feature_dtype="float32" if self.scratch else "float16",  # the same in memory and on disk
                        epoch=max(0, self.trainer.current_epoch - 1),
                        global_step=self.trainer.global_step,
                        checkpoints=self.request.checkpoints,
                    )
        self.only_read: str | None = strategy.broadcast(only_read)
        with self.processes.together():
            self.store = open_store(self.store_path, self.trainer.is_global_zero, self.only_read)
            self.store.check(self.request.fingerprint)
            usable = usable_snapshots(self.store, self.only_read, self.method.projector is not None)
            pilots = 0 if self.request.pilots is None else self.request.pilots.count
            self.parts = parts_of(usable, pilots, self.method.select)
            self.used = [snapshot for part in self.parts for snapshot in part.snapshots]
            self.tables = {snapshot.key: RowTable(len(self.target_rows)) for snapshot in self.used}
        n, (rank, count) = len(self.train_data), self.share
        self.work = WorkDivision(self.store, n, rank, count, by_shards=self.method.projector is not None)
        self.training_rows = TrainingRows(self.work, self.processes, self.scratch, len(self.used))

    @property
    def share(self) -> tuple[int, int]:
        """Number of this process, and how many there are."""
        return self.processes.rank, self.processes.count

    @property
    def target_rows(self) -> range:
        """Rows of the target data set."""
        return range(len(self.target_data or self.train_data))

    def predict_dataloader(self) -> Jobs:
        """List this process's share of the work, snapshot after snapshot: missing training rows, then targets."""
        rank, world = self.share
        jobs = []
        for snapshot in self.used:
            blocks = [self.store.rows(shard) for shard in self.store.missing(snapshot.key)[rank::world]]
            if self.method.projector is None:  # only the values beside the features are wanted, for the result
                # A process without rows reads one that is another's, for the form of the values.
                blocks = (self.work.blocks or [range(1)]) if snapshot is self.used[-1] else []
            batches = [batch for block in blocks for batch in self.train_data.batches(block)]
            jobs.append((snapshot.key, True, OrderedLoader(self.train_data, batches)))
            source = self.target_data or self.train_data
            batches = source.batches(self.work.targets(self.target_rows))
            jobs.append((snapshot.key, False, OrderedLoader(source, batches)))
        return Jobs(jobs, self._before_reading)

    # The run ------------------------------------------------------------------------------------------------------

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Leave the batch alone: its hooks run in :meth:`transfer_batch_to_device`."""
        return batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move the user's batch by the user's hooks; key and rows stay."""
        key, train, rows, inner = batch
        source = self.train_data if train else self.target_data or self.train_data
        return key, train, rows, placed(inner, rows, self.module, self.datamodule, device, source)

    def on_predict_start(self) -> None:
        """Begin with no snapshot loaded."""
        self.plans = Plans(self.trainer, self.module, self.datamodule, self.train_data, self.request.mode)
        self.layers: dict[str, Mapping[str, slice] | None] = {}
        self.looked = self.checked = False
        self.current: str | None = None

    def predict_step(self, batch: Any, batch_idx: int) -> int:
        """Featurize a batch at its snapshot."""
        key, train, rows, inner = batch
        if key != self.current:
            self._load(key)
        featurizer = self.featurizer if train else self.target_featurizer
        assert self.writer is not None  # of this snapshot
        table = self.training_rows.tables.get(key, self.writer) if train else self.tables[key]
        room = table.room(rows, featurizer.projection.dim, featurizer.dtype)
        with named_targets(self.train_data, None if train else self.target_data):
            columns = featurizer(inner, rows, room)
            if train and not self.checked:
                check_features(featurizer, inner, rows, columns["features"])
                self.checked = True
            table.add(rows, columns)
        return len(rows)

    def close(self, *failure: Any) -> None:
        """Wait for the training features that are on their way to the disk."""
        if self.writer is not None:
            self.writer.__exit__(*failure or (None, None, None))

    def _before_reading(self, key: str) -> None:
        """Look at module and data at their first snapshot: how samples are read depends on what is found."""
        self.close()  # no thread of ours runs while a loader forks its workers
        if self.looked:
            return
        self._restore(key)
        self.plans.current()  # a module fresh from its constructor may behave like no trained one
        if self.target_data is not None:
            self.target_data.form.apart |= self.train_data.form.apart
            look_at(self.trainer, self.module, self.datamodule, self.target_data)
        self.looked = True

    def _load(self, key: str) -> None:
        self.close()
        self._restore(key)
        # Checked at a snapshot: a module fresh from its constructor may behave like no trained one.
        layout, plan = self.plans.current()
        stream = self.store.snapshot(key).projection
        self._set_up(stream)
        projection = self.method.projection_at(layout, stream, partial(self.store.optimizer_state, key))
        samples, precision = self._samples(self.train_data), self.trainer.precision_plugin.forward_context
        learn = partial(learn_projection, projection, self.store, key, self.module, plan, samples, precision)
        settle_directions(self.store, key, self.module, self.method.second_directions, self.processes.together)
        with self.processes.together():  # what the next snapshot has is decided by all from the same record
            settle_projection(projection, self.store, key, learn, self.processes.together)
        memory, target_plan = self.request.memory, self._target_plan(plan)
        self.featurizer = training_featurizer(self.store, key, self.module, plan, projection, memory)
        check_recorded_losses(self.featurizer, self.store, key, samples, precision, self.train_data.form, self.world)
        of_targets = (target_plan, self.method.bind_targets(projection), memory, stream, self.first_target)
        self.target_featurizer = Featurizer(self.module, *of_targets)
        if self.request.target_function is not None and self.current is None:
            targets = self._samples(self.target_data or self.train_data)
            check_target_function(target_plan.attributed, self.module, targets, stream, precision, target_plan.seeded)
        self.writer = ShardWriter(self.store, key, self.spare)
        self.training_rows.begin(key, projection.dim)
        self.layers[key] = projection.layers
        self.checked, self.current = False, key

    def _restore(self, key: str) -> None:
        """Put the module back to a snapshot: its weights, which of them were trained, and the world of its fit."""
        load_weights(self.module, self.store.weights(key))
        snapshot = self.store.snapshot(key)
        set_trainable(self.module, snapshot.trainable)
        if self.world is not None:
            set_surroundings(self.module, self.world.at(snapshot.epoch, snapshot.global_step))

    def _target_plan(self, plan: AttributionPlan) -> AttributionPlan:
        if self.request.target_function is not None:
            plan = replace(plan, attributed=MeasuredOutput(self.request.target_function))
        return apart_plan(plan) if (self.target_data or self.train_data).form.apart else plan

    def _set_up(self, stream: str) -> None:
        set_up_at(stream, self.trainer, self.module, self.datamodule, self.train_data)

    def on_predict_end(self) -> None:
        """Score, once every process has featurized its share."""
        with self.processes.together():
            self.close()
        with self.processes.together():
            if self.store.writer:
                for snapshot in self.used:
                    self.store.adopt(snapshot.key)
        with self.processes.together():
            if self.only_read is None:
                self.store.reload()
            self.result = self._score()
            if self.trainer.is_global_zero and self.trainer.strategy.launcher is not None:
                self.result.save(self.folder)
        if self.lock is not None:
            self.lock.release()

    def end(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        """Leave the run, for an ``ExitStack``: where it failed here, the other processes hear of it."""
        self.close(kind, error, traceback)
        if self.lock is not None:
            self.lock.release()
        if isinstance(error, Exception):
            self.processes.tell(error)

    def _score(self) -> AttributionResult:
        own = self.work.rows
        train = Replay(lambda: self._samples(self.train_data).batches(own))
        snapshots = [self._features(snapshot, train) for snapshot in self.used]
        n = len(self.train_data)
        ensemble = Ensemble(self.method, [(part.share, len(part.snapshots)) for part in self.parts])
        slopes = snapshots[-1].targets["out_to_loss"].float().cpu()
        scores, self_influence = score(
            ensemble, snapshots, n, self.request.topk, lambda: self.folder, self.share, self.trained_on, slopes
        )
        loss, labels = self.training_rows.loss_and_labels(self.used[-1].key)
        provenance = provenance_of(
            self.method,
            self.used,
            snapshots,
            train_data=self.request.fingerprint.data,
            target_probe=self._target_digest,
            mode=self.plans.mode,
            stopped=self.store.manifest.stopped,
            topk=self.request.topk,
            target_function=self.request.target_function,
            parts=dict(zip((part.name for part in self.parts), ensemble.weights, strict=True)),
        )
        return AttributionResult(
            replace(scores, provenance=provenance),
            self_influence,
            loss=loss.float(),
            labels=labels,
            noise_mask=self.request.noise_mask,
            trained_on=self.trained_on,
        )

    @cached_property
    def trained_on(self) -> Tensor | None:
        """Which rows the recorded run could draw."""
        rows = self.store.manifest.trained_on
        return None if rows is None else from_bitmap(rows, len(self.train_data))

    @cached_property
    def first_target(self) -> int:
        """What random draws add to the rows of targets: nothing where they are the training samples themselves."""
        same = self.target_data is None or (
            self.request.fingerprint.data is not None and self._target_digest == self.request.fingerprint.data
        )
        return 0 if same else len(self.train_data)

    @cached_property
    def _target_digest(self) -> str | None:
        return self.target_data.digest() if self.target_data is not None else self.request.fingerprint.data

    def _features(self, snapshot: Snapshot, train: Replay) -> SnapshotFeatures:
        rank, world = self.share
        return SnapshotFeatures(
            blocks=lambda: masked(self.training_rows.blocks(snapshot.key), self.trained_on),
            targets=self.processes.joined(self.tables[snapshot.key].columns, self.target_rows[rank::world]),
            learning_rate=snapshot.learning_rate,
            reduce=self.processes.sum,
            target_rows=self.target_rows,
            model=self._model(snapshot, train) if self.method.projector is None else None,
            layers=self.layers[snapshot.key],
            rates=snapshot.rates,
            n_drawn=0 if self.trained_on is None else int(self.trained_on.sum()),
            n_train=len(self.train_data),
            key=snapshot.key,
            **directions_of(self.store, snapshot.key, self.module),
        )

    def _model(self, snapshot: Snapshot, train: Replay) -> SnapshotModel:
        set_trainable(self.module, snapshot.trainable)
        plan = self.plans.current()[1]  # known: every snapshot went through `_load`
        source = self.target_data or self.train_data

        def load() -> None:
            self._restore(snapshot.key)
            self._set_up(snapshot.projection)

        return SnapshotModel(
            self.module,
            plan,
            snapshot.projection,
            len(self.train_data),
            load=load,
            train_batches=train,
            target_batches=self._samples(source).batches,
            target_plan=self._target_plan(plan),
            precision=self.trainer.precision_plugin.forward_context,
            memory=self.request.memory,
            reduce=self.processes.sum,
            folder=inside(self.store.path, snapshot.folder, "computed"),
            place=self.store.place(snapshot.key, "computed"),
            writer=self.trainer.is_global_zero,
            train_digest=self.request.fingerprint.data,
            target_digest=self._target_digest,
            first_target=self.first_target,
        )

    def _samples(self, source: DataSource) -> Samples:
        return samples_on_device(self.trainer, self.module, self.datamodule, source)
