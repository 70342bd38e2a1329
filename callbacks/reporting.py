"""What is told of each snapshot while a run trains: its self-influence, to loggers and to whoever listens."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]  # re-exported
from torch import Tensor

from lightning_attr.callbacks.featurizing import self_influence_at
from lightning_attr.callbacks.guard import describe
from lightning_attr.callbacks.run_store import RunStore
from lightning_attr.callbacks.statistics import self_influence_statistics
from lightning_attr.store.manifest import Snapshot

SnapshotListener = Callable[[L.Trainer, L.LightningModule, Snapshot, Tensor], None]


class SelfInfluenceReport:
    """Tells of self-influence; where it fails, recording goes on without it.

    Args:
        run: the store of the run.
        log: whether its statistics go to the Trainer's loggers.
    """

    def __init__(self, run: RunStore, log: bool) -> None:
        self.run = run
        self.log = log
        self.listeners: list[SnapshotListener] = []
        self.latest: Tensor | None = None
        self.layers: Mapping[str, slice] | None = None  # of the features that it was computed from
        self._ended = False

    def begin(self, forget: bool) -> None:
        """Begin a fit; the first report of a run has no snapshot before."""
        self._ended = False
        if forget:
            self.latest = None

    def wanted(self, trainer: L.Trainer) -> bool:
        """Whether something reads features while training."""
        return bool(self.listeners) or (self.log and bool(trainer.loggers))

    def __call__(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        snapshot: Snapshot,
        layers: Mapping[str, slice] | None,
    ) -> None:
        """Tell of a snapshot that has features, in the first process."""
        if self._ended or not self.wanted(trainer):
            return
        with self.run.guard.training(self._end):
            previous, found = self.latest, self.run.found
            self.layers = layers
            self.latest = self_influence_at(self.run.store, snapshot, found.method, layers)
            if self.log:
                metrics = self_influence_statistics(self.latest, previous, found.noise_mask)
                for logger in trainer.loggers:
                    logger.log_metrics(metrics, step=trainer.global_step)
            for listener in self.listeners:
                listener(trainer, pl_module, snapshot, self.latest)

    def _end(self, error: Exception) -> None:
        """A logger that fails is no reason to stop recording."""
        self._ended = True
        rank_zero_warn(f"AttributionCallback: logging of self-influence ended, recording goes on: {describe(error)}")
