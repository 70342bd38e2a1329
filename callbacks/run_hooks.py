"""What every callback that records a run does: it keeps the store's lock, and continues from checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor
from typing_extensions import override

from lightning_attr.callbacks.guard import Guard
from lightning_attr.callbacks.reporting import SelfInfluenceReport, SnapshotListener
from lightning_attr.callbacks.run_store import RunStore
from lightning_attr.store.feature_store import FeatureStore
from lightning_attr.store.manifest import Stopped
from lightning_attr.user_code.lightning_names import AnyCallback


class RunHooks(AnyCallback):
    """Hands on what Lightning says to the store of a run, and what is known of the run to its user.

    Args:
        on_error: as in :class:`lightning_attr.callbacks.AttributionCallback`.
        dirpath: directory of the store.
        log: whether self-influence is logged.
    """

    def __init__(self, on_error: str, dirpath: Path | None, log: bool) -> None:
        super().__init__()
        self._run = RunStore(Guard(on_error))
        self._report = SelfInfluenceReport(self._run, log)
        self.dirpath = dirpath

    @property
    def store_path(self) -> Path | None:
        """Directory of the feature store; None before the run that makes it, unless ``dirpath`` was given."""
        return self.dirpath or self._run.path

    @property
    def store(self) -> FeatureStore:
        """The feature store, from the start of training on."""
        return self._run.store

    @property
    def stopped(self) -> Stopped | None:
        """When and why recording ended before training did."""
        return self._run.stopped

    @property
    def listeners(self) -> list[SnapshotListener]:
        """Called with trainer, module, snapshot and self-influence at each snapshot."""
        return self._report.listeners

    @property
    def layers(self) -> Mapping[str, slice] | None:
        """Columns by layer of the features of :attr:`self_influence`; None where the projection mixes layers."""
        return self._report.layers

    @property
    def self_influence(self) -> Tensor | None:
        """At the last snapshot, ``(n_train,)``, where it is logged or listened to."""
        return self._report.latest

    @override
    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Give a sign of life in long validations, too."""
        self._run.beat()

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Let others write the store."""
        self._run.let_go()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let others write the store."""
        if stage == "fit":
            self._run.let_go()

    @override
    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps; see :meth:`RunStore.state_dict`."""
        return self._run.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was written."""
        self._run.load_state_dict(state_dict)
