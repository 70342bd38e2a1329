"""Records a run while it trains: snapshots at epoch ends, and the features of the training set at each of them."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_attr.callbacks.progress import progress
from lightning_attr.callbacks.schedule import SnapshotSchedule
from lightning_attr.checkpoints import weights_of
from lightning_attr.data import train_source
from lightning_attr.errors import StoreMismatchError
from lightning_attr.featurizer import PROBE_SIZE, Featurizer, check_module, plan
from lightning_attr.files import digest
from lightning_attr.isolation import undisturbed
from lightning_attr.layout import ParameterLayout
from lightning_attr.loader import OrderedLoader
from lightning_attr.manifest import Fingerprint, Snapshot
from lightning_attr.methods import TRAK, AttributionMethod, SnapshotFeatures
from lightning_attr.metrics.functional import noisy_label_auroc, noisy_label_recall, spearman
from lightning_attr.prediction import to_device
from lightning_attr.shards import ShardWriter
from lightning_attr.store import FeatureStore
from lightning_attr.trainer import attribute, check_noise_mask, check_strategy

__all__ = ["AttributionCallback"]

SnapshotListener = Callable[[L.Trainer, L.LightningModule, Snapshot, Tensor], None]


class AttributionCallback(L.Callback):
    """Makes every prediction of a run traceable to its training samples, and leaves the run itself bit-identical.

    At the end of the epochs of its schedule it stores a snapshot of the weights and featurizes the whole training set there,
    in data set order. Afterwards ``trainer.attribute(datamodule)`` gives the scores.

    Args:
        dirpath: directory of the feature store; by default ``attribution`` in the Trainer's log directory. A store of the
            same run is continued, one of another run is refused.
        method: how to score, and with it the projection of the features; TRAK by default.
        snapshots: "geometric" for the epochs 0, 1, 2, 4, 8, ..., "all", an integer n for every n-th, or a list of epoch
            indices; the last epoch always has one.
        featurize: compute features at once; otherwise ``trainer.attribute`` does, from the snapshots.
        noise_mask: ``(n_train,)``, bool: samples known to be mislabelled, for the metrics.
        log: log self-influence statistics at every snapshot to the Trainer's loggers.
        batch_size: samples a batch while featurizing; by default the training loader's.

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
        >>> trainer = L.Trainer(max_epochs=3, callbacks=[AttributionCallback(folder.name)], logger=False, accelerator="cpu",
        ...                     enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
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
        featurize: bool = True,
        noise_mask: Tensor | Sequence[bool] | None = None,
        log: bool = True,
        batch_size: int | None = None,
    ) -> None:
        self.dirpath = Path(dirpath) if dirpath is not None else None
        self.method = method or TRAK()
        self.schedule = SnapshotSchedule(snapshots)
        self.featurize = featurize
        self.noise_mask = None if noise_mask is None else torch.as_tensor(noise_mask)
        self.log = log
        self.batch_size = batch_size
        self.listeners: list[SnapshotListener] = []
        self.self_influence: Tensor | None = None
        self._path: Path | None = None
        self._learning_rate = 0.0
        self._recorded_step = -1

    @property
    def store_path(self) -> Path | None:
        """Directory of the feature store; None before the run that makes it, unless ``dirpath`` was given."""
        return self._path or self.dirpath

    # Before training --------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what cannot work, and give a stock Trainer its ``attribute``."""
        if not hasattr(trainer, "attribute"):
            trainer.attribute = functools.partial(attribute, trainer)
        if stage == "fit":
            check_module(pl_module)
            check_strategy(trainer.strategy)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the module on a few samples and open the store: fail now rather than after an hour."""
        self.source = train_source(trainer, pl_module, getattr(trainer, "datamodule", None), batch_size=self.batch_size)
        self.noise_mask = check_noise_mask(self.noise_mask, len(self.source))
        self.layout = ParameterLayout.of(pl_module)
        with self._beside_training(trainer, pl_module):
            rows, batch = self.source.first(PROBE_SIZE)
            self.plan = plan(pl_module, self._to_device(trainer, pl_module, batch), len(rows))
        self._open_store(trainer, pl_module)
        self._announce(trainer)

    def _open_store(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        path = self.store_path or Path(trainer.log_dir or trainer.default_root_dir) / "attribution"
        self._path = trainer.strategy.broadcast(path)
        fingerprint = Fingerprint(
            len(self.source),
            self.source.digest(),
            self.layout.shapes,
            self.method.projector.config if self.featurize else None,
        )
        if trainer.is_global_zero:
            started = digest(weights_of(pl_module)) if trainer.global_step == 0 else None
            if FeatureStore.exists(self._path):
                self._continue(FeatureStore.open(self._path), fingerprint, started, trainer.global_step)
            else:
                FeatureStore.create(self._path, fingerprint, batch_size=self.source.batch_size, run=started)
        trainer.strategy.barrier("attribution store")
        self.store = FeatureStore.open(self._path, writer=trainer.is_global_zero)
        self.store.check(fingerprint)
        done = [snapshot.global_step for snapshot in self.store.snapshots if snapshot.global_step <= trainer.global_step]
        self._recorded_step = max(done) if trainer.global_step and done else -1

    def _continue(self, store: FeatureStore, fingerprint: Fingerprint, started: str | None, step: int) -> None:
        """Go on with a store of this run; refuse that of another."""
        store.check(fingerprint)
        if started is not None and store.manifest.run not in (None, started):
            raise StoreMismatchError(
                f"{store.path} holds another training run: it started from other weights. Choose another `dirpath` (one for "
                "each run; FeatureStore.merge joins them), delete this one, or seed the run to continue it."
            )
        if step:
            self._give_up(store, step + 1)

    def _announce(self, trainer: L.Trainer) -> None:
        """Say what will be written, before anything is."""
        epochs = trainer.max_epochs if trainer.max_epochs not in (None, -1) else None
        snapshots = self.schedule.count(epochs) if epochs is not None else None
        dim = self.method.projector.bind(self.layout, "").dim if self.featurize else 0
        each = 4 * (len(self.source) * dim + self.layout.numel)
        total = each * (snapshots or 1)
        free = shutil.disk_usage(self.store.path).free
        rank_zero_info(
            f"Attribution: {len(self.source):,} training samples x {dim:,} features, "
            f"{f'{snapshots} snapshots' if snapshots else 'each snapshot'}: about {total / 1e6:,.1f} MB in "
            f"{self.store.path} ({free / 1e9:,.1f} GB free)."
        )
        if total > free:
            rank_zero_warn(
                f"The attribution store needs about {total / 1e9:,.1f} GB, but only {free / 1e9:,.1f} GB are free in "
                f"{self.store.path}. Use fewer `snapshots` or a smaller `proj_dim`."
            )

    # While training ---------------------------------------------------------------------------------------------

    @override
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """Integrate the learning rate, averaged over the parameters of the optimizer's groups."""
        sizes = [sum(p.numel() for p in group["params"]) for group in optimizer.param_groups]
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        self._learning_rate += sum(size * rate for size, rate in zip(sizes, rates, strict=True)) / max(1, sum(sizes))

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take a snapshot and featurize, if the schedule says so or the run is known to end here."""
        epoch = trainer.current_epoch
        last = epoch + 1 == trainer.max_epochs or trainer.global_step == trainer.max_steps
        if self.schedule.due(epoch) or last:
            self._record(trainer, pl_module, epoch)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the last snapshot where nobody knew before that the run would end: early stopping, time limits."""
        if trainer.global_step > self._recorded_step:
            self._record(trainer, pl_module, max(0, trainer.current_epoch - 1))
        if trainer.is_global_zero:
            self._give_up(self.store, trainer.global_step + 1)
        trainer.strategy.barrier("attribution end")
        self.store.reload()

    def _record(self, trainer: L.Trainer, pl_module: L.LightningModule, epoch: int) -> None:
        key = f"epoch={epoch:04d}-step={trainer.global_step:06d}"
        with self._beside_training(trainer, pl_module):
            if trainer.is_global_zero:
                self._store_snapshot(key, pl_module, epoch, trainer.global_step)
            self._synchronise(trainer, key)
            if self.featurize:
                self._featurize(trainer, pl_module, key)
                self._synchronise(trainer, key)
                if trainer.is_global_zero and (self.log or self.listeners):
                    self._report(trainer, pl_module, self.store.snapshot(key))
        self._recorded_step = trainer.global_step
        self._learning_rate = 0.0

    def _store_snapshot(self, key: str, pl_module: L.LightningModule, epoch: int, step: int) -> None:
        weights = weights_of(pl_module)
        if any(s.key == key and s.weights == digest(weights) for s in self.store.snapshots):
            return  # this run again, after it was killed
        self._give_up(self.store, step)
        self.store.add_snapshot(
            key, weights, epoch=epoch, global_step=step, learning_rate=self._learning_rate
        )

    def _give_up(self, store: FeatureStore, step: int) -> None:
        """Set snapshots of an abandoned branch aside: from this step on, the run took another course."""
        gone = [snapshot.key for snapshot in store.snapshots if snapshot.global_step >= step]
        if gone:
            rank_zero_warn(
                f"The run differs from the one recorded in {store.path} from step {step} on; moved {', '.join(gone)} to "
                f"{store.path / 'abandoned'}."
            )
            store.set_aside(gone)

    def _featurize(self, trainer: L.Trainer, pl_module: L.LightningModule, key: str) -> None:
        shards = self.store.missing(key)[trainer.global_rank :: trainer.world_size]
        batches = [batch for shard in shards for batch in self.source.batches(self.store.rows(shard))]
        snapshot = self.store.snapshot(key)
        featurizer = Featurizer(
            pl_module, self.plan, self.method.projector.bind(self.layout, snapshot.projection)
        )
        writer = ShardWriter(self.store, key)
        with progress(trainer, f"Featurizing epoch {snapshot.epoch}", len(batches)) as advance:
            for rows, batch in OrderedLoader(self.source, batches):
                on_device = self._to_device(trainer, pl_module, batch)
                with trainer.precision_plugin.forward_context():
                    columns = featurizer(on_device, rows)
                writer.add(rows, columns)
                advance()

    def _synchronise(self, trainer: L.Trainer, key: str) -> None:
        """Let every process see what the others wrote."""
        trainer.strategy.barrier("attribution shards")
        if trainer.is_global_zero:
            self.store.adopt(key)
        trainer.strategy.barrier("attribution manifest")
        self.store.reload()

    def _to_device(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> Any:
        batch = trainer.precision_plugin.convert_input(batch)
        return to_device(batch, pl_module, getattr(trainer, "datamodule", None), trainer.strategy.root_device)

    @contextmanager
    def _beside_training(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Iterator[None]:
        """Leave training untouched, and tell hooks that ask the trainer that this is no training."""
        stage = trainer.state.stage
        trainer.state.stage = RunningStage.PREDICTING
        try:
            with undisturbed(pl_module, self.source.dataset):
                yield
        finally:
            trainer.state.stage = stage

    # Logging ----------------------------------------------------------------------------------------------------

    def _report(self, trainer: L.Trainer, pl_module: L.LightningModule, snapshot: Snapshot) -> None:
        previous, self.self_influence = self.self_influence, self._self_influence(snapshot)
        if self.log:
            metrics = _statistics(self.self_influence, previous, self.noise_mask)
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step)
        for listener in self.listeners:
            listener(trainer, pl_module, snapshot, self.self_influence)

    def _self_influence(self, snapshot: Snapshot) -> Tensor:
        n = len(self.source)
        dim = self.store.shard(snapshot.key, 0)["features"].shape[1]
        no_targets = {"features": torch.zeros(0, dim)}
        features = SnapshotFeatures(lambda: self.store.blocks(snapshot.key), no_targets, snapshot.learning_rate)
        self_influence = torch.zeros(n)
        self.method.score([features], torch.zeros(n, 0), self_influence)
        return self_influence

    # Resuming ---------------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: where the store is, and the learning rate since the last snapshot."""
        return {"path": str(self._path) if self._path else None, "learning_rate": self._learning_rate}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was written."""
        self._learning_rate = state_dict["learning_rate"]
        if self.dirpath is None and state_dict["path"] is not None:
            self._path = Path(state_dict["path"])


def _statistics(self_influence: Tensor, previous: Tensor | None, noise_mask: Tensor | None) -> dict[str, float]:
    decile = max(1, round(0.1 * len(self_influence)))
    top = self_influence.topk(decile).values.sum() / self_influence.sum()
    metrics = {
        "self_influence_mean": self_influence.mean(),
        "self_influence_p95": self_influence.quantile(0.95),
        "self_influence_top_decile_share": top,
    }
    if previous is not None:
        metrics["rank_stability"] = spearman(self_influence, previous)
    if noise_mask is not None and noise_mask.any() and not noise_mask.all():
        metrics["noisy_label_auroc"] = noisy_label_auroc(self_influence, noise_mask)
        metrics["noisy_label_recall@10%"] = noisy_label_recall(self_influence, noise_mask)
    return {f"attribution/{name}": float(value) for name, value in metrics.items()}
