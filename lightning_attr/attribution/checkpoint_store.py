"""A store made of checkpoint files: snapshots, and the features of the training set at each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L

from lightning_attr.arguments.checks import check_flag, check_path
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

    Args:
        ckpt_path: the path of a file that a Trainer wrote, a URL that fsspec reads, or a list of these; "best" and
            "last" are those of ``trainer``.
        model: the module of the run, with any weights.
        datamodule: gives the training data.
        dirpath: directory of the store; made if it is not there.
        train_dataloaders: the training loader, in place of the datamodule's.
        method: whose projection the features have; TRAK by default. A method without features has only snapshots.
        trainer: for device and precision; by default one on one device.
        feature_dtype: how features are stored: "float16" with a scale for each shard, "bfloat16" or "float32". A
            float64 module's stay float64.
        memory_budget: bytes that the tensors of a featurized batch may take; by default half of what is free.
        optimizer_state: keep the optimizer's moments; they are kept in any case if the method needs them.
        mode: that the module is attributed in, "eval" or "train"; see :func:`lightning_attr.attribute`.

    Returns:
        The store.

    Raises:
        TypeError: if an argument is of another class than its own.
        ValueError: if there is no checkpoint in ``ckpt_path``, or no training data.
        FileNotFoundError: if a file is not there.
        CorruptedStoreError: if a file is damaged.
        StoreMismatchError: if a checkpoint is of another module, or the store that is there of other checkpoints.
        AttributionError: if a file is of a sharded strategy or no checkpoint, or the module cannot be attributed.

    Example:
        >>> import tempfile, torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> class Regression(L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(2, 1)
        ...     def training_step(self, batch, batch_idx):
        ...         return (self.layer(batch[0]) - batch[1]).square().mean()
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        >>> trainer = L.Trainer(max_epochs=1, **quiet)
        >>> loader = DataLoader(TensorDataset(torch.randn(8, 2), torch.randn(8, 1)), batch_size=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trainer.fit(Regression(), loader)
        ...     trainer.save_checkpoint(f"{folder}/run.ckpt")
        ...     store = FeatureStore.from_checkpoints(
        ...         f"{folder}/run.ckpt", Regression(), train_dataloaders=loader, dirpath=f"{folder}/store")
        ...     [snapshot.key for snapshot in store.snapshots], store.missing(store.snapshots[0].key)
        (['epoch=0001-step=000002'], [])
    """
    owner = "FeatureStore.from_checkpoints"
    check_feature_dtype(feature_dtype, owner)
    folder = check_path(owner, "dirpath", dirpath)
    moments = check_flag(owner, "optimizer_state", optimizer_state)
    runner = own(L.Trainer, model)(**_QUIET) if trainer is None else trainer
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
