"""The store of a run in training: locked, continued from checkpoints, given up where recording fails."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import (  # type: ignore[attr-defined]  # re-exported with its logger set up
    rank_zero_info,
    rank_zero_warn,
)
from torch import Tensor
from torch.optim import Optimizer

from lightning_attr.callbacks.divergence import check_weights
from lightning_attr.callbacks.drawing import note_drawable_rows
from lightning_attr.callbacks.guard import Guard, describe
from lightning_attr.callbacks.preparation import Preparation
from lightning_attr.callbacks.recording import FINAL, Recording, give_up, stopped_warning
from lightning_attr.data.changes import changed_data
from lightning_attr.files.io import digest
from lightning_attr.files.writer_lock import WriterLock
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.parameters.learning_rates import LearningRates
from lightning_attr.parameters.optimizer_settings import optimizer_settings
from lightning_attr.parameters.trainable import trainable_names
from lightning_attr.parameters.weights import weights_of
from lightning_attr.pilots import run_settings
from lightning_attr.pilots.beginning import sizes_of_weights
from lightning_attr.replay.recorded_run import resting_layers
from lightning_attr.store.feature_store import FeatureStore
from lightning_attr.store.manifest import Fingerprint, Snapshot, Stopped


class RunStore:
    """The store on disk, and how far the run has come in it.

    Args:
        guard: keeps errors away from the training.
    """

    store: FeatureStore
    found: Preparation

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.buffer_pool: list[Tensor] = []  # memory of shards, from one snapshot to the next
        self._lock: WriterLock | None = None
        self.forget()

    def forget(self) -> None:
        """Begin a run of its own, whatever was recorded before."""
        self.path: Path | None = None
        self.rates = LearningRates()
        self.recorded = Recording()
        self.stopped: Stopped | None = None
        self.incomplete: str | None = None
        """Key of the snapshot that is being recorded."""
        self._failures: list[Exception] = []
        """Errors between two snapshots, told at the next one, where all processes listen."""

    def open(self, trainer: L.Trainer, pl_module: L.LightningModule, path: Path, found: Preparation) -> None:
        """Make the store, or continue that of this run; one process writes its manifest."""
        self.found, self.path = found, trainer.strategy.broadcast(path)
        fingerprint = self.guard.together(partial(found.fingerprint, pl_module))
        self.guard.together(partial(self._begin, trainer, pl_module, self.path, fingerprint))
        self.store = self.guard.together(partial(FeatureStore.open, self.path, writer=trainer.is_global_zero))
        self.guard.together(partial(self.store.check, fingerprint))

    def _begin(self, trainer: L.Trainer, pl_module: L.LightningModule, path: Path, fingerprint: Fingerprint) -> None:
        if not trainer.is_global_zero:
            return
        self.let_go()
        self._lock = WriterLock(path)
        source = self.found.source
        self.recorded.begin(
            path,
            fingerprint,
            batch_size=source.batch_size,
            started=digest(weights_of(pl_module)) if trainer.global_step == 0 else None,
            feature_dtype=self.found.request.feature_dtype,
        )
        store = FeatureStore.open(path)
        note_drawable_rows(trainer, pl_module, source, store)
        began = {"began": sizes_of_weights(pl_module)} if trainer.global_step == 0 else {}
        optimizers = {"optimizers": optimizer_settings(trainer.optimizers, pl_module)}
        resting = {"resting": resting_layers(pl_module)}
        store.mark_training({**run_settings(trainer, source.loader), **optimizers, **resting, **began})

    def step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Integrate the learning rates of a step."""
        self.beat()
        with self.guard.training(self._failures.append):
            self.rates.add(optimizer, pl_module, trainer.global_step)

    def check(self, trainer: L.Trainer, pl_module: L.LightningModule, epoch: int, data: bool = True) -> None:
        """See that weights are finite; read some of the data and say so if they are others than at the start."""
        if self._failures:
            raise self._failures.pop()
        check_weights(pl_module, self.found.source, epoch)
        changed = (
            changed_data(self.found.source, self.store.fingerprint.data, trainer.train_dataloader) if data else None
        )
        if changed is not None:
            rank_zero_warn(changed)

    def add(self, trainer: L.Trainer, pl_module: L.LightningModule, epoch: int, key: str) -> None:
        """Write a snapshot of the weights."""
        mean, rates = self.rates.of(ParameterLayout.of(pl_module))
        self.recorded.add(
            self.store,
            key,
            weights_of(pl_module),
            epoch=epoch,
            global_step=trainer.global_step,
            learning_rate=mean,
            rates=rates,
            **self._beside_weights(trainer, pl_module),
        )

    def added(self, trainer: L.Trainer, epoch: int, key: str) -> Snapshot:
        """Go on from a snapshot that is complete, in every process."""
        snapshot = self.store.snapshot(key)
        self.incomplete = None
        self.recorded = Recording(epoch, trainer.global_step, snapshot.weights)
        self.rates.clear()
        return snapshot

    def finish(self, trainer: L.Trainer, pl_module: L.LightningModule, epoch: int) -> None:
        """Write what the run ends with, if something changed it; the strategy has taken it off the device."""
        self.check(trainer, pl_module, epoch)
        if not trainer.is_global_zero:
            return
        beside, weights = self._beside_weights(trainer, pl_module), weights_of(pl_module)
        if self.recorded.finish(self.store, weights, epoch=epoch, **beside):
            rank_zero_info(
                f"The weights after `fit` are not those of the last epoch (averaged, or put back). {self.store.path} "
                f"has them as the snapshot {FINAL!r}; `trainer.attribute` computes its features."
            )

    def _beside_weights(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Mapping[str, Any]:
        state = self.found.request.state(trainer, pl_module)
        return {"optimizer": None if state is None else state.tensors(), "trainable": trainable_names(pl_module)}

    def close(self, trainer: L.Trainer) -> None:
        """Set aside what an earlier run recorded beyond the end of this one."""
        if trainer.is_global_zero:
            give_up(self.store, self.recorded.ahead(self.store))

    def stand_down(self, trainer: L.Trainer, epoch: int, error: Exception) -> None:
        """Recording is over, in all processes; the training goes on."""
        self.buffer_pool.clear()
        self.stopped = Stopped(epoch, trainer.global_step, describe(error), self.incomplete)
        if trainer.is_global_zero:
            rank_zero_warn(stopped_warning(self.store, self.stopped))

    def beat(self) -> None:
        """Show to other machines that this run lives, every so many seconds."""
        if self._lock is not None and self.stopped is None and not self._failures:
            with self.guard.training(self._failures.append):
                self._lock.beat()

    def let_go(self) -> None:
        """Let others write the store."""
        lock, self._lock = self._lock, None
        if lock is not None:
            with self.guard.training(lambda error: rank_zero_warn(f"AttributionCallback: {describe(error)}")):
                lock.release()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: where the store is, its last snapshot, and the learning rates integrated since."""
        path = str(self.path) if self.path else None
        rates = {"rates": dict(self.rates.sums), "learning_rate": self.rates.common}
        return {"path": path, **rates, "recorded": astuple(self.recorded)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where the checkpoint was written."""
        self.path = Path(state_dict["path"]) if state_dict["path"] is not None else None
        # Checkpoints of earlier versions have one sum for all parameters.
        self.rates = LearningRates(state_dict.get("rates"), state_dict.get("learning_rate", 0.0))
        self.recorded = Recording(*state_dict["recorded"])
