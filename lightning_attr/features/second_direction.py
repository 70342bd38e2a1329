"""Rows of second directions: what the kernel of TRAK needs beside the gradients of the model output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_attr.batches.nested import select_rows
from lightning_attr.batches.samples_apart import SamplesApart
from lightning_attr.data.memory import MemoryBudget
from lightning_attr.features.featurizer import AttributionPlan, Featurizer
from lightning_attr.features.shared_forward import SharedForwardFeaturizer, shares_forward, words_of
from lightning_attr.gradients.functional import call_with
from lightning_attr.objectives.apart import OutputApart
from lightning_attr.objectives.mixin import attribution_outputs
from lightning_attr.objectives.objective import draws_of, has_mixin
from lightning_attr.outputs import SampleDraws, curvature_of
from lightning_attr.projectors import Projection
from lightning_attr.store.feature_dtype import SECOND
from lightning_attr.store.feature_store import FeatureStore

_TOGETHER = 0.5
"""Share of the samples with second directions from which on those of all go through the forward pass together."""
_ROWS_A_FEATURE = 4
"""Samples with second directions for each feature of the kernel that they enter."""


def module_curvature(module: Any) -> str:
    """Say how the Gauss-Newton matrix of a module's training loss is known.

    Returns as :attr:`lightning_attr.outputs.ModelOutput.curvature`; "unknown" for a module without the mixin.

    Example:
        >>> from lightning_attr import AttributionMixin
        >>> class Classifier(AttributionMixin, torch.nn.Linear): ...
        >>> module_curvature(Classifier(2, 3)), module_curvature(torch.nn.Linear(2, 3))
        ('rest', 'unknown')
    """
    return curvature_of(module.model_output) if has_mixin(module) else "unknown"


@dataclass(frozen=True)
class SecondOutput:
    """The second direction of a module's model output, in the place of the output.

    Its batches are pairs of a batch and a word a sample, from which the signs are drawn.

    Args:
        module: with the mixin.
        scale: of the direction; features need not be linear in it.

    Example:
        >>> from lightning_attr import AttributionMixin
        >>> class Classifier(AttributionMixin, torch.nn.Linear): ...
        >>> batch = (torch.ones(4, 2), torch.tensor([0, 1, 2, 0])), torch.arange(4)
        >>> SecondOutput(Classifier(2, 3)).forward(batch, 4)[0].shape
        torch.Size([4])
    """

    module: Any = field(repr=False, compare=False)
    scale: float = 1.0

    def forward(self, batch: Any, batch_size: int) -> tuple[Tensor, Any]:
        """Value of each sample, ``(b,)``, and nothing."""
        return self._called(batch), None

    def columns(self, batch: Any, output: Tensor, seen: Any) -> dict[str, Tensor]:
        """Nothing beside the features."""
        return {}

    def sample_outputs(self, batch: Any, batch_size: int) -> Tensor:
        """Value of each sample, ``(b,)``."""
        return self._called(batch)

    def functional_output(self, params: Mapping[str, Tensor], batch: Any) -> Tensor:
        """Value at given parameters."""
        value: Tensor = call_with(self.module, params, lambda batch: self._called(batch), batch)
        return value

    def total_loss(self, params: Mapping[str, Tensor], batch: Any, batch_size: int) -> Tensor:
        """Sum of the values at given parameters, ``()``."""
        return self.losses(params, batch, batch_size).sum()

    def losses(self, params: Mapping[str, Tensor], batch: Any, batch_size: int) -> Tensor:
        """Values at given parameters, ``(b,)``."""
        return self.functional_output(params, batch)

    def _called(self, batch: Any) -> Tensor:
        inner, words = batch
        value: Tensor = self.module.model_output.second_direction(
            *attribution_outputs(self.module, inner), SampleDraws(words)
        )
        return self.scale * value


class SecondFeaturizer:
    r"""Computes the projected second directions of a snapshot's training samples, :math:`P g / \sqrt{r \pi}`.

    Their outer products, added up over the ``r`` directions of a sample, have the expectation :math:`P E[g g^\top]
    P^\top`; so they have if only a share :math:`\pi` of the samples has any. They depend on snapshot and row alone.
    Where the model output is the mean of several draws, so is the loss, and every draw has signs of its own.

    Args:
        module: as in :class:`lightning_attr.features.featurizer.Featurizer`.
        plan: as there, of the training samples.
        projection: the snapshot's.
        memory: as there.
        snapshot: key of the random numbers.
        directions: ``r``.
        share: :math:`\pi`, of the samples that have directions; the others have zeros.

    Example:
        >>> from lightning_attr import AttributionMixin
        >>> from lightning_attr.features.featurizer import plan
        >>> from lightning_attr.parameters.layout import ParameterLayout
        >>> from lightning_attr.projectors import IdentityProjector
        >>> class Classifier(AttributionMixin, torch.nn.Linear): ...
        >>> module, batch = Classifier(2, 3).eval(), (torch.randn(4, 2), torch.tensor([0, 1, 2, 0]))
        >>> identity = IdentityProjector().bind(ParameterLayout.of(module), "final")
        >>> SecondFeaturizer(module, plan(module, batch, 4), identity, None, "final", 2)(batch, [0, 1, 2, 3]).shape
        torch.Size([4, 2, 9])
    """

    def __init__(
        self,
        module: Any,
        plan: AttributionPlan,
        projection: Projection,
        memory: MemoryBudget | None,
        snapshot: str,
        directions: int,
        share: float = 1.0,
    ) -> None:
        self.snapshot = snapshot
        self.share = share
        self.plan = plan
        # The mean over draws of a mean loss: E[g g'] of a mean of directions is over the draws' number once more.
        self.scale = (draws_of(module) / directions / share) ** 0.5
        output = SecondOutput(module, self.scale)
        apart = isinstance(plan.objective, OutputApart)
        second = replace(plan, objective=OutputApart(output) if apart else output)
        self.each = [_OfDirection(module, second, projection, memory, snapshot, number) for number in range(directions)]

    def __call__(self, batch: Any, rows: Sequence[int], late: bool = False) -> Tensor:
        """Featurize a batch.

        Returns ``(b, r, dim)``, float32 (float64 for a float64 module).
        """
        first, places = self.each[0], self.chosen(rows)
        device = next(first.module.parameters()).device
        found = torch.zeros(len(rows), len(self.each), first.projection.dim, dtype=first.dtype, device=device)
        if places:
            own = batch if len(places) == len(rows) else select_rows(batch, len(rows), places)
            own_rows = [rows[place] for place in places]
            index = torch.tensor(places).to(device, non_blocking=True)
            for number, one in enumerate(self.each):
                found[index, number] = (one.late if late else one)(own, own_rows)["features"]
        return found

    def chosen(self, rows: Sequence[int]) -> list[int]:
        """Places of the samples that have directions."""
        if self.share >= 1:
            return list(range(len(rows)))
        drawn = SampleDraws.of(rows, "share of second directions", self.snapshot).uniforms()
        return (drawn < self.share).nonzero().flatten().tolist()


class GaussNewtonFeaturizer(SharedForwardFeaturizer):
    """A featurizer of training samples whose rows have second directions as well.

    Args:
        second: computes them, where they cannot share a forward pass or few samples have any.

    Attributes:
        second: as passed.

    Example:
        >>> from lightning_attr import AttributionMixin
        >>> from lightning_attr.features.featurizer import plan
        >>> from lightning_attr.parameters.layout import ParameterLayout
        >>> from lightning_attr.projectors import IdentityProjector
        >>> class Classifier(AttributionMixin, torch.nn.Linear): ...
        >>> module, batch = Classifier(2, 3).eval(), (torch.randn(4, 2), torch.tensor([0, 1, 2, 0]))
        >>> identity = IdentityProjector().bind(ParameterLayout.of(module), "final")
        >>> second = SecondFeaturizer(module, plan(module, batch, 4), identity, None, "final", 1)
        >>> GaussNewtonFeaturizer(second)(batch, [0, 1, 2, 3])["second_features"].shape
        torch.Size([4, 1, 9])
    """

    def __init__(self, second: SecondFeaturizer) -> None:
        one = second.each[0]
        own = Featurizer(one.module, second.plan, one.projection, one.memory, second.snapshot)
        together = second.share >= _TOGETHER and shares_forward(own)
        super().__init__(own, len(second.each) if together else 0, second.scale)
        self.second = second

    def _whole(self, batch: Any, rows: Sequence[int], out: Tensor | None, late: bool) -> dict[str, Tensor]:
        columns = super()._whole(batch, rows, out, late)
        if SECOND not in columns:
            return {**columns, SECOND: self.second(batch, rows, late)}
        if self.second.share < 1:
            left_out = torch.ones(len(rows), 1, 1, dtype=torch.bool)
            left_out[self.second.chosen(rows)] = False
            columns[SECOND].masked_fill_(left_out.to(columns[SECOND].device, non_blocking=True), 0)
        return columns


def second_share(n_train: int, dim: int) -> float:
    """Choose the share of the training samples that have stored second directions.

    They enter nothing but the sum that a kernel of ``dim`` features is.

    Returns so that four times ``dim`` of them have some, at most 1.

    Example:
        >>> second_share(1_000, 512), second_share(8_192, 512)
        (1.0, 0.25)
    """
    return min(1.0, _ROWS_A_FEATURE * dim / n_train)


def training_featurizer(
    store: FeatureStore,
    key: str,
    module: Any,
    plan: AttributionPlan,
    projection: Projection,
    memory: MemoryBudget | None,
) -> Featurizer:
    """Give what computes the rows of a snapshot's training samples."""
    snapshot = store.snapshot(key)
    number, stream = snapshot.directions or 0, snapshot.projection
    return featurizer_with(module, plan, projection, memory, stream, number, store.fingerprint.length)


