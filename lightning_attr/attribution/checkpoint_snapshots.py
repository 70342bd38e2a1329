"""Checkpoints of a run as the snapshots of a store: weights, learning rates and moments, as far as they are in them."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor
from torch.optim import Optimizer

from lightning_attr.attribution.checkpoint_files import read_checkpoints
from lightning_attr.errors import StoreMismatchError
from lightning_attr.files.io import digest
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.parameters.optimizer_state import OptimizerState
from lightning_attr.parameters.trainable import trainable_names
from lightning_attr.parameters.weights import loaded, weights_of
from lightning_attr.store.feature_store import FeatureStore

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointSnapshots:
    """The checkpoint files of one run, to be entered into a store.

    Between two checkpoints the learning rate counts as the mean of both, times the steps between them; before the first
    it starts from the group's ``initial_lr``, where a scheduler has noted it. A checkpoint without optimizers
    (``save_weights_only=True``) has no learning rate.

    Args:
        module: of the run; its weights are put back.
        paths: of the files.
        optimizers: makes the optimizers of the module.
        moments: whether the moments of the optimizers are kept.
    """

    module: L.LightningModule
    paths: Sequence[str]
    optimizers: Callable[[], Sequence[Optimizer]]
    moments: bool

    def enter(self, store: FeatureStore) -> None:
        """Add each checkpoint as a snapshot; those that a killed run has added already are compared."""
        with tempfile.TemporaryDirectory(prefix="lightning_attr-") as folder:
            parts = read_checkpoints(self.paths, Path(folder))
            found = sorted(map(_Checkpoint, self.paths, parts), key=lambda one: one.global_step)
            self._check(store, found)
            before, rates = 0, None
            for one in found:
                rates = self._add(store, one, one.global_step - before, rates)
                before = one.global_step

    @staticmethod
    def _check(store: FeatureStore, found: Sequence[_Checkpoint]) -> None:
        """See that the checkpoints are moments of one run, and the only ones of the store."""
        for one, other in pairwise(found):
            if one.key == other.key:
                raise StoreMismatchError(
                    f"{one.path} and {other.path} are of the same step ({one.key}): each checkpoint is one moment of "
                    "one run. Of several runs, make a store each and join them with FeatureStore.merge."
                )
        others = {snapshot.key for snapshot in store.snapshots} - {one.key for one in found}
        if others:
            raise StoreMismatchError(
                f"{store.path} holds other snapshots than these checkpoints ({', '.join(sorted(others))}). Use another "
                "`store`, or attribute at its own snapshots, without `ckpt_path`."
            )

    def _add(
        self, store: FeatureStore, one: _Checkpoint, steps: int, then: Mapping[str, float] | None
    ) -> Mapping[str, float]:
        """Add a checkpoint, so many steps after those learning rates; returns its own."""
        parts = one.parts
        with loaded(self.module):
            self._load(one, parts)
            weights = {name: tensor.clone() for name, tensor in weights_of(self.module).items()}
        optimizers = self._optimizers(one, parts)
        now = _rates(optimizers, self.module, "lr")
        then = _rates(optimizers, self.module, "initial_lr") if then is None else then
        known = next((snapshot for snapshot in store.snapshots if snapshot.key == one.key), None)
        if known is not None and known.weights != digest(weights):
            raise StoreMismatchError(
                f"{store.path} holds {one.key!r} with other weights than {one.path}. Use another `store`."
            )
        if known is None:
            sums = {name: steps * (then.get(name, rate) + rate) / 2 for name, rate in now.items()}
            mean, rates = ParameterLayout.of(self.module).mean(sums)
            state = OptimizerState.of(optimizers, self.module).tensors() if self.moments and optimizers else None
            store.add_snapshot(
                one.key,
                weights,
                epoch=one.epoch,
                global_step=one.global_step,
                learning_rate=mean,
                optimizer=state,
                trainable=trainable_names(self.module),
                rates=rates,
            )
        return now

    def _load(self, one: _Checkpoint, parts: dict[str, Any]) -> None:
        """As Lightning does: the module's hook first, then its weights."""
        self.module.on_load_checkpoint(parts)
        try:
            self.module.load_state_dict(parts["state_dict"], strict=self.module.strict_loading)
        except RuntimeError as error:
            raise StoreMismatchError(
                f"{one.path} is a checkpoint of another module than {type(self.module).__name__}: "
                f"{' '.join(str(error).split())}"
            ) from error

    def _optimizers(self, one: _Checkpoint, parts: Mapping[str, Any]) -> Sequence[Optimizer]:
        """Those of the module, in the state of the checkpoint; none where it has none, or they do not fit."""
        states = parts.get("optimizer_states") or []
        if not states:
            log.warning("%s has no optimizer states: learning rate and moments of its moment are not known.", one.path)
            return []
        name = type(self.module).__name__
        try:
            optimizers = self.optimizers()
        except Exception as error:  # a user's code: attribution goes on without what it would have given
            log.warning(
                "`configure_optimizers` of %s fails here (%s: %s): the learning rate and moments in %s are not used.",
                name,
                type(error).__name__,
                error,
                one.path,
            )
            return []
        if len(optimizers) != len(states):
            raise StoreMismatchError(
                f"{one.path} has the states of {len(states)} optimizers, but `configure_optimizers` of {name} gives "
                f"{len(optimizers)}."
            )
        try:
            for optimizer, state in zip(optimizers, states, strict=True):
                optimizer.load_state_dict(state)
        except (ValueError, KeyError) as error:
            raise StoreMismatchError(
                f"The optimizer states of {one.path} do not fit what `configure_optimizers` of {name} gives: {error}"
            ) from error
        return optimizers


@dataclass(frozen=True)
class _Checkpoint:
    """A file, and the moment that it is of."""

    path: str
    parts: dict[str, Any]

    @property
    def epoch(self) -> int:
        return int(self.parts["epoch"])

    @property
    def global_step(self) -> int:
        return int(self.parts["global_step"])

    @property
    def key(self) -> str:
        return f"epoch={self.epoch:04d}-step={self.global_step:06d}"


def _rates(optimizers: Sequence[Optimizer], module: L.LightningModule, name: str) -> dict[str, float]:
    """Learning rate of each trainable parameter, where an optimizer has it."""
    names: Mapping[int, str] = {id(p): own for own, p in module.named_parameters() if p.requires_grad}
    found: dict[str, float] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            rate: float | Tensor | None = group.get(name)
            if rate is not None:
                found.update({names[id(p)]: float(rate) for p in group["params"] if id(p) in names})
    return found
