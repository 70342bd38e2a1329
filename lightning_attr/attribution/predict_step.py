"""The predict step that attributes: it featurizes what the store misses and the targets, then has them scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_attr.attribution.access import leave, open_store, ready_store, take, usable_snapshots
from lightning_attr.attribution.assembly import Assembly
from lightning_attr.attribution.ensemble import parts_of
from lightning_attr.attribution.featurized_rows import FeaturizedRows
from lightning_attr.attribution.jobs import Jobs, WorkDivision
from lightning_attr.attribution.processes import Processes
from lightning_attr.attribution.request import AttributionRequest
from lightning_attr.attribution.restorer import LoadedSnapshot, Restorer
from lightning_attr.data.sources import named_targets
from lightning_attr.features.transfer import placed
from lightning_attr.features.unsettled import featurize_unsettled
from lightning_attr.files.writer_lock import WriterLock
from lightning_attr.results.result import AttributionResult
from lightning_attr.store.shard_writer import ShardWriter
from lightning_attr.user_code.step_world import StepWorld
from lightning_attr.verification.feature_check import check_features


class AttributionStep(nn.Module):
    """Stands in for the user's module during one predict run; all processes of the strategy run it.

    Made by :func:`lightning_attr.user_code.lightning_names.as_lightning_module` it is a ``LightningModule`` of the
    trainer's own package. :class:`WorkDivision` says what this process does, :class:`Restorer` gives the user's module
    at a snapshot, :class:`Assembly` makes the result.

    Args:
        request: what is to be done.
        folder: for a store that is thrown away, and for a result that has to travel between processes.
        world: of the user's trainer, before it was lent.
    """

    trainer: L.Trainer

    def __init__(self, request: AttributionRequest, folder: Path, world: StepWorld) -> None:
        super().__init__()
        self.request = request
        self.module = request.module
        self.world = world
        self.store_path = (request.store or folder / "store").absolute()  # what is run may change the working directory
        self.folder = folder / "result"
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.processes = Processes(0, 1, torch.device("cpu"))  # until the strategy is set up
        self.result: AttributionResult | None = None
        self.at: LoadedSnapshot | None = None
        self.writer: ShardWriter | None = None
        self.lock: WriterLock | None = None
        self.checked = False  # the features of the first training batch of a snapshot are
        self.buffer_pool: list[Tensor] = []

    def configure_model(self) -> None:
        """Leave the user's module as it is: it is configured, and strategies that divide modules ask for this."""

    def setup(self, stage: str) -> None:
        """Open the store, or make one of the current weights; the process group is up by now."""
        strategy = self.trainer.strategy
        self.store_path, self.folder = strategy.broadcast((self.store_path, self.folder))
        self.processes = Processes(self.trainer.global_rank, self.trainer.world_size, strategy.root_device)
        scratch, only_read = self.request.store is None, None
        with self.processes.together():
            if self.trainer.is_global_zero:
                self.lock, only_read = take(self.store_path)
                if only_read is None:
                    ready_store(
                        self.store_path,
                        self.request.fingerprint,
                        self.module,
                        batch_size=self.request.train.batch_size,
                        feature_dtype=self.request.feature_dtype,
                        epoch=max(0, self.trainer.current_epoch - 1),
                        global_step=self.trainer.global_step,
                        checkpoints=self.request.checkpoints,
                    )
        self.only_read: str | None = strategy.broadcast(only_read)
        with self.processes.together():
            self.work = self._divided()
        self.rows = FeaturizedRows(self.work, self.processes, scratch)

    def _divided(self) -> WorkDivision:
        request, featurizes = self.request, self.request.method.projector is not None
        store = open_store(self.store_path, self.trainer.is_global_zero, self.only_read)
        store.check(request.fingerprint)
        usable = usable_snapshots(store, self.only_read, featurizes)
        parts = parts_of(usable, 0 if request.pilots is None else request.pilots.count, request.method.select)
        processes = self.processes.rank, self.processes.world_size
        return WorkDivision(store, parts, request.train, request.target_source, *processes, featurizes)

    def predict_dataloader(self) -> Jobs:
        """List this process's part of the work."""
        return self.work.jobs(self._before_reading)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Leave the batch alone: its hooks run in :meth:`transfer_batch_to_device`."""
        return batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move the user's batch by the user's hooks; key and rows stay."""
        key, train, rows, inner = batch
        source = self.work.train if train else self.work.targets
        return key, train, rows, placed(inner, rows, self.module, self.request.datamodule, device, source)

    def on_predict_start(self) -> None:
        """Begin with no snapshot loaded."""
        self.restorer = Restorer(self.request, self.work.store, self.trainer, self.processes, self.world)

    def predict_step(self, batch: Any, batch_idx: int) -> int:
        """Featurize a batch at its snapshot."""
        key, train, rows, inner = batch
        if self.at is None or self.at.key != key:
            self.at, self.writer = self.begin_snapshot(key)
        assert self.writer is not None  # of this snapshot
        featurizer = self.at.featurizer if train else self.at.target_featurizer
        table = self.rows.table(key, train, self.writer)
        out = table.output_buffer(rows, featurizer.projection.dim, featurizer.dtype)
        with named_targets(self.request.train, None if train else self.request.targets):
            columns, settle = featurize_unsettled(featurizer, inner, rows, out)
            if train and not self.checked:
                check_features(featurizer, inner, rows, columns["features"])
                self.checked = True
            table.add(rows, columns, settle)
        return len(rows)

    def begin_snapshot(self, key: str) -> tuple[LoadedSnapshot, ShardWriter]:
        """Go to another snapshot: its weights are the module's from here on."""
        self.close()
        at = self.restorer.load(key)
        self.rows.begin(key, at.featurizer.projection.dim, at.layers)
        self.checked = False
        return at, ShardWriter(self.work.store, key, self.buffer_pool)

    def _before_reading(self, key: str) -> None:
        self.close()  # no thread of ours runs while a loader forks its workers
        self.restorer.look(key)

    def on_predict_end(self) -> None:
        """Score, once every process has featurized its part."""
        self._enter()
        with self.processes.together():
            self.result = Assembly(self.rows, self.restorer, self.folder).result()
            if self.trainer.is_global_zero and self.trainer.strategy.launcher is not None:
                self.result.save(self.folder)
        if self.lock is not None:
            self.lock.release()

    def _enter(self) -> None:
        """Enter what all processes have written, once all have come here."""
        store = self.work.store
        with self.processes.together():
            self.close()
        with self.processes.together():
            if store.writer:
                for snapshot in self.work.snapshots:
                    store.adopt(snapshot.key)
        with self.processes.together():
            if self.only_read is None:
                store.reload()

    def close(self, *failure: Any) -> None:
        """Wait for the training features that are on their way to the disk."""
        if self.writer is not None:
            self.writer.__exit__(*failure or (None, None, None))

    def end(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        """Leave the run, for an ``ExitStack``: where it failed here, the other processes hear of it."""
        self.close(kind, error, traceback)
        if self.lock is not None:
            leave(self.lock, self.store_path)
        if isinstance(error, Exception):
            self.processes.tell(error)
