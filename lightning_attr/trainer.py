"""The predict-style step: ``trainer.attribute(datamodule)``."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import lightning as L
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]  # re-exported
from torch import Tensor

from lightning_attr.arguments import check_path
from lightning_attr.attribute_arguments import check_attribute_arguments, check_noise_mask
from lightning_attr.attributed import check_module, describe_output
from lightning_attr.borrow import attached, lent, optimizers_of, same_tensors
from lightning_attr.checkpoints import loaded
from lightning_attr.ckpt_files import checkpoint_paths
from lightning_attr.ckpt_snapshots import CheckpointSnapshots
from lightning_attr.data import target_source, train_source
from lightning_attr.errors import AttributionError
from lightning_attr.isolation import preserved_rng, undisturbed
from lightning_attr.loader import DataSource
from lightning_attr.manifest import Fingerprint, Stopped
from lightning_attr.memory import MemoryBudget
from lightning_attr.methods import TRAK, AttributionMethod
from lightning_attr.methods.choice import settled
from lightning_attr.model_check import check_model
from lightning_attr.modes import MODES, check_mode
from lightning_attr.pilots import Pilots, check_pilots, train_pilots
from lightning_attr.prediction import AttributionStep
from lightning_attr.projectors import projector_from_config
from lightning_attr.result import AttributionResult
from lightning_attr.step_world import StepWorld
from lightning_attr.store import FeatureStore
from lightning_attr.target_function import TargetFunction
from lightning_attr.top_scores import check_topk
from lightning_attr.trainable import parameter_count, parameter_shapes
from lightning_attr.user_calls import set_surroundings, surroundings_of
from lightning_attr.worlds import as_lightning_module, both, check_one_world

__all__ = ["AttributionRecord", "AttributionTrainer", "attribute", "check_strategy"]


@runtime_checkable
class AttributionRecord(Protocol):
    """What a callback that recorded a run tells ``attribute``, as ``AttributionCallback`` does."""

    method: AttributionMethod
    noise_mask: Tensor | None
    stopped: Stopped | None

    @property
    def store_path(self) -> Path | None:
        """Directory of the store, None before the first run."""


class AttributionTrainer(L.Trainer):
    """A ``lightning.Trainer`` with one more step, :meth:`attribute`.

    Example:
        >>> import lightning as L, torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from lightning_attr import AttributionMixin
        >>> class Classifier(AttributionMixin, L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(2, 2)
        ...     def forward(self, x):
        ...         return self.layer(x)
        >>> x, y = torch.eye(2).repeat(4, 1), torch.tensor([0, 1]).repeat(4)
        >>> loader = DataLoader(TensorDataset(x, y), batch_size=4)
        >>> trainer = AttributionTrainer(logger=False, enable_progress_bar=False, enable_model_summary=False)
        >>> result = trainer.attribute(model=Classifier(), train_dataloaders=loader, target_dataloaders=loader)
        >>> result.scores.shape
        (8, 8)
    """

    if not TYPE_CHECKING:  # its signature is Lightning's own

        @wraps(L.Trainer.fit)
        def fit(self, model: Any, *args: Any, **kwargs: Any) -> None:
            """Train as ``lightning.Trainer`` does; for parts of ``pytorch_lightning`` say which Trainer they need."""
            check_one_world(self, model, *args, *kwargs.values())
            super().fit(model, *args, **kwargs)

    def attribute(
        self,
        datamodule: L.LightningDataModule | None = None,
        *,
        model: L.LightningModule | None = None,
        train_dataloaders: Any = None,
        target_dataloaders: Any = None,
        targets: str = "auto",
        ckpt_path: str | Path | Sequence[str | Path] | None = None,
        method: AttributionMethod | None = None,
        store: str | Path | None = None,
        noise_mask: Tensor | None = None,
        topk: int | None = None,
        memory_budget: int | None = None,
        target_function: TargetFunction | None = None,
        mode: str | None = None,
        pilots: int | Pilots | None = None,
    ) -> AttributionResult:
        """Score every training sample for every target; see :func:`attribute`, which has the same arguments."""
        return attribute(
            self,
            datamodule,
            model=model,
            train_dataloaders=train_dataloaders,
            target_dataloaders=target_dataloaders,
            targets=targets,
            ckpt_path=ckpt_path,
            method=method,
            store=store,
            noise_mask=noise_mask,
            topk=topk,
            memory_budget=memory_budget,
            target_function=target_function,
            mode=mode,
            pilots=pilots,
        )


def attribute(
    trainer: L.Trainer,
    datamodule: L.LightningDataModule | None = None,
    *,
    model: L.LightningModule | None = None,
    train_dataloaders: Any = None,
    target_dataloaders: Any = None,
    targets: str = "auto",
    ckpt_path: str | Path | Sequence[str | Path] | None = None,
    method: AttributionMethod | None = None,
    store: str | Path | None = None,
    noise_mask: Tensor | None = None,
    topk: int | None = None,
    memory_budget: int | None = None,
    target_function: TargetFunction | None = None,
    mode: str | None = None,
    pilots: int | Pilots | None = None,
) -> AttributionResult:
    """Score every training sample for every target, on the trainer's devices.

    Features that the store holds are used, missing ones are computed and kept. Row ``i`` of the scores is
    ``dataset[i]`` of the training data and column ``j`` is ``dataset[j]`` of the targets, whatever the loaders
    shuffle, drop or pad. Trainer and module are put back as they were.

    Args:
        trainer: any ``Trainer`` of ``lightning`` or ``pytorch_lightning``.
        datamodule: gives training data and targets; by default the one of the fit before.
        model: the module; by default the one of the fit before. Without :class:`lightning_attr.AttributionMixin`, what
            is attributed is the loss of its ``training_step``.
        train_dataloaders: the training loader, instead of the datamodule's. Only its data set, collation, workers and
            batch size are used.
        target_dataloaders: the loader of the targets, likewise.
        targets: "predict", "test", "val" or "train"; "auto" takes the first of them whose loader can be made and whose
            batches have what training batches have, labels for instance, and says which it passed over.
        ckpt_path: checkpoints of the module to attribute at, each a snapshot, in place of those of a callback: "best",
            "last", the path of a file that a Trainer wrote, a URL that fsspec reads, or a list of these. Learning rates
            and moments come from the optimizer states in them. With ``store``, features are kept there.
        method: how to score; by default the callback's, else TRAK with the store's projection.
        store: directory of a store; by default the callback's. Without either, the model's current weights are the only
            snapshot, and nothing is kept, so that features are not rounded to half precision. A directory without a
            store gets one of the current weights.
        noise_mask: ``(n_train,)``, bool: samples known to be mislabelled, for the metrics; by default the callback's.
        topk: keep only this many proponents and opponents of each target, with the figures of all scores: the result's
            ``scores`` are :class:`lightning_attr.top_scores.TopScores`, and no matrix of all scores is ever built.
        memory_budget: bytes that the tensors of a featurized batch may take: a larger batch goes through in parts. By
            default half of what is free on the device.
        target_function: ``(module, batch) -> (b,)``, differentiable: what is measured of each target, higher is more of
            it. By default the model output: a logit difference, the log-probability of another answer or a reward are
            as good. Training samples keep theirs, and with it their self-influence.
        mode: "eval", or "train" for modules whose loss needs ``self.training``: statistics of BatchNorm stay frozen,
            and where the module is random each sample has random numbers of its own. By default the store's, else eval
            mode, unless the loss or its gradient depends on the mode, or exists in train mode only: a log line says so.
        pilots: how many short runs from other weights score together with the recorded run; see
            :class:`lightning_attr.pilots.Pilots`. Those that the store misses are trained now, by the training loader
            at hand, and kept: each costs a sixth of the run or more, which is said before. By default the run alone
            scores.

    Returns:
        Scores, self-influence, data value and metrics.

    Raises:
        TypeError: if an argument is of another class than its own, the model can not be attributed, or model and
            trainer are of ``lightning`` and ``pytorch_lightning`` in turn.
        ValueError: if model or data are missing, or the noise mask or ``topk`` does not fit.
        AttributionError: if the strategy shards parameters, the callback has recorded nothing, the store has no
            snapshots, or pilots cannot be trained as the run was.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from lightning_attr import AttributionMixin
        >>> class Classifier(AttributionMixin, L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(2, 2)
        ...     def forward(self, x):
        ...         return self.layer(x)
        >>> loader = DataLoader(TensorDataset(torch.eye(2), torch.tensor([0, 1])))
        >>> trainer = L.Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False)
        >>> attribute(trainer, model=Classifier(), train_dataloaders=loader, targets="train").self_influence.shape
        torch.Size([2])
    """
    check_attribute_arguments(trainer, datamodule, model, method, memory_budget, target_function)
    module = model if model is not None else trainer.lightning_module
    if module is None:
        raise ValueError(
            "Expected a model to attribute, but this trainer has none. Pass `model`, or call `fit` before."
        )
    check_module(module)
    check_one_world(trainer, module)
    check_mode(mode)
    wanted = check_pilots(pilots)
    check_strategy(trainer.strategy)
    record = next((c for c in trainer.callbacks if isinstance(c, AttributionRecord)), None)  # type: ignore[attr-defined]
    datamodule = datamodule or (getattr(trainer, "datamodule", None) if train_dataloaders is None else None)
    with ExitStack() as stack:
        stack.enter_context(preserved_rng())  # a datamodule may draw a split
        stack.enter_context(attached(trainer, module, datamodule))
        train = _recorded_source(trainer, record, datamodule, train_dataloaders)
        train = train or train_source(trainer, module, datamodule, train_dataloaders)
        target = target_source(trainer, module, datamodule, target_dataloaders, targets, train)
        target = None if target is None else target.wrapped_as(train)
        noise_mask = noise_mask if noise_mask is not None or record is None else record.noise_mask
        noise_mask = check_noise_mask(noise_mask, len(train))
        topk = check_topk(topk, len(train))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lightning_attr-")))
        path = check_path("attribute", "store", store) if store is not None else None
        files = None if ckpt_path is None else checkpoint_paths(trainer, ckpt_path)
        if wanted is not None and files is not None:
            raise ValueError("Expected argument `pilots` to come without `ckpt_path`: pilots join a recorded run.")
        if path is None and files is None:
            path = _recorded_path(trainer, record)
        method = settled(method or _default_method(path, record), len(train), parameter_count(module))
        moments, optimizers = method.needs_optimizer_state, partial(optimizers_of, module)
        checkpoints = None if files is None else CheckpointSnapshots(module, files, optimizers, moments)
        mode = mode or _recorded_mode(path)
        step = as_lightning_module(AttributionStep, trainer)(
            module,
            datamodule,
            method,
            train,
            target,
            store_path=path or folder / "store",
            fingerprint=Fingerprint(
                len(train),
                train.digest(),
                parameter_shapes(module),
                method.projector_config,
                describe_output(module),
                mode or "auto",
            ),
            noise_mask=noise_mask,
            topk=topk,
            memory=MemoryBudget(memory_budget),
            folder=folder / "result",
            target_function=target_function,
            mode=mode,
            scratch=path is None,
            pilots=0 if wanted is None else wanted.count,
            checkpoints=checkpoints,
        )
        if checkpoints is None:
            _check_store(step, record, trainer.is_global_zero)
        if wanted is not None:
            train_pilots(path, wanted, trainer, module, datamodule, train, moments)
        step.world = StepWorld(trainer, module, datamodule, train.loader)
        stack.callback(set_surroundings, module, surroundings_of(module))
        stack.enter_context(lent(trainer, module))
        stack.enter_context(same_tensors(module))
        sources = [source for source in (train, target) if source is not None]
        data = [item for source in sources for item in (source.dataset, source.loader.collate_fn, source.loader)]
        stack.enter_context(undisturbed(module, *data, beside=step.world.beside))
        stack.enter_context(loaded(module))
        stack.push(step.end)
        trainer.predict(step, dataloaders=None, return_predictions=False)  # type: ignore[arg-type]  # made one just above
        # A spawning strategy computed the result in other processes.
        return step.result if step.result is not None else AttributionResult.load(step.folder)


def check_strategy(strategy: Strategy) -> None:
    """Refuse strategies that do not keep whole parameters on each rank.

    Args:
        strategy: the trainer's.

    Raises:
        AttributionError: for FSDP, DeepSpeed and tensor parallelism.

    Example:
        >>> check_strategy(L.Trainer(accelerator="cpu", logger=False, barebones=True).strategy)
    """
    if isinstance(strategy, both(DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)):
        raise AttributionError(
            f"Expected a strategy that keeps whole parameters on each rank, but {type(strategy).__name__} shards them. "
            'Use strategy="auto", "ddp" or "ddp_spawn", or attribute on one device from the stored snapshots.'
        )


def _default_method(path: Path | None, record: AttributionRecord | None) -> AttributionMethod:
    if record is not None and path in {None, record.store_path}:
        return record.method
    config = FeatureStore.open(path).fingerprint.projector if path is not None and FeatureStore.exists(path) else None
    return TRAK(projector=projector_from_config(config)) if config is not None else TRAK()


def _recorded_mode(path: Path | None) -> str | None:
    """Give the mode that a store was written in: eval where features are older than the record of it."""
    if path is None or not FeatureStore.exists(path):
        return None
    fingerprint = FeatureStore.open(path, writer=False).fingerprint
    if fingerprint.mode is None:
        return "eval" if fingerprint.projector is not None else None
    return fingerprint.mode if fingerprint.mode in MODES else None


def _check_store(step: AttributionStep, record: AttributionRecord | None, first: bool) -> None:
    """Refuse before Lightning sets anything up."""
    if FeatureStore.exists(step.store_path):
        store = FeatureStore.open(step.store_path, writer=False)
        store.check(step.fingerprint)
        own = record is not None and record.store_path == step.store_path
        stopped = store.manifest.stopped or (record.stopped if record is not None and own else None)
        usable = store.manifest.usable
        if not usable and stopped is not None:
            raise AttributionError(f"{step.store_path} has no complete snapshot to attribute at: {stopped}")
        if not usable:
            raise AttributionError(
                f"{step.store_path} has no snapshots to attribute at. Fit with AttributionCallback(dirpath=...) first, "
                "or name another `store`."
            )
        if stopped is not None:
            keys = ", ".join(snapshot.key for snapshot in usable)
            rank_zero_warn(f"In {step.store_path}, {stopped} Scores are by the snapshots before that: {keys}.")
        check_model(store, step.module, first)


def _recorded_path(trainer: L.Trainer, record: AttributionRecord | None) -> Path | None:
    """The store that the callback has written."""
    if record is None or trainer.fast_dev_run:  # type: ignore[attr-defined]  # which records nothing
        return None
    if record.store_path is None or not FeatureStore.exists(record.store_path):
        if record.stopped is not None:
            raise AttributionError(f"There is no attribution store to attribute from: {record.stopped}")
        where = f" in {record.store_path}" if record.store_path is not None else ""
        raise AttributionError(
            f"The AttributionCallback of this trainer has recorded nothing yet{where}. Call `fit` before (a strategy "
            "that spawns processes needs its `dirpath`), name a `store`, or use a trainer without the callback to "
            "attribute at the model's current weights."
        )
    return record.store_path


def _recorded_source(
    trainer: L.Trainer, record: AttributionRecord | None, datamodule: L.LightningDataModule | None, loaders: Any
) -> DataSource | None:
    """Give what the callback saw trained on: the trainer itself forgets it with its next validate, test or predict."""
    if loaders is not None or datamodule is not getattr(trainer, "datamodule", None):
        return None
    return getattr(record, "source", None)
