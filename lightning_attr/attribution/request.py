"""What ``attribute`` is asked for, looked up and checked in one place, before anything is set up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import lightning as L
from lightning.pytorch.utilities.rank_zero import (  # type: ignore[attr-defined]  # re-exported
    rank_zero_info,
    rank_zero_warn,
)
from torch import Tensor

from lightning_attr.arguments.checks import check_path
from lightning_attr.attribution.arguments import check_attribute_arguments, check_noise_mask
from lightning_attr.attribution.borrow import attached
from lightning_attr.attribution.checkpoint_files import checkpoint_paths
from lightning_attr.attribution.checkpoint_snapshots import CheckpointSnapshots
from lightning_attr.attribution.strategies import check_strategy
from lightning_attr.data.loader import DataSource
from lightning_attr.data.memory import MemoryBudget
from lightning_attr.data.sources import target_source, train_source
from lightning_attr.errors import AttributionError
from lightning_attr.methods import TRAK, AttributionMethod
from lightning_attr.methods.choice import settled
from lightning_attr.methods.stored_projection import chosen_as, on_store
from lightning_attr.objectives.modes import MODES, check_mode
from lightning_attr.objectives.objective import check_module, describe_output
from lightning_attr.objectives.target_function import TargetFunction
from lightning_attr.parameters.trainable import parameter_count, parameter_shapes
from lightning_attr.pilots import Pilots, check_pilots
from lightning_attr.results.reranked_scores import CandidateScores
from lightning_attr.results.top_scores import check_topk
from lightning_attr.store.feature_store import FeatureStore
from lightning_attr.store.manifest import Fingerprint, Stopped
from lightning_attr.user_code.isolation import preserved_rng
from lightning_attr.user_code.lightning_names import check_one_world
from lightning_attr.user_code.step_world import configured_optimizers
from lightning_attr.verification.model_check import check_model


@runtime_checkable
class AttributionRecord(Protocol):
    """What a callback that recorded a run tells ``attribute``, as ``AttributionCallback`` does."""

    method: AttributionMethod
    noise_mask: Tensor | None
    stopped: Stopped | None

    @property
    def store_path(self) -> Path | None:
        """Directory of the store, None before the first run."""


@dataclass(frozen=True)
class AttributionRequest:
    """One attribution, with everything that it needs.

    Args:
        module: the user's module.
        datamodule: the user's datamodule, for its transfer hooks.
        method: what scores.
        train: the training data.
        targets: the target data; None for the training data.
        store: where the store is, or is to be; None for one that is thrown away in the end: features keep all digits
            then, and stay in memory where they fit.
        fingerprint: of data, module and method.
        noise_mask: samples known to be mislabelled.
        topk: how many proponents and opponents of each target to keep; None for all scores.
        memory: what a batch may take while it is featurized.
        target_function: what is measured of the targets, in place of the model output.
        mode: that the module is attributed in, "eval" or "train"; None where nobody chose.
        pilots: how many of the store's pilots score together with the recorded run, and how they are trained.
        checkpoints: of the module, to be the snapshots in place of its current weights.
        feature_dtype: how a new store keeps features.
        candidates: whose scores alone are wanted; None for those of all training samples.
    """

    module: L.LightningModule
    datamodule: L.LightningDataModule | None
    method: AttributionMethod
    train: DataSource
    targets: DataSource | None
    store: Path | None
    fingerprint: Fingerprint
    noise_mask: Tensor | None
    topk: int | None
    memory: MemoryBudget
    target_function: TargetFunction | None
    mode: str | None
    pilots: Pilots | None
    checkpoints: CheckpointSnapshots | None
    feature_dtype: str
    candidates: CandidateScores | None = None

    @property
    def target_source(self) -> DataSource:
        """The targets, which may be the training data."""
        return self.targets or self.train

    @cached_property
    def target_digest(self) -> str | None:
        """Digest of the targets."""
        return self.fingerprint.data if self.targets is None else self.targets.digest()

    @cached_property
    def first_target(self) -> int:
        """What random draws add to the rows of targets: nothing where they are the training samples themselves."""
        known = self.fingerprint.data
        same = self.targets is None or (known is not None and self.target_digest == known)
        return 0 if same else len(self.train)


def resolve(
    trainer: L.Trainer,
    datamodule: L.LightningDataModule | None,
    *,
    model: L.LightningModule | None,
    train_dataloaders: Any,
    target_dataloaders: Any,
    targets: str,
    method: AttributionMethod | None,
    store: str | Path | None,
    ckpt_path: str | Path | Sequence[str | Path] | None,
    noise_mask: Tensor | None,
    topk: int | None,
    memory_budget: int | None,
    target_function: TargetFunction | None,
    mode: str | None,
    pilots: int | Pilots | None,
    owner: str = "attribute",
) -> AttributionRequest:
    """Check the arguments of :func:`lightning_attr.attribute`, or of its ``owner``, and look up those left out."""
    loaders = train_dataloaders, target_dataloaders
    check_attribute_arguments(owner, trainer, datamodule, model, *loaders, method, memory_budget, target_function)
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
    with preserved_rng(), attached(trainer, module, datamodule):  # a datamodule may draw a split
        train = _recorded_source(trainer, record, datamodule, train_dataloaders)
        train = train or train_source(trainer, module, datamodule, train_dataloaders)
        target = target_source(trainer, module, datamodule, target_dataloaders, targets, train)
        target = None if target is None else target.wrapped_as(train)
        noise_mask = noise_mask if noise_mask is not None or record is None else record.noise_mask
        noise_mask = check_noise_mask(noise_mask, len(train), owner)
        topk = check_topk(topk, len(train))
        path = check_path(owner, "store", store) if store is not None else None
        files = None if ckpt_path is None else checkpoint_paths(trainer, ckpt_path, owner)
        if wanted is not None and files is not None:
            raise ValueError("Expected argument `pilots` to come without `ckpt_path`: pilots join a recorded run.")
        if path is None and files is None:
            path = _recorded_path(trainer, record)
        sizes, stored = (len(train), parameter_count(module)), _fingerprint(path)
        method = _chosen_method(method, path, stored, record, sizes)
        method = settled(method, *sizes)
        moments, optimizers = method.needs_optimizer_state, partial(configured_optimizers, module)
        mode = mode or _recorded_mode(stored)
        request = AttributionRequest(
            module,
            datamodule,
            method,
            train,
            target,
            path,
            Fingerprint(
                len(train),
                train.digest(),
                parameter_shapes(module),
                method.projector_config,
                describe_output(module),
                mode or "auto",
            ),
            noise_mask,
            topk,
            MemoryBudget(memory_budget),
            target_function,
            mode,
            wanted,
            None if files is None else CheckpointSnapshots(module, files, optimizers, moments),
            "float32" if path is None else "float16",  # the same in memory and on disk where it is thrown away
        )
        if request.checkpoints is None:
            _check_store(request, record, trainer.is_global_zero)
    return request


def _fingerprint(path: Path | None) -> Fingerprint | None:
    """Read what a store was written for; None where there is none yet."""
    return FeatureStore.open(path, writer=False).fingerprint if path and FeatureStore.exists(path) else None


def _chosen_method(
    method: AttributionMethod | None,
    path: Path | None,
    stored: Fingerprint | None,
    record: AttributionRecord | None,
    sizes: tuple[int, int],
) -> AttributionMethod:
    """Let the method read the features that the store has, or will have of the callback's method."""
    own = record if record is not None and path in {None, record.store_path} else None
    config = None if stored is None else stored.projector
    if method is None and own is not None:
        return own.method
    if method is None:
        return TRAK() if config is None else chosen_as(TRAK(), config, *sizes)
    if config is None and own is not None and path is not None:
        config = own.method.projector_config
    reads = on_store(method, config, *sizes)
    if reads.projector_config != settled(method, *sizes).projector_config:
        rank_zero_info(f"{type(method).__name__} reads the features of {path}: no projector was passed.")
    return reads


