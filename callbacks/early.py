"""Snapshots within the first epoch, in which a model learns most of what its later scores rest on."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import lightning as L
from typing_extensions import override

from lightning_attr.callbacks.run_store import RunStore
from lightning_attr.callbacks.schedule import SnapshotSchedule


class EarlySnapshots(RunStore):
    """Takes snapshots after single steps of the first epoch, where the schedule has some.

    A step is over by then, its gradients and the learning rate's own step as well, so that training goes on as if
    nothing had been.

    Args:
        on_error: as in :class:`RunStore`.
    """

    schedule: SnapshotSchedule

    def _record(self, trainer: L.Trainer, pl_module: L.LightningModule, epoch: int) -> None:
        raise NotImplementedError  # what a snapshot is, its subclass knows

    @override
    def on_train_batch_start(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Remember which step this is: with several optimizers a batch takes several."""
        self._before = trainer.global_step

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any) -> None:
        """Take a snapshot after some steps of the first epoch; the last step's is that of the epoch."""
        if self.stopped is not None or trainer.current_epoch > 0 or trainer.is_last_batch:
            return
        if self.schedule.due_between(self._before, trainer.global_step):
            with self._guard.training(partial(self._stand_down, trainer, 0)):
                self._record(trainer, pl_module, 0)
                self._recorded = replace(self._recorded, epoch=-1)  # the epoch has still to come to its end
