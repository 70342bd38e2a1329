"""Puts the user's module back to the snapshots of a store, and readies it for featurizing there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import lightning as L

from lightning_attr.attribution.processes import Processes
from lightning_attr.attribution.request import AttributionRequest
from lightning_attr.data.loader import DataSource
from lightning_attr.features.featurizer import AttributionPlan, Featurizer, apart_plan
from lightning_attr.features.learned_projection import learn_projection, settle_projection
from lightning_attr.features.second_direction import settle_directions, training_featurizer
from lightning_attr.features.transfer import samples_on_device, set_up_at
from lightning_attr.objectives.target_function import MeasuredOutput
from lightning_attr.parameters.trainable import set_trainable
from lightning_attr.parameters.weights import load_weights
from lightning_attr.randomness.draws import Samples
from lightning_attr.store.feature_store import FeatureStore
from lightning_attr.store.manifest import Snapshot
from lightning_attr.user_code.calls import set_surroundings
from lightning_attr.user_code.step_world import StepWorld
from lightning_attr.verification.gradient_paths import Plans
from lightning_attr.verification.probe import look_at
from lightning_attr.verification.recorded_losses import check_recorded_losses
from lightning_attr.verification.target_check import check_target_function


@dataclass(frozen=True)
class LoadedSnapshot:
    """The snapshot that a module is at, and what featurizes training samples and targets there."""

    key: str
    featurizer: Featurizer
    target_featurizer: Featurizer
    layers: Mapping[str, slice] | None


class Restorer:
    """Gives the user's module at any snapshot of a store.

    Args:
        request: what is to be done.
        store: of the snapshots.
        trainer: that runs it.
        processes: all that attribute together.
        world: of the user's trainer, before it was lent.
    """

    def __init__(
        self,
        request: AttributionRequest,
        store: FeatureStore,
        trainer: L.Trainer,
        processes: Processes,
        world: StepWorld | None,
    ) -> None:
        self.request = request
        self.store = store
        self.trainer = trainer
        self.processes = processes
        self.world = world
        self.plans = Plans(trainer, request.module, request.datamodule, request.train, request.mode)
        self.precision = trainer.precision_plugin.forward_context
        self._looked = self._checked_targets = False

    def look(self, key: str) -> None:
        """Look at module and data at their first snapshot: how samples are read depends on what is found."""
        if self._looked:
            return
        self.restore(key)
        self.plans.current()  # a module fresh from its constructor may behave like no trained one
        train, targets = self.request.train, self.request.targets
        if targets is not None:
            targets.form.apart |= train.form.apart
            look_at(self.trainer, self.request.module, self.request.datamodule, targets)
        self._looked = True

    def restore(self, key: str) -> Snapshot:
        """Put the module back to a snapshot: its weights, which of them were trained, and the world of its fit."""
        module, snapshot = self.request.module, self.store.snapshot(key)
        load_weights(module, self.store.weights(key))
        set_trainable(module, snapshot.trainable)
        if self.world is not None:
            set_surroundings(module, self.world.at(snapshot.epoch, snapshot.global_step))
        return snapshot

    def load(self, key: str) -> LoadedSnapshot:
        """Put the module back to a snapshot, learn there what the store misses, and check what was recorded."""
        store, method, memory = self.store, self.request.method, self.request.memory
        stream = self.restore(key).projection
        # Checked at a snapshot: a module fresh from its constructor may behave like no trained one.
        layout, plan = self.plans.current()
        self.set_up(stream)
        projection = method.projection_at(layout, stream, partial(store.optimizer_state, key))
        module, train, together = self.request.module, self.request.train, self.processes.together
        samples = self.samples(train)
        learn = partial(learn_projection, projection, store, key, module, plan, samples, self.precision)
        settle_directions(store, key, module, method.second_directions, together)
        with together():  # what the next snapshot has is decided by all from the same record
            settle_projection(projection, store, key, learn, together)
        featurizer = training_featurizer(store, key, module, plan, projection, memory)
        check_recorded_losses(featurizer, store, key, samples, self.precision, train.form, self.world)
        target_plan = self.target_plan(plan)
        settings = (target_plan, method.bind_targets(projection), memory, stream, self.request.first_target)
        target_featurizer = Featurizer(module, *settings)
        self._check_targets(target_plan, stream)
        return LoadedSnapshot(key, featurizer, target_featurizer, projection.layers)

    def _check_targets(self, plan: AttributionPlan, stream: str) -> None:
        """Try the user's target function, once."""
        if self.request.target_function is not None and not self._checked_targets:
            targets = self.samples(self.request.target_source)
            check_target_function(plan.objective, targets, stream, self.precision, plan.seeded)
        self._checked_targets = True

    def target_plan(self, plan: AttributionPlan) -> AttributionPlan:
        """Say how targets are featurized where training samples are featurized by a plan."""
        if self.request.target_function is not None:
            plan = replace(plan, objective=MeasuredOutput(self.request.module, self.request.target_function))
        return apart_plan(plan) if self.request.target_source.form.apart else plan

    def set_up(self, stream: str) -> None:
        """Let the module compute what it needs of the training samples at the snapshot that it is at."""
        set_up_at(stream, self.trainer, self.request.module, self.request.datamodule, self.request.train)

    def samples(self, source: DataSource) -> Samples:
        """Give samples as training sees them."""
        return samples_on_device(self.trainer, self.request.module, self.request.datamodule, source)