def featurizer_with(
    module: Any,
    plan: AttributionPlan,
    projection: Projection,
    memory: MemoryBudget | None,
    stream: str,
    directions: int,
    n_train: int,
) -> Featurizer:
    """Give the same for a number of second directions, 0 for none."""
    if not directions or projection.dim == 0:
        return Featurizer(module, plan, projection, memory, stream)
    share = second_share(n_train, projection.dim)
    return GaussNewtonFeaturizer(SecondFeaturizer(module, plan, projection, memory, stream, directions, share))


def tried(
    module: Any,
    plan: AttributionPlan,
    projection: Projection,
    memory: MemoryBudget,
    batch: Any,
    rows: Sequence[int],
    wanted: Callable[[str], int],
    n_train: int,
) -> dict[str, Tensor]:
    """Go the whole way with a few samples, before anything is recorded.

    Returns the columns of the samples, with as many second directions as the average row will have.
    """
    directions = wanted(module_curvature(module))
    if not directions or projection.dim == 0:
        return Featurizer(module, plan, projection, memory)(batch, rows)
    columns = GaussNewtonFeaturizer(SecondFeaturizer(module, plan, projection, memory, "", directions))(batch, rows)
    second = columns[SECOND].flatten(1)
    return {**columns, SECOND: second[:, : int(second_share(n_train, projection.dim) * second.shape[1])]}


