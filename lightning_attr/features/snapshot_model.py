"""The module as it was at a snapshot, with the data: for methods that need more than stored features."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_attr.batches.nested import dense_parts, select_rows
from lightning_attr.batches.samples_apart import SamplesApart
from lightning_attr.data.memory import MemoryBudget
from lightning_attr.errors import AttributionError
from lightning_attr.features.featurizer import AttributionPlan, Featurizer, plan
from lightning_attr.features.kept_files import Shapes, read_kept
from lightning_attr.features.second_direction import SecondFeaturizer, module_curvature
from lightning_attr.files.io import write_tensors
from lightning_attr.files.paths import inside, is_there
from lightning_attr.objectives.objective import completed, draws_of
from lightning_attr.parameters.layout import ParameterLayout, real_dtype
from lightning_attr.parameters.weights import load_weights, weights_of
from lightning_attr.projectors import GradientFactors, Projection
from lightning_attr.randomness.draws import Draw
from lightning_attr.replay.recorded_run import RecordedRun

Batches: TypeAlias = "Iterator[tuple[Sequence[int], Any]]"

log = logging.getLogger(__name__)

_ON_GRADIENTS = (
    "Take one on gradients of single samples: TRAK, TracIn, GradDot, GradCos, LESS, GAS, ProjectedInfluence, LoGra, "
    "FactGraSS."
)
_KEPT_BYTES = 2**28
"""Batches that stay in memory between passes: a solver goes through the data a hundred times."""


@dataclass(frozen=True)
class SnapshotModel:
    """One snapshot, ready to run on the training samples of this process and on all targets.

    Several snapshots may share a module: call :meth:`load` before anything that runs it.

    Args:
        module: the user's module, in eval mode.
        plan: what is attributed, and the gradient path of each parameter.
        key: of the snapshot's random streams; like the key of its projection, it is the same wherever the snapshot is.
        n_train: training samples, of all processes.
        load: puts the snapshot's weights into the module.
        train_batches: gives this process's training samples as ``(rows, batch)`` on the module's device, the rows of a
            batch in sequence.
        target_batches: gives the targets of the rows wanted, likewise; every process has all targets.
        target_plan: as ``plan``, of the targets, where another function of the module is measured there.
        precision: the context that forward passes run in.
        memory: what a batch may take; without it, nothing is split.
        reduce: sums a tensor over all processes, in place, and returns it.
        folder: the snapshot's own, for :meth:`kept`; None keeps nothing.
        place: what the files there say that they are, see :meth:`lightning_attr.store.FeatureStore.place`.
        writer: whether this process writes there.
        train_digest: hash of the training data, where it is known.
        target_digest: hash of the targets; that of the training data where they are the targets.
        run: gives the recorded run that the snapshot is of, to be replayed; None where there is no record of it.
        first_target: added to the rows of targets where random numbers are drawn for them; see
            :class:`lightning_attr.features.featurizer.Featurizer`.

    Example:
        >>> from lightning_attr import AttributionMixin
        >>> from lightning_attr.projectors import IdentityProjector
        >>> class Classifier(AttributionMixin, nn.Linear): ...
        >>> batch = (torch.eye(2), torch.tensor([0, 1]))
        >>> model = SnapshotModel.of(Classifier(2, 3).eval(), [batch], [batch])
        >>> identity = IdentityProjector().bind(model.layout, model.key)
        >>> [(rows, tuple(columns["features"].shape)) for rows, columns in model.train(identity)]
        [(range(0, 2), (2, 9))]
    """

    module: nn.Module
    plan: AttributionPlan
    key: str
    n_train: int
    load: Callable[[], None]
    train_batches: Callable[[], Batches]
    target_batches: Callable[[Sequence[int]], Batches]
    target_plan: AttributionPlan | None = None
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext
    memory: MemoryBudget | None = None
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor
    folder: Path | None = None
    place: Mapping[str, str] = field(default_factory=dict)
    writer: bool = True
    train_digest: str | None = None
    target_digest: str | None = None
    first_target: int = 0
    run: Callable[[], RecordedRun] | None = None
    layout: ParameterLayout = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layout", ParameterLayout.of(self.module))

    @classmethod
    def of(cls, module: nn.Module, train: Sequence[Any], targets: Sequence[Any], key: str = "current") -> SnapshotModel:
        """Make one of a module at its current weights and of batches that are in memory.

        Returns the model, of one process.
        """
        numbered = [_numbered(batches) for batches in (train, targets)]
        weights = {name: tensor.clone() for name, tensor in weights_of(module).items()}
        return cls(
            module,
            plan(module, train[0], len(numbered[0][0][0])),
            key,
            n_train=sum(len(rows) for rows, _ in numbered[0]),
            load=lambda: load_weights(module, weights),
            train_batches=lambda: iter(numbered[0]),
            target_batches=lambda rows: _restricted(numbered[1], rows),
        )

    @property
    def device(self) -> torch.device:
        """Where the module is."""
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """In which its features and gradients are: float32, or float64 for a float64 module."""
        trainable = next(p for p in self.module.parameters() if p.requires_grad)
        return torch.promote_types(real_dtype(trainable.dtype), torch.float32)

    def parameters(self) -> dict[str, Tensor]:
        """Name the attributed parameters, in the order of the layout.

        Returns name -> tensor, detached, not copied.
        """
        return {name: p.detach() for name, p in self.module.named_parameters() if p.requires_grad}

    def gradient_factors(self, weights: Mapping[str, float] | None = None) -> GradientFactors:
        """Keep gradients whole, in their shortest form.

        Returns the map, for :meth:`train` and :meth:`targets`.
        """
        # The mean of outer products is none; and other functions of the module may use its layers in other ways.
        alike = draws_of(self.module) == 1 and self.target_plan in (None, self.plan)
        return GradientFactors(self.layout, self.plan.outer if alike else (), weights)

    def train(
        self, projection: Projection, wanted: Container[int] | None = None
    ) -> Iterator[tuple[range, dict[str, Tensor]]]:
        """Featurize this process's training samples, or the batches of them that have rows wanted.

        Yields rows, and their columns as :class:`lightning_attr.features.featurizer.Featurizer` gives them.
        """
        featurizer = Featurizer(self.module, self.plan, projection, self.memory, self.key)
        for rows, batch in self.train_batches():
            if wanted is not None and not any(row in wanted for row in rows):
                continue
            with self.precision():
                columns = featurizer(batch, rows)
            yield range(rows[0], rows[-1] + 1), columns

    def second_directions(self, projection: Projection, directions: int) -> Iterator[tuple[range, Tensor]]:
        """Featurize the second directions of this process's training samples.

        Yields rows, and ``(b, directions, dim)`` as :class:`lightning_attr.features.second_direction.SecondFeaturizer`
        gives them.
        """
        featurizer = SecondFeaturizer(self.module, self.plan, projection, self.memory, self.key, directions)
        for rows, batch in self.train_batches():
            with self.precision():
                features = featurizer(batch, rows)
            yield range(rows[0], rows[-1] + 1), features

    @property
    def curvature(self) -> str:
        """How the Gauss-Newton matrix of the training loss is known; see :attr:`ModelOutput.curvature`."""
        return module_curvature(self.module)

    def targets(self, projection: Projection, rows: Sequence[int]) -> dict[str, Tensor]:
        """Featurize targets.

        Returns columns ``(len(rows), ...)``, in that order.
        """
        if not len(rows):
            return {"features": torch.zeros(0, projection.dim, dtype=self.dtype, device=self.device)}
        targets_plan = self.target_plan or self.plan
        featurizer = Featurizer(self.module, targets_plan, projection, self.memory, self.key, self.first_target)
        parts: list[dict[str, Tensor]] = []
        for numbers, batch in self.target_batches(rows):
            with self.precision():
                parts.append(featurizer(batch, numbers))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    @property
    def said_apart(self) -> str:
        """What is said to methods that need whole batches, where samples cannot be taken from them."""
        return (
            f"Samples of {type(self.module).__name__} cannot be taken from a batch, and are run one by one, but this "
            "method runs the module on whole batches."
        )

    def completed(self, rows: Sequence[int], batch: Any) -> Any:
        """Complete a batch with what the module draws for its samples, for what runs the module on it.

        Returns what the attribution step takes.
        """
        if isinstance(batch, SamplesApart):
            raise AttributionError(f"{self.said_apart} {_ON_GRADIENTS}")
        if self.plan.seeded:
            raise AttributionError(
                f"Expected {type(self.module).__name__} to have nothing random in train mode, but it "
                "has (dropout, noise): this method runs the module itself, on all samples of a batch at once. Take one "
                "on gradients of single samples (TRAK, TracIn, GradDot, GradCos, LESS, GAS, ProjectedInfluence, LoGra, "
                'FactGraSS), or mode="eval".'
            )
        draws = draws_of(self.module)
        if draws > 1:
            raise AttributionError(
                f"Expected `attribution_draws` of {type(self.module).__name__} to be 1, but got {draws}: this method "
                "runs the module itself, and would see the first draw only. Take a method on stored features, which "
                "are means over draws: TRAK, TracIn, GradDot, GradCos, LESS, GAS, ProjectedInfluence, LoGra, FactGraSS."
            )
        return completed(self.module, batch, Draw(rows, self.key, device=self.device))

    def total_loss(self, params: Mapping[str, Tensor], batch: Any, batch_size: int) -> Tensor:
        """Sum the training loss over a batch, as a function of the parameters, for products with its curvature."""
        return self.plan.objective.total_loss(params, batch, batch_size)

    def kept(
        self,
        name: str,
        compute: Callable[[], dict[str, Tensor]],
        shapes: Shapes | None = None,
        optional: Sequence[Sequence[str]] = (),
    ) -> dict[str, Tensor]:
        """Compute something costly once: a run that was killed, or the next one, reads it.

        All processes call it together; ``compute`` has to :attr:`reduce` at least once, so that none is still looking
        for the file when it appears.
        """
        path = None if self.folder is None else inside(self.folder.parent, self.folder.name, f"{name}.safetensors")
        place = {**self.place, "name": name, **({} if self.train_digest is None else {"data": self.train_digest})}
        if path is not None and is_there(path):
            return read_kept(path, place, shapes, optional)
        tensors = compute()
        if path is not None and self.writer:
            try:
                write_tensors(path, tensors, place)
            except AttributionError as error:  # a store that may only be read, a full disk: the next run computes it
                log.warning("What was computed at snapshot %r is not kept. %s", self.key, error)
        return tensors


def _numbered(batches: Sequence[Any]) -> list[tuple[range, Any]]:
    numbered, start = [], 0
    for batch in batches:
        size = len(next(leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)))
        numbered.append((range(start, start + size), batch))
        start += size
    return numbered


def _restricted(numbered: Sequence[tuple[range, Any]], rows: Sequence[int]) -> Batches:
    for numbers, batch in numbered:
        wanted = [i for i, row in enumerate(numbers) if row in rows]
        if wanted:
            yield [numbers[i] for i in wanted], select_rows(batch, len(numbers), wanted)


class Replay:
    """Goes through batches again and again, and keeps them after the first time if they are small.

    Args:
        read: reads them.

    Example:
        >>> reads = []
        >>> replay = Replay(lambda: iter([reads.append("read") or (range(1), torch.ones(1))]))
        >>> for _ in range(3):
        ...     batches = list(replay())
        >>> reads
        ['read']
    """

    def __init__(self, read: Callable[[], Batches]) -> None:
        self.read = read
        self._kept: list[tuple[Sequence[int], Any]] | None = None

    def __call__(self) -> Batches:
        """Yield ``(rows, batch)``."""
        if self._kept is not None:
            yield from self._kept
            return
        kept, size = [], 0
        for item in self.read():
            leaves = (leaf for leaf in tree_leaves(item[1]) if isinstance(leaf, Tensor))
            size += sum(part.nbytes for leaf in leaves for part in dense_parts(leaf))
            if size <= _KEPT_BYTES:
                kept.append(item)
            else:
                kept.clear()
            yield item
        if size <= _KEPT_BYTES:
            self._kept = kept
