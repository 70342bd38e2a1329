"""Records a run while it trains: snapshots at epoch ends, and the features of the training set at each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor
from typing_extensions import override

from lightning_attr.arguments.checks import check_flag, check_int, check_path
from lightning_attr.attribution.arguments import given_mask
from lightning_attr.attribution.division import check_divided_run
from lightning_attr.attribution.strategies import check_strategy
from lightning_attr.attribution.trainer import attribute
from lightning_attr.callbacks.journalled_run import JournalledRun
from lightning_attr.callbacks.preparation import Preparation, RecordingRequest, prepare
from lightning_attr.callbacks.recording import announce, snapshot_bytes
from lightning_attr.callbacks.schedule import SnapshotSchedule, epoch_limit, steps_of_an_epoch
from lightning_attr.callbacks.snapshot_recorder import SnapshotRecorder
from lightning_attr.data.memory import check_memory_budget
from lightning_attr.data.sources import train_source
from lightning_attr.methods import TRAK, AttributionMethod
from lightning_attr.methods.base import check_method
from lightning_attr.objectives.modes import check_mode
from lightning_attr.objectives.objective import check_module
from lightning_attr.parameters.whole import whole_parameters
from lightning_attr.store.feature_dtype import check_feature_dtype


class AttributionCallback(JournalledRun):
    """Makes every prediction of a run traceable to its training samples, and leaves the run itself bit-identical.

    At the end of the epochs of its schedule it stores a snapshot of the weights and featurizes the whole training set
    there, in data set order. Afterwards ``trainer.attribute(datamodule)`` gives the scores.

    Args:
        dirpath: directory of the feature store; by default ``attribution`` in the Trainer's log directory. A store of
            the same run is continued, one of another run is refused.
        method: how to score, and with it the projection of the features; TRAK by default.
        snapshots: "geometric" for the epochs 0, 1, 2, 4, 8, ..., "start+geometric" for the weights that training starts
            from as well, "early+geometric" for the steps 4, 8, 16, ... of the first epoch, too, "all", an integer n for
            every n-th, or a list of epoch indices, with -1 for the start; the last epoch always has one.
        featurize: True computes features at once, False leaves them to ``trainer.attribute``. By default they are
            computed at once, unless ``TRAK()`` found the data small and nothing logs or shows self-influence. A method
            that runs the module instead of reading features has only snapshots.
        noise_mask: ``(n_train,)``, bool: samples known to be mislabelled, for the metrics.
        log: log self-influence statistics at every snapshot to the Trainer's loggers.
        batch_size: samples per batch while featurizing; by default the training loader's, or up to 1,024 where samples
            are small and only stacked.
        feature_dtype: how features are stored: "float16" with a scale for each shard, "bfloat16" or "float32". A
            float64 module's stay float64.
        memory_budget: bytes that the tensors of a featurized batch may take: a larger batch goes through in parts. By
            default half of what is free on the device.
        optimizer_state: keep the optimizer's moments with each snapshot, twice the size of the parameters; they are
            kept in any case if the method needs them.
        on_error: what happens if recording fails once training has begun. "warn" lets the training go on without
            recording: a warning names the cause, and ``trainer.attribute`` works with the snapshots that are complete.
            "raise" ends the training. What can be found before the first step is raised in any case.
        journal: keep a journal of the run in the store: of each optimizer step the samples that it was taken on,
            learning rates, clipping and random states; see :class:`lightning_attr.journal.Journal`. By default it is.
        mode: "eval", or "train" for modules whose loss needs ``self.training``; by default eval mode, unless the loss
            or its gradient depends on the mode; see :func:`lightning_attr.attribution.trainer.attribute`.

    Raises:
        ValueError: if an argument is none of these.

    Example:
        >>> import lightning as L, tempfile, torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from lightning_attr import AttributionMixin
        >>> class Classifier(AttributionMixin, L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(2, 2)
        ...     def forward(self, x):
        ...         return self.layer(x)
        ...     def training_step(self, batch, batch_idx):
        ...         return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> data = TensorDataset(torch.eye(2).repeat(4, 1), torch.tensor([0, 1]).repeat(4))
        >>> folder = tempfile.TemporaryDirectory()
        >>> trainer = L.Trainer(
        ...     max_epochs=3, callbacks=[AttributionCallback(folder.name)], accelerator="cpu", logger=False,
        ...     enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        ... )
        >>> trainer.fit(Classifier(), DataLoader(data, batch_size=4, shuffle=True))
        >>> trainer.attribute(targets="train").scores.shape
        (8, 8)
        >>> folder.cleanup()
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        method: AttributionMethod | None = None,
        snapshots: str | int | Sequence[int] = "geometric",
        featurize: bool | None = None,
        noise_mask: Tensor | Sequence[bool] | None = None,
        log: bool = True,
        batch_size: int | None = None,
        feature_dtype: str = "float16",
        memory_budget: int | None = None,
        optimizer_state: bool = False,
        on_error: str = "warn",
        mode: str | None = None,
        journal: bool | None = None,
    ) -> None:
        check_mode(mode)
        check_feature_dtype(feature_dtype, self)
        if memory_budget is not None:
            memory_budget = check_memory_budget(self, memory_budget)
        if batch_size is not None:
            batch_size = check_int(self, "batch_size", batch_size, minimum=1, also="None")
        place = check_path(self, "dirpath", dirpath, also="None") if dirpath is not None else None
        journalled = journal is None or check_flag(self, "journal", journal)
        super().__init__(on_error, place, check_flag(self, "log", log), journalled)
        self.method = TRAK() if method is None else method
        check_method(self, self.method)
        self.schedule = SnapshotSchedule(snapshots)
        self._asked = self.method, featurize if featurize is None else check_flag(self, "featurize", featurize)
        self.featurize = featurize is not False and self.method.projector is not None
        self.noise_mask = None if noise_mask is None else given_mask(noise_mask, self)
        self.batch_size = batch_size
        self.feature_dtype = feature_dtype
        self.memory_budget = memory_budget
        self.optimizer_state = check_flag(self, "optimizer_state", optimizer_state) or self.method.needs_optimizer_state
        self.mode = mode
        self._recorder: SnapshotRecorder | None = None
        """Of the fit that runs, up to its very end; None where it is not recorded."""
        self._before = 0  # steps taken before the batch at hand

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what cannot work, and give a stock Trainer its ``attribute``."""
        if not hasattr(trainer, "attribute"):
            trainer.attribute = partial(attribute, trainer)  # type: ignore[attr-defined]  # that is the point
        if stage == "fit":
            check_module(pl_module)
            check_strategy(trainer.strategy)
        super().setup(trainer, pl_module, stage)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the module on a few samples and open the store: fail now rather than after an hour."""
        super().on_train_start(trainer, pl_module)
        run, self._recorder = self._run, None
        run.stopped = None
        run.guard.together(partial(check_divided_run, trainer, pl_module, self.optimizer_state))
        found = run.guard.together(partial(prepare, self._request(), trainer, pl_module, self._report.wanted(trainer)))
        self.source, self.method, self.featurize = found.source, found.method, found.featurize
        self.noise_mask = found.noise_mask
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by Lightning's connectors
            return  # a store of it would only be in the way of the run itself
        if trainer.global_step == 0:
            run.forget()
        self._report.begin(forget=trainer.global_step == 0)
        epoch, resumed = trainer.current_epoch - 1, run.path is not None
        with whole_parameters(pl_module):
            self._open(trainer, pl_module, found)
        self._open_journal(trainer, pl_module)
        if resumed and epoch > run.recorded.epoch and self.schedule.due(epoch):
            self._record(trainer, pl_module, epoch)  # the checkpoint was written just before this epoch's snapshot
        if trainer.global_step == 0 and self.schedule.due(-1):
            self._record(trainer, pl_module, -1)

    def _request(self) -> RecordingRequest:
        method, featurize = self._asked
        return RecordingRequest(
            method,
            featurize,
            self.noise_mask,
            self.batch_size,
            self.feature_dtype,
            self.memory_budget,
            self.optimizer_state,
            self.mode,
            owner=self,
        )

    def _open(self, trainer: L.Trainer, pl_module: L.LightningModule, found: Preparation) -> None:
        """Open the store, and say what will be written."""
        # Once and for all: the run may change its working directory.
        self.dirpath = None if self.dirpath is None else self.dirpath.absolute()
        path = self.store_path or Path(trainer.log_dir or trainer.default_root_dir) / "attribution"
        self._run.open(trainer, pl_module, path.absolute(), found)
        self._recorder = SnapshotRecorder(self._run, self._report)
        weight_bytes = snapshot_bytes(pl_module, self.optimizer_state) + (found.basis_bytes if found.featurize else 0)
        snapshots = self.schedule.count(epoch_limit(trainer), steps_of_an_epoch(trainer))
        rows = found.bytes_per_row
        said = partial(announce, self.store, bytes_a_row=rows, weight_bytes=weight_bytes, snapshots=snapshots)
        self._run.guard.together(said)

    def _record(self, trainer: L.Trainer, pl_module: L.LightningModule, epoch: int) -> None:
        if self._recorder is not None:
            self._flush_journal()
            self._recorder.record(trainer, pl_module, epoch)

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember which step this is: with several optimizers a batch takes several."""
        self._before = trainer.global_step
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any) -> None:
        """Take a snapshot after some steps of the first epoch; the last step's is that of the epoch."""
        super().on_train_batch_end(trainer, pl_module)
        run = self._run
        if run.stopped is not None or trainer.current_epoch > 0 or trainer.is_last_batch:
            return
        if self.schedule.due_between(self._before, trainer.global_step):
            with run.guard.training(partial(run.stand_down, trainer, 0)):
                self._record(trainer, pl_module, 0)
                run.recorded = replace(run.recorded, epoch=-1)  # the epoch has still to come to its end

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take a snapshot and featurize, if the schedule says so or the run is known to end here."""
        epoch, run = trainer.current_epoch, self._run
        last = epoch + 1 == trainer.max_epochs or trainer.global_step == trainer.max_steps
        if run.stopped is None and (self.schedule.due(epoch) or last):
            with run.guard.training(partial(run.stand_down, trainer, epoch)):
                self._record(trainer, pl_module, epoch)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the last snapshot where nobody knew before that the run would end: early stopping, time limits."""
        epoch, run = trainer.current_epoch - 1, self._run
        if run.stopped is None and self._recorder is not None:
            with run.guard.training(partial(run.stand_down, trainer, epoch)):
                self._record(trainer, pl_module, epoch)
                run.guard.together(partial(run.close, trainer))
                run.guard.together(run.store.reload)
        run.buffer_pool.clear()

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take a snapshot of what the user ends with, if that is not what the last epoch gave: averaged weights."""
        if trainer.num_training_batches == 0:  # Lightning passes over an empty data set in silence: say why
            train_source(trainer, pl_module, getattr(trainer, "datamodule", None), batch_size=self.batch_size)
        (recorder, self._recorder), run = (self._recorder, None), self._run
        if recorder is not None and run.stopped is None:
            epoch = trainer.current_epoch - 1
            with run.guard.training(partial(run.stand_down, trainer, epoch)), whole_parameters(pl_module):
                run.guard.together(partial(run.finish, trainer, pl_module, epoch))
                run.guard.together(run.store.reload)