def directions_of(store: FeatureStore, key: str, module: Any = None) -> dict[str, Any]:
    """Say which second directions the features of a snapshot have, for a method.

    Returns ``directions`` and ``curvature`` of :class:`lightning_attr.methods.SnapshotFeatures`.
    """
    snapshot = store.snapshot(key)
    return {
        "directions": snapshot.directions or 0,
        "curvature": snapshot.curvature or ("unknown" if module is None else module_curvature(module)),
    }


def note_directions(store: FeatureStore, key: str, module: Any, wanted: Callable[[str], int]) -> None:
    """Begin the features of a snapshot with second directions; where some were computed without, it goes on so."""
    curvature, snapshot = module_curvature(module), store.snapshot(key)
    directions = wanted(curvature)
    if directions and snapshot.directions is None and not snapshot.shards:
        store.set_directions(key, directions, curvature)


def settle_directions(
    store: FeatureStore,
    key: str,
    module: Any,
    wanted: Callable[[str], int],
    together: Callable[[], AbstractContextManager[Any]],
) -> None:
    """Begin the features of a snapshot as :func:`note_directions` does; all processes call it together."""
    snapshot = store.snapshot(key)
    if wanted(module_curvature(module)) and snapshot.directions is None and not snapshot.shards:
        with together():
            if store.writer:
                note_directions(store, key, module, wanted)
        with together():  # before another one writes the record again
            store.reload()


class _OfDirection(Featurizer):
    """A featurizer whose batches come with the words of a direction's signs."""

    def __init__(
        self,
        module: Any,
        plan: AttributionPlan,
        projection: Projection,
        memory: MemoryBudget | None,
        snapshot: str,
        number: int,
    ) -> None:
        super().__init__(module, plan, projection, memory, snapshot)
        self.number = number

    def given(self, batch: Any, rows: Sequence[int], number: int) -> Any:
        completed = super().given(batch, rows, number)
        device = next(self.module.parameters()).device
        words = words_of(rows, self.snapshot, self.number, number, device)
        if isinstance(completed, SamplesApart):
            return SamplesApart((one, words[i : i + 1]) for i, one in enumerate(completed))
        return completed, words