def _recorded_mode(stored: Fingerprint | None) -> str | None:
    """Give the mode that a store was written in: eval where features are older than the record of it."""
    if stored is None:
        return None
    if stored.mode is None:
        return "eval" if stored.projector is not None else None
    return stored.mode if stored.mode in MODES else None


def _check_store(request: AttributionRequest, record: AttributionRecord | None, first: bool) -> None:
    """Refuse a store that the request does not fit, or that has nothing to attribute at, before anything is set up."""
    if request.store is not None and FeatureStore.exists(request.store):
        store = FeatureStore.open(request.store, writer=False)
        store.check(request.fingerprint)
        own = record is not None and record.store_path == request.store
        stopped = store.manifest.stopped or (record.stopped if record is not None and own else None)
        usable = store.manifest.usable
        if not usable and stopped is not None:
            raise AttributionError(f"{request.store} has no complete snapshot to attribute at: {stopped}")
        if not usable:
            raise AttributionError(
                f"{request.store} has no snapshots to attribute at. Fit with AttributionCallback(dirpath=...) first, "
                "or name another `store`."
            )
        if stopped is not None:
            keys = ", ".join(snapshot.key for snapshot in usable)
            rank_zero_warn(f"In {request.store}, {stopped} Scores are by the snapshots before that: {keys}.")
        check_model(store, request.module, first)


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
