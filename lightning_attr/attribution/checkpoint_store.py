"""A store made of checkpoint files: snapshots, and the features of the training set at each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L

from lightning_attr.arguments.checks import check_flag, check_path
from lightning_attr.attribution.division import whole_module
from lightning_attr.attribution.jobs import Jobs
from lightning_attr.attribution.predict_step import AttributionStep
from lightning_attr.attribution.request import resolve
from lightning_attr.attribution.run import predicted, processes_of
from lightning_attr.data.loader import OrderedLoader
from lightning_attr.errors import StoreInUseError, StoreMismatchError
from lightning_attr.methods import AttributionMethod
from lightning_attr.store.feature_dtype import check_feature_dtype
from lightning_attr.store.feature_store import FeatureStore
from lightning_attr.user_code.lightning_names import own

_QUIET: dict[str, Any] = {"accelerator": "auto", "devices": 1}
_QUIET |= dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)


def from_checkpoints(
    ckpt_path: str | Path | Sequence[str | Path],
    model: L.LightningModule,
    datamodule: L.LightningDataModule | None = None,
    *,
    dirpath: str | Path,
    train_dataloaders: Any = None,
    method: AttributionMethod | None = None,
    trainer: L.Trainer | None = None,
    feature_dtype: str = "float16",
    memory_budget: int | None = None,
    optimizer_state: bool = False,
    mode: str | None = None,
) -> FeatureStore:
    """Make a store of the checkpoints of a run that never saw the callback, as the callback would have written it.

    ``trainer.attribute(..., store=dirpath)`` scores by it, as often as wanted and without the checkpoints. Each file is
    one snapshot; learning rates and moments come from the optimizer states in them. The module's own weights, the data
    and random streams stay as they are. Where it was killed, the same call goes on.
    """
    owner = "FeatureStore.from_checkpoints"
    check_feature_dtype(feature_dtype, owner)
    folder = check_path(owner, "dirpath", dirpath)
    moments = check_flag(owner, "optimizer_state", optimizer_state)
    runner = own(L.Trainer, model)(**_QUIET) if trainer is None else trainer
    with whole_module(runner, model):
        with processes_of(runner).together():
            request = resolve(
                runner,
                datamodule,
                model=model,
                train_dataloaders=train_dataloaders,
                target_dataloaders=None,
                targets="train",
                method=method,
                store=folder,
                ckpt_path=ckpt_path,
                noise_mask=None,
                topk=None,
                memory_budget=memory_budget,
                target_function=None,
                mode=mode,
                pilots=None,
                owner=owner,
            )
        assert request.checkpoints is not None  # of the `ckpt_path`
        checkpoints = replace(request.checkpoints, moments=moments or request.checkpoints.moments)
        request = replace(request, checkpoints=checkpoints, feature_dtype=feature_dtype)
        with predicted(runner, request, FeaturizeStep):
            return FeatureStore.open(folder)


class FeaturizeStep(AttributionStep):
    """Featurizes what the store misses, and scores nothing."""

    def setup(self, stage: str) -> None:
        """Open or make the store, which this process has to be able to write."""
        super().setup(stage)
        with self.processes.together():
            if self.only_read is not None:
                raise StoreInUseError(self.only_read)
            stored, asked = self.work.store.manifest.feature_dtype, self.request.feature_dtype
            if stored != asked:
                raise StoreMismatchError(
                    f"{self.store_path} keeps features in {stored}, but here `feature_dtype` is {asked!r}. Pass "
                    f"feature_dtype={stored!r} to go on, or choose another `dirpath`; nothing in it was changed."
                )

    def predict_dataloader(self) -> Jobs:
        """List the training rows of this process; where it has none, one row, so that it takes part."""
        jobs = super().predict_dataloader()
        jobs.jobs = [job for job in jobs.jobs if job[1]] if self.work.featurizes else []
        if not len(jobs):
            jobs.jobs = [(self.work.snapshots[-1].key, False, OrderedLoader(self.work.train, [[0]]))]
        return jobs

    def predict_step(self, batch: Any, batch_idx: int) -> int:
        """Featurize a batch of training rows."""
        return super().predict_step(batch, batch_idx) if batch[1] else 0

    def on_predict_end(self) -> None:
        """Enter what all processes have written."""
        self._enter()
        if self.lock is not None:
            self.lock.release()
