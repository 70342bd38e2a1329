"""Before the first step: the data is found, and a few samples go the whole way, so that what fails fails now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import lightning as L
from torch import Tensor

from lightning_attr.attribution.arguments import check_noise_mask
from lightning_attr.callbacks.beside import beside_training
from lightning_attr.callbacks.featurizing import settle
from lightning_attr.data.loader import DataSource
from lightning_attr.data.memory import MemoryBudget
from lightning_attr.data.sources import train_source
from lightning_attr.features.second_direction import tried
from lightning_attr.methods import AttributionMethod
from lightning_attr.objectives.objective import describe_output
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.parameters.optimizer_state import OptimizerState
from lightning_attr.parameters.trainable import parameter_count, parameter_shapes
from lightning_attr.projectors import LearnedProjection
from lightning_attr.store.feature_dtype import row_bytes
from lightning_attr.store.manifest import Fingerprint
from lightning_attr.verification.gradient_paths import Plans


@dataclass(frozen=True)
class RecordingRequest:
    """What is to be recorded, as the arguments of :class:`AttributionCallback` say it."""

    method: AttributionMethod
    featurize: bool | None
    noise_mask: Tensor | None
    batch_size: int | None
    feature_dtype: str
    memory_budget: int | None
    optimizer_state: bool
    mode: str | None
    owner: object
    """Whom messages name."""

    def state(self, trainer: L.Trainer, pl_module: L.LightningModule) -> OptimizerState | None:
        """Give what the optimizers know, where it is kept."""
        return OptimizerState.of(trainer.optimizers, pl_module) if self.optimizer_state else None


@dataclass(frozen=True)
class Preparation:
    """What is known of a run before its first step.

    Args:
        request: what is to be recorded.
        source: the training data.
        plans: how the module is featurized.
        method: what scores, with nothing left to choose.
        featurize: whether features are computed while training.
        noise_mask: as the request has it, checked.
        memory: what a batch may take.
        layers: which features are of which layer.
        bytes_per_row: that the store keeps of each sample.
        basis_bytes: that it keeps of what a projection learns at a snapshot.
    """

    request: RecordingRequest
    source: DataSource
    plans: Plans
    method: AttributionMethod
    featurize: bool
    noise_mask: Tensor | None
    memory: MemoryBudget
    layers: Mapping[str, slice] | None = None
    bytes_per_row: int = 0
    basis_bytes: int = 0

    @property
    def mode(self) -> str:
        """That the module is attributed in; eval until it is known."""
        return self.plans.mode or "eval"

    def fingerprint(self, pl_module: L.LightningModule) -> Fingerprint:
        """Say what the store is written for."""
        return Fingerprint(
            len(self.source),
            self.source.digest(),
            parameter_shapes(pl_module),
            self.method.projector_config if self.featurize else None,
            describe_output(pl_module),
            self.mode,
        )

    def tried(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Preparation:
        """Go the whole way with a few samples, and enter what that tells."""
        plan, batch, rows = self.plans.probe()
        state = self.request.state(trainer, pl_module)  # refused now where it is wanted and there is none
        projection = self.method.projection_at(ParameterLayout.of(pl_module), "", lambda: state)
        basis_bytes, precision = 0, trainer.precision_plugin.forward_context
        if isinstance(projection, LearnedProjection):
            projection.rehearse()  # learning looks at more samples, and nobody would keep what it finds here
            basis_bytes = sum(tensor.nbytes for tensor in projection.basis.values())
        wanted, n_train = self.method.second_directions, len(self.source)
        with precision():
            columns = tried(pl_module, plan, projection, self.memory, batch, rows, wanted, n_train)
        size = row_bytes(columns, self.request.feature_dtype) if self.featurize else 0
        return replace(self, layers=projection.layers, bytes_per_row=size, basis_bytes=basis_bytes)


def prepare(request: RecordingRequest, trainer: L.Trainer, pl_module: L.LightningModule, read: bool) -> Preparation:
    """Find the data, and go the whole way with a few samples.

    Returns what is known of the run.
    """
    datamodule = getattr(trainer, "datamodule", None)
    source = train_source(trainer, pl_module, datamodule, batch_size=request.batch_size)
    noise_mask = check_noise_mask(request.noise_mask, len(source), request.owner)
    plans = Plans(trainer, pl_module, datamodule, source, request.mode)
    numbers = len(source), parameter_count(pl_module)
    method, featurize = settle(request.method, request.featurize, *numbers, read)
    memory = MemoryBudget(request.memory_budget, careful=True)  # another run may have larger samples
    found = Preparation(request, source, plans, method, featurize, noise_mask, memory)
    with beside_training(trainer, pl_module, source, "eval", None, dict):
        found = found.tried(trainer, pl_module)
    if request.batch_size is None and source.stacks:
        found = replace(found, source=replace(source, batch_size=memory.comfortable(source.batch_size)))
    return found
