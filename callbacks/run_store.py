"""The store of a run in training, as the callback keeps it: locked, resumed from checkpoints, given up on failure."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]  # re-exported
from torch import Tensor
from typing_extensions import override

from lightning_attr.callbacks.divergence import check_weights
from lightning_attr.callbacks.drawing import note_drawable_rows
from lightning_attr.callbacks.guard import Guard, describe
from lightning_attr.callbacks.recording import Recording, give_up, stopped_warning
from lightning_attr.data.changes import changed_data
from lightning_attr.data.loader import DataSource
from lightning_attr.features.transfer import set_up_at
from lightning_attr.files.io import digest
from lightning_attr.files.writer_lock import WriterLock
from lightning_attr.methods import AttributionMethod
from lightning_attr.objectives.objective import describe_output
from lightning_attr.parameters.learning_rates import LearningRates
from lightning_attr.parameters.trainable import parameter_shapes
from lightning_attr.parameters.weights import weights_of
from lightning_attr.pilots import run_settings
from lightning_attr.pilots.beginning import sizes_of_weights
from lightning_attr.store.feature_store import FeatureStore
from lightning_attr.store.manifest import Fingerprint, Stopped
from lightning_attr.user_code.lightning_names import AnyCallback


class RunStore(AnyCallback):
    """What :class:`AttributionCallback` knows of its run and of the store on disk, whatever it records.

    Args:
        on_error: as there.
    """

    dirpath: Path | None
    store: FeatureStore
    source: DataSource
    feature_dtype: str
    self_influence: Tensor | None
    method: AttributionMethod
    featurize: bool
    _mode: str

    def __init__(self, on_error: str) -> None:
        super().__init__()
        self._guard = Guard(on_error)
        self._path: Path | None = None
        self._lock: WriterLock | None = None
        self._spare: list[Tensor] = []  # memory of shards, from one snapshot to the next
        self._basis_bytes = 0  # of what a projection learns at a snapshot
        self._forget()

    def _forget(self) -> None:
        self._rates = LearningRates()
        self._failures: list[Exception] = []
        self._before = 0  # steps taken before the batch at hand
        self._training = False  # whether this fit is recorded, up to its very end
        self._recorded = Recording()
        self._incomplete: str | None = None
        self._set_up_at: str | None = None  # the snapshot that the module is set up for
        self.stopped: Stopped | None = None
        self.self_influence = None

    @property
    def store_path(self) -> Path | None:
        """Directory of the feature store; None before the run that makes it, unless ``dirpath`` was given."""
        return self.dirpath or self._path

    def _set_up(self, trainer: L.Trainer, pl_module: L.LightningModule, stream: str) -> None:
        if self._set_up_at != stream:  # once for learning and for features
            set_up_at(stream, trainer, pl_module, getattr(trainer, "datamodule", None), self.source)
            self._set_up_at = stream

    def _fingerprint(self, pl_module: L.LightningModule) -> Fingerprint:
        """What is attributed, and how; after the module has been looked at."""
        return Fingerprint(
            len(self.source),
            self.source.digest(),
            parameter_shapes(pl_module),
            self.method.projector_config if self.featurize else None,
            describe_output(pl_module),
            self._mode,
        )

    def _begin(self, trainer: L.Trainer, pl_module: L.LightningModule, path: Path, fingerprint: Fingerprint) -> None:
        if not trainer.is_global_zero:
            return
        self._let_go()
        self._lock = WriterLock(path)
        self._recorded.begin(
            path,
            fingerprint,
            batch_size=self.source.batch_size,
            started=digest(weights_of(pl_module)) if trainer.global_step == 0 else None,
            feature_dtype=self.feature_dtype,
        )
        store = FeatureStore.open(path)
        note_drawable_rows(trainer, pl_module, self.source, store)
        began = {"began": sizes_of_weights(pl_module)} if trainer.global_step == 0 else {}
        store.mark_training({**run_settings(trainer, self.source.loader), **began})

    def _check_unchanged(self, trainer: L.Trainer, pl_module: L.LightningModule, epoch: int, data: bool = True) -> None:
        """See that weights are finite; read some of the data and say so if they are others than at the start."""
        check_weights(pl_module, self.source, epoch)
        if not data:
            return
        changed = changed_data(self.source, self.store.fingerprint.data, trainer.train_dataloader)
        if changed is not None:
            rank_zero_warn(changed)

    def _beat(self) -> None:
        """Show to other machines that this run lives, every so many seconds."""
        if self._lock is not None and self.stopped is None and not self._failures:
            with self._guard.training(self._failures.append):
                self._lock.beat()

    def _let_go(self) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            with self._guard.training(lambda error: rank_zero_warn(f"AttributionCallback: {describe(error)}")):
                lock.release()

    @override
    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Give a sign of life in long validations, too."""
        self._beat()

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Let others write the store."""
        self._let_go()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let others write the store."""
        if stage == "fit":
            self._let_go()

    def _close_store(self, trainer: L.Trainer) -> None:
        if trainer.is_global_zero:
            give_up(self.store, self._recorded.ahead(self.store))

    def _stand_down(self, trainer: L.Trainer, epoch: int, error: Exception) -> None:
        """Recording is over, in all processes; the training goes on."""
        self._spare.clear()
        self.stopped = Stopped(epoch, trainer.global_step, describe(error), self._incomplete)
        if trainer.is_global_zero:
            rank_zero_warn(stopped_warning(self.store, self.stopped))

    # Resuming ---------------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: where the store is, its last snapshot, and the learning rates integrated since."""
        path = str(self._path) if self._path else None
        rates = {"rates": dict(self._rates.sums), "learning_rate": self._rates.common}
        return {"path": path, **rates, "recorded": astuple(self._recorded)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was written."""
        self._path = Path(state_dict["path"]) if state_dict["path"] is not None else None
        # Checkpoints of earlier versions have one sum for all parameters.
        self._rates = LearningRates(state_dict.get("rates"), state_dict.get("learning_rate", 0.0))
        self._recorded = Recording(*state_dict["recorded"])
