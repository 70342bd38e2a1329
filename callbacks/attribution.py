"""Records a run while it trains: snapshots at epoch ends, and the features of the training set at each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path

import lightning as L
from lightning.pytorch.utilities.rank_zero import (  # type: ignore[attr-defined]  # re-exported with its logger set up
    rank_zero_info,
    rank_zero_warn,
)
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_attr.arguments.checks import check_flag, check_int, check_path
from lightning_attr.attribution.arguments import check_noise_mask, given_mask
from lightning_attr.attribution.request import check_strategy
from lightning_attr.attribution.trainer import attribute
from lightning_attr.callbacks.beside import beside_training
from lightning_attr.callbacks.checking import CheckedRun
from lightning_attr.callbacks.featurizing import featurize, learn, self_influence_at, settle
from lightning_attr.callbacks.first_losses import note_first_losses
from lightning_attr.callbacks.guard import describe
from lightning_attr.callbacks.recording import FINAL, Recording, announce, snapshot_bytes
from lightning_attr.callbacks.schedule import SnapshotSchedule, epoch_limit, steps_of_an_epoch
from lightning_attr.callbacks.statistics import self_influence_statistics
from lightning_attr.data.memory import MemoryBudget, check_memory_budget
from lightning_attr.data.sources import train_source
from lightning_attr.features.learned_projection import load_projection
from lightning_attr.features.second_direction import note_directions, training_featurizer, tried
from lightning_attr.methods import TRAK, AttributionMethod
from lightning_attr.methods.base import check_method
from lightning_attr.objectives.modes import check_mode
from lightning_attr.objectives.objective import check_module
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.parameters.optimizer_state import OptimizerState
from lightning_attr.parameters.trainable import parameter_count, trainable_names
from lightning_attr.parameters.weights import weights_of
from lightning_attr.projectors import LearnedProjection
from lightning_attr.store.feature_dtype import check_feature_dtype, row_bytes
from lightning_attr.store.feature_store import FeatureStore
from lightning_attr.store.manifest import Snapshot
from lightning_attr.store.shard_writer import ShardWriter
from lightning_attr.verification.gradient_paths import Plans

SnapshotListener = Callable[[L.Trainer, L.LightningModule, Snapshot, Tensor], None]


class AttributionCallback(CheckedRun):
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
    ) -> None:
        check_mode(mode)
        check_feature_dtype(feature_dtype, self)
        if memory_budget is not None:
            memory_budget = check_memory_budget(self, memory_budget)
        if batch_size is not None:
            batch_size = check_int(self, "batch_size", batch_size, minimum=1, also="None")
        super().__init__(on_error)
        self.memory = MemoryBudget(memory_budget)
        self.dirpath = check_path(self, "dirpath", dirpath, also="None") if dirpath is not None else None
        self.method = TRAK() if method is None else method
        check_method(self, self.method)
        self.schedule = SnapshotSchedule(snapshots)
        self._asked = self.method, featurize if featurize is None else check_flag(self, "featurize", featurize)
        self.featurize = featurize is not False and self.method.projector is not None
        self.noise_mask = None if noise_mask is None else given_mask(noise_mask, self)
        self._log = check_flag(self, "log", log)  # Lightning sets `log` itself, to the module's method
        self.batch_size = batch_size
        self.feature_dtype = feature_dtype
        self.memory_budget = memory_budget
        self.optimizer_state = check_flag(self, "optimizer_state", optimizer_state) or self.method.needs_optimizer_state
        self.mode = mode
        self.listeners: list[SnapshotListener] = []
        self._stored: str | None = None  # the snapshot that is being featurized

    # Before training --------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what cannot work, and give a stock Trainer its ``attribute``."""
        if not hasattr(trainer, "attribute"):
            trainer.attribute = partial(attribute, trainer)  # type: ignore[attr-defined]  # that is the point
        if stage == "fit":
            check_module(pl_module)
            check_strategy(trainer.strategy)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the module on a few samples and open the store: fail now rather than after an hour."""
        self._mode = "eval"  # until it is known
        self.stopped, self._reporting = None, True
        bytes_a_row = self._guard.together(partial(self._check, trainer, pl_module))
        self._rehearsal = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]  # set by Lightning's connectors
        if self._rehearsal:
            return  # a store of it would only be in the way of the run itself
        if trainer.global_step == 0:
            self._path = None  # a run of its own, whatever this callback recorded before
            self._forget()
        resumed = self._path is not None
        self._open_store(trainer, pl_module)
        weight_bytes = snapshot_bytes(pl_module, self.optimizer_state) + (self._basis_bytes if self.featurize else 0)
        snapshots = self.schedule.count(epoch_limit(trainer), steps_of_an_epoch(trainer))
        announce(self.store, bytes_a_row=bytes_a_row, weight_bytes=weight_bytes, snapshots=snapshots)
        epoch = trainer.current_epoch - 1
        if resumed and epoch > self._recorded.epoch and self.schedule.due(epoch):
            self._record(trainer, pl_module, epoch)  # the checkpoint was written just before this epoch's snapshot
        if trainer.global_step == 0 and self.schedule.due(-1):
            self._record(trainer, pl_module, -1)
        self._training = True

    def _check(self, trainer: L.Trainer, pl_module: L.LightningModule) -> int:
        """Find the data and go the whole way with a few samples; return how many bytes the store keeps of each."""
        self.source = train_source(trainer, pl_module, getattr(trainer, "datamodule", None), batch_size=self.batch_size)
        self.noise_mask = check_noise_mask(self.noise_mask, len(self.source), self)
        self._plans = Plans(trainer, pl_module, getattr(trainer, "datamodule", None), self.source, self.mode)
        numbers, read = (len(self.source), parameter_count(pl_module)), self._read(trainer)
        self.method, self.featurize = settle(*self._asked, *numbers, read)
        self.memory = MemoryBudget(self.memory_budget, careful=True)  # another run may have larger samples
        with self._beside_training(trainer, pl_module):
            bytes_a_row = self._probe(trainer, pl_module)
        if self.batch_size is None and self.source.stacks:
            self.source = replace(self.source, batch_size=self.memory.comfortable(self.source.batch_size))
        return bytes_a_row

    def _read(self, trainer: L.Trainer) -> bool:
        """Whether something reads features while training."""
        return bool(self.listeners) or (self._log and bool(trainer.loggers))

    def _probe(self, trainer: L.Trainer, pl_module: L.LightningModule) -> int:
        plan, batch, rows = self._plans.probe()
        self._mode = plan.mode
        state = self._optimizer_state(trainer, pl_module)  # refused now where it is wanted and there is none
        projection = self.method.projection_at(ParameterLayout.of(pl_module), "", lambda: state)
        if isinstance(projection, LearnedProjection):
            projection.rehearse()  # learning looks at more samples, and nobody would keep what it finds here
            self._basis_bytes = sum(tensor.nbytes for tensor in projection.basis.values())
        self.layers = projection.layers
        wanted, n_train = self.method.second_directions, len(self.source)
        with trainer.precision_plugin.forward_context():
            columns = tried(pl_module, plan, projection, self.memory, batch, rows, wanted, n_train)
        return row_bytes(columns, self.feature_dtype) if self.featurize else 0

    def _optimizer_state(self, trainer: L.Trainer, pl_module: L.LightningModule) -> OptimizerState | None:
        return OptimizerState.of(trainer.optimizers, pl_module) if self.optimizer_state else None

    def _open_store(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Once and for all: the run may change its working directory.
        self.dirpath = None if self.dirpath is None else self.dirpath.absolute()
        path = (self.store_path or Path(trainer.log_dir or trainer.default_root_dir) / "attribution").absolute()
        self._path = trainer.strategy.broadcast(path)
        fingerprint = self._fingerprint(pl_module)
        self._guard.together(partial(self._begin, trainer, pl_module, self._path, fingerprint))
        self.store = FeatureStore.open(self._path, writer=trainer.is_global_zero)
        self.store.check(fingerprint)

    # While training ---------------------------------------------------------------------------------------------

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Integrate the learning rates."""
        self._beat()
        with self._guard.training(self._failures.append):
            self._rates.add(optimizer, pl_module, trainer.global_step)

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take a snapshot and featurize, if the schedule says so or the run is known to end here."""
        epoch = trainer.current_epoch
        last = epoch + 1 == trainer.max_epochs or trainer.global_step == trainer.max_steps
        if self.stopped is None and (self.schedule.due(epoch) or last):
            with self._guard.training(partial(self._stand_down, trainer, epoch)):
                self._record(trainer, pl_module, epoch)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the last snapshot where nobody knew before that the run would end: early stopping, time limits."""
        epoch = trainer.current_epoch - 1
        if self.stopped is None:
            with self._guard.training(partial(self._stand_down, trainer, epoch)):
                self._record(trainer, pl_module, epoch)
                if not self._rehearsal:
                    self._guard.together(partial(self._close_store, trainer))
                    self._guard.together(self.store.reload)
        self._spare.clear()

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take a snapshot of what the user ends with, if that is not what the last epoch gave: averaged weights."""
        if trainer.num_training_batches == 0:  # Lightning passes over an empty data set in silence: say why
            train_source(trainer, pl_module, getattr(trainer, "datamodule", None), batch_size=self.batch_size)
        training, self._training = self._training, False
        if training and self.stopped is None:
            epoch = trainer.current_epoch - 1
            with self._guard.training(partial(self._stand_down, trainer, epoch)):
                self._guard.together(partial(self._finish, trainer, pl_module, epoch))
                self._guard.together(self.store.reload)

    def _finish(self, trainer: L.Trainer, pl_module: L.LightningModule, epoch: int) -> None:
        """Weights only, which the strategy has taken off the device: ``trainer.attribute`` computes the features."""
        self._check_unchanged(trainer, pl_module, epoch)
        if not trainer.is_global_zero:
            return
        state = self._optimizer_state(trainer, pl_module)
        tensors, trainable = None if state is None else state.tensors(), trainable_names(pl_module)
        weights = weights_of(pl_module)
        if self._recorded.finish(self.store, weights, epoch=epoch, optimizer=tensors, trainable=trainable):
            rank_zero_info(
                f"The weights after `fit` are not those of the last epoch (averaged, or put back). {self.store.path} "
                f"has them as the snapshot {FINAL!r}; `trainer.attribute` computes its features."
            )

    def _record(self, trainer: L.Trainer, pl_module: L.LightningModule, epoch: int) -> None:
        if self._rehearsal or trainer.global_step == self._recorded.global_step:
            return
        key = "start" if epoch < 0 else f"epoch={epoch:04d}-step={trainer.global_step:06d}"
        self._incomplete, self._set_up_at = key, None
        together = self._guard.together
        with self._beside_training(trainer, pl_module, max(0, epoch)):
            together(partial(self._snapshot, trainer, pl_module, epoch, key))
            self._stored = key
            if not self.featurize and trainer.is_global_zero:
                with self._guard.training(_without_losses):
                    note_first_losses(trainer, pl_module, self.source, self._plans.known(), self.store, key)
            if self.featurize:
                together(partial(self._featurize, trainer, pl_module, key))
                together(partial(self._adopt, trainer, key))
            together(self.store.reload)
            self._incomplete = None
            self._recorded = Recording(epoch, trainer.global_step, self.store.snapshot(key).weights)
            self._rates.clear()
            wanted = self._reporting and self._read(trainer)
            if self.featurize and trainer.is_global_zero and wanted:
                with self._guard.training(self._stop_reporting):
                    self._report(trainer, pl_module, self.store.snapshot(key))

    def _snapshot(self, trainer: L.Trainer, pl_module: L.LightningModule, epoch: int, key: str) -> None:
        if self._failures:  # told here, where all processes listen
            raise self._failures.pop()
        self._check_unchanged(trainer, pl_module, epoch, data=self.featurize)
        if not trainer.is_global_zero:
            return
        state = self._optimizer_state(trainer, pl_module)
        mean, rates = self._rates.of(ParameterLayout.of(pl_module))
        self._recorded.add(
            self.store,
            key,
            weights_of(pl_module),
            epoch=epoch,
            global_step=trainer.global_step,
            learning_rate=mean,
            optimizer=None if state is None else state.tensors(),
            trainable=trainable_names(pl_module),
            rates=rates,
        )
        if self.featurize:
            self._learn(trainer, pl_module, key)
        self._adopt(trainer, key)  # what a killed run computed of it

    def _learn(self, trainer: L.Trainer, pl_module: L.LightningModule, key: str) -> None:
        note_directions(self.store, key, pl_module, self.method.second_directions)
        stream = self.store.snapshot(key).projection
        layout, plan = self._plans.current()
        projection = self.method.bind(layout, stream)
        if isinstance(projection, LearnedProjection):
            self._set_up(trainer, pl_module, stream)
            learn(trainer, pl_module, self.source, projection, plan, self.store, key)

    def _adopt(self, trainer: L.Trainer, key: str) -> None:
        """Enter what all processes have written."""
        if trainer.is_global_zero:
            self.store.adopt(key)

    def _featurize(self, trainer: L.Trainer, pl_module: L.LightningModule, key: str) -> None:
        self.store.reload()  # another process has written the snapshot
        snapshot = self.store.snapshot(key)
        layout, plan = self._plans.current()
        projection = self.method.projection_at(layout, snapshot.projection, partial(self.store.optimizer_state, key))
        load_projection(projection, self.store, key)
        self.layers = projection.layers
        shards = self.store.missing(key)[trainer.global_rank :: trainer.world_size]
        batches = [batch for shard in shards for batch in self.source.batches(self.store.rows(shard))]
        if not batches:
            return
        self._set_up(trainer, pl_module, snapshot.projection)
        featurizer = training_featurizer(self.store, key, pl_module, plan, projection, self.memory)
        featurize(trainer, pl_module, self.source, batches, featurizer, ShardWriter(self.store, key, self._spare))

    def _beside_training(
        self, trainer: L.Trainer, pl_module: L.LightningModule, epoch: int | None = None
    ) -> AbstractContextManager[None]:
        self._stored = None
        return beside_training(trainer, pl_module, self.source, self._mode, epoch, self._recorded_weights)

    def _recorded_weights(self) -> Mapping[str, Tensor]:
        """The weights that training is at, once their snapshot has been taken."""
        return {} if self._stored is None else self.store.weights(self._stored)

    # Logging ----------------------------------------------------------------------------------------------------

    def _report(self, trainer: L.Trainer, pl_module: L.LightningModule, snapshot: Snapshot) -> None:
        previous = self.self_influence
        self.self_influence = self_influence_at(self.store, snapshot, self.method, self.layers)
        if self._log:
            metrics = self_influence_statistics(self.self_influence, previous, self.noise_mask)
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step)
        for listener in self.listeners:
            listener(trainer, pl_module, snapshot, self.self_influence)

    def _stop_reporting(self, error: Exception) -> None:
        """A logger that fails is no reason to stop recording."""
        self._reporting = False
        rank_zero_warn(f"AttributionCallback: logging of self-influence ended, recording goes on: {describe(error)}")


def _without_losses(error: Exception) -> None:
    rank_zero_warn(f"AttributionCallback: losses of a snapshot were not noted, recording goes on: {describe(error)}")
