"""Takes the snapshots of one fit, with the features of the training set at each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]  # re-exported
from torch import Tensor

from lightning_attr.callbacks.beside import beside_training
from lightning_attr.callbacks.featurizing import featurize, learn
from lightning_attr.callbacks.first_losses import note_first_losses
from lightning_attr.callbacks.guard import describe
from lightning_attr.callbacks.run_store import RunStore
from lightning_attr.features.learned_projection import load_projection
from lightning_attr.features.second_direction import note_directions, training_featurizer
from lightning_attr.features.transfer import set_up_at
from lightning_attr.projectors import LearnedProjection
from lightning_attr.store.manifest import Snapshot
from lightning_attr.store.shard_writer import ShardWriter

SnapshotReport = Callable[[L.Trainer, L.LightningModule, Snapshot, Mapping[str, slice] | None], None]
"""Called in the first process with a snapshot that has features, and which of them are of which layer."""


class SnapshotRecorder:
    """Records the snapshots of one fit into the store of its run.

    Args:
        run: the store, open.
        report: what is told of each snapshot with features, beside the training.
    """

    def __init__(self, run: RunStore, report: SnapshotReport) -> None:
        self.run = run
        self.found = run.found
        self.report = report
        self._layers = self.found.layers
        self._stored: str | None = None
        """Key of the snapshot that is being featurized."""
        self._set_up_for: str | None = None
        """The snapshot that the module is set up for."""

    def record(self, trainer: L.Trainer, pl_module: L.LightningModule, epoch: int) -> None:
        """Take a snapshot after an epoch, -1 for the start, and featurize; nothing if no step was taken since."""
        run, found = self.run, self.found
        if trainer.global_step == run.recorded.global_step:
            return
        key = "start" if epoch < 0 else f"epoch={epoch:04d}-step={trainer.global_step:06d}"
        run.incomplete, self._stored, self._set_up_for = key, None, None
        together, source = run.guard.together, found.source
        beside = partial(beside_training, trainer, pl_module, source, found.mode, max(0, epoch), self._recorded_weights)
        with ExitStack() as stack:
            together(lambda: stack.enter_context(beside()))
            together(partial(self._snapshot, trainer, pl_module, epoch, key))
            self._stored = key
            if not found.featurize and trainer.is_global_zero:
                with run.guard.training(_without_losses):
                    note_first_losses(trainer, pl_module, source, found.plans.known(), run.store, key)
            if found.featurize:
                together(partial(self._featurize, trainer, pl_module, key))
                together(partial(self._adopt, trainer, key))
            together(run.store.reload)
            snapshot = run.added(trainer, epoch, key)
            if found.featurize and trainer.is_global_zero:
                self.report(trainer, pl_module, snapshot, self._layers)
            together(stack.close)

    def _snapshot(self, trainer: L.Trainer, pl_module: L.LightningModule, epoch: int, key: str) -> None:
        self.run.check(trainer, pl_module, epoch, data=self.found.featurize)
        if trainer.is_global_zero:
            self.run.add(trainer, pl_module, epoch, key)
            if self.found.featurize:
                self._learn(trainer, pl_module, key)
            self._adopt(trainer, key)  # what a killed run computed of it

    def _learn(self, trainer: L.Trainer, pl_module: L.LightningModule, key: str) -> None:
        store, method = self.run.store, self.found.method
        note_directions(store, key, pl_module, method.second_directions)
        stream = store.snapshot(key).projection
        layout, plan = self.found.plans.current()
        projection = method.bind(layout, stream)
        if isinstance(projection, LearnedProjection):
            self._set_up(trainer, pl_module, stream)
            learn(trainer, pl_module, self.found.source, projection, plan, store, key)

    def _adopt(self, trainer: L.Trainer, key: str) -> None:
        """Enter what all processes have written."""
        if trainer.is_global_zero:
            self.run.store.adopt(key)

    def _featurize(self, trainer: L.Trainer, pl_module: L.LightningModule, key: str) -> None:
        store, source = self.run.store, self.found.source
        store.reload()  # another process has written the snapshot
        stream = store.snapshot(key).projection
        layout, plan = self.found.plans.current()
        projection = self.found.method.projection_at(layout, stream, partial(store.optimizer_state, key))
        load_projection(projection, store, key)
        self._layers = projection.layers
        shards = store.missing(key)[trainer.global_rank :: trainer.world_size]
        batches = [batch for shard in shards for batch in source.batches(store.rows(shard))]
        if batches:
            self._set_up(trainer, pl_module, stream)
            featurizer = training_featurizer(store, key, pl_module, plan, projection, self.found.memory)
            writer = ShardWriter(store, key, self.run.buffer_pool)
            featurize(trainer, pl_module, source, batches, featurizer, writer)

    def _set_up(self, trainer: L.Trainer, pl_module: L.LightningModule, stream: str) -> None:
        if self._set_up_for != stream:  # once for learning and for features
            set_up_at(stream, trainer, pl_module, getattr(trainer, "datamodule", None), self.found.source)
            self._set_up_for = stream

    def _recorded_weights(self) -> Mapping[str, Tensor]:
        """The weights that training is at, once their snapshot has been taken."""
        return {} if self._stored is None else self.run.store.weights(self._stored)


def _without_losses(error: Exception) -> None:
    rank_zero_warn(f"AttributionCallback: losses of a snapshot were not noted, recording goes on: {describe(error)}")
