"""What an attribution method is: features of the training set and of targets in, scores out, block after block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_attr.arguments.checks import check_instance
from lightning_attr.features.snapshot_model import SnapshotModel
from lightning_attr.methods.cache import CacheKey, SnapshotCache
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.parameters.optimizer_state import OptimizerState
from lightning_attr.projectors import NoProjection, Projection, Projector
from lightning_attr.projectors.base import check_projector
from lightning_attr.projectors.unchosen import UnchosenProjector

T = TypeVar("T")

_EVIDENCE: CacheKey[dict[str, Any]] = CacheKey("evidence")


@dataclass(frozen=True)
class SnapshotFeatures:
    """What a method sees of one snapshot.

    Args:
        blocks: reads the training rows that this process scores, block after block: ``(rows, columns)`` with the
            columns of the store, ``features`` ``(b, k)`` and ``output``, ``loss``, ``out_to_loss``, ``newton_weight``
            ``(b,)``.
        targets: the same columns for the targets, ``(m, ...)``.
        learning_rate: its sum over the optimizer steps that the snapshot stands for.
        reduce: sums a tensor over all processes, in place, and returns it.
        cache: for what a method computes of the training rows alone, see :class:`lightning_attr.methods.SnapshotCache`.
        target_rows: which targets these are.
        model: the module at the snapshot; None where features are all there is.
        layers: columns of the features by layer; None where the projection mixes layers.
        n_train: training samples of all processes; 0 where that is not known.
        key: name of the snapshot in the store; snapshots of several runs differ in what is before its last slash.
        rates: parameter name -> sum of its own learning rate, where they differ; None where all are ``learning_rate``,
            which is their mean over all entries otherwise.
        n_drawn: training samples that training can draw; 0 for all.
        directions: second directions a sample in the columns, ``second_features`` ``(b, directions, k)``; 0 without.
        curvature: how the Gauss-Newton matrix of the loss is known, see
            :attr:`lightning_attr.outputs.ModelOutput.curvature`.
        wanted: the only training rows whose scores are wanted, of self-influence none; None for all. A method may score
            more of them.
        optimizers: settings of the run's optimizers, as
            :func:`lightning_attr.parameters.optimizer_settings.optimizer_settings` gives them; None where they were not
            recorded.
        optimizer_state: reads what the optimizers knew there; None where there are features only.

    Example:
        >>> import torch
        >>> SnapshotFeatures.of({"features": torch.ones(3, 2)}, {"features": torch.ones(1, 2)}).learning_rate
        1.0
    """

    blocks: Callable[[], Iterator[tuple[range, Mapping[str, Tensor]]]]
    targets: Mapping[str, Tensor]
    learning_rate: float = 1.0
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor
    cache: SnapshotCache = field(default_factory=SnapshotCache)
    target_rows: range = range(0)
    model: SnapshotModel | None = None
    layers: Mapping[str, slice] | None = None
    n_train: int = 0
    key: str = "current"
    rates: Mapping[str, float] | None = None
    n_drawn: int = 0
    directions: int = 0
    curvature: str = "unknown"
    wanted: frozenset[int] | None = None
    optimizers: Sequence[Mapping[str, Any]] | None = None
    optimizer_state: Callable[[], OptimizerState] | None = None

    @property
    def evidence(self) -> dict[str, Any]:
        """What the method found out at this snapshot, for the record of the result."""
        return self.cache.once(_EVIDENCE, dict)

    @property
    def numel(self) -> int:
        """Numbers that a method keeps of one target: its features, or its gradient where it runs the module."""
        features = self.targets["features"].shape[1]
        return features if self.model is None else max(features, self.model.layout.numel)

    @classmethod
    def of(cls, train: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> SnapshotFeatures:
        """Wrap columns that are in memory.

        Args:
            train: column name -> ``(n, ...)``.
            targets: column name -> ``(m, ...)``.

        Returns:
            One block of all rows.
        """
        rows = range(len(train["features"]))
        m = len(targets["features"])
        return cls(lambda: iter([(rows, train)]), targets, target_rows=range(m), n_train=len(rows))

    @classmethod
    def at(cls, model: SnapshotModel, targets: Mapping[str, Tensor], learning_rate: float = 1.0) -> SnapshotFeatures:
        """Wrap a module, for a method that runs it.

        Args:
            model: the module at the snapshot, with its data.
            targets: columns of the targets beside the features, ``(m, ...)``; none where the method reads none.
            learning_rate: its sum over the optimizer steps that the snapshot stands for.

        Returns:
            A snapshot without stored features.
        """
        m = sum(len(rows) for rows, _ in model.target_batches(range(2**62)))

        def blocks() -> Iterator[tuple[range, Mapping[str, Tensor]]]:
            return iter(())

        columns = {"features": torch.zeros(m, 0), **targets}
        return cls(
            blocks,
            columns,
            learning_rate,
            model.reduce,
            target_rows=range(m),
            model=model,
            n_train=model.n_train,
            curvature=model.curvature,
        )


@dataclass(frozen=True)
class ScoreBlock:
    """Final scores of some training rows.

    Args:
        rows: which.
        scores: ``(b, m)``, for every target.
        self_influence: ``(b,)``: the score of each sample for its own model output.

    Example:
        >>> import torch
        >>> ScoreBlock(range(2, 4), torch.zeros(2, 5), torch.zeros(2)).rows
        range(2, 4)
    """

    rows: range
    scores: Tensor
    self_influence: Tensor


def in_step(snapshots: Sequence[SnapshotFeatures]) -> Iterator[tuple[range, list[Mapping[str, Tensor]]]]:
    """Walk the training rows of all snapshots together: scores of a block are final before the next one is read.

    Args:
        snapshots: with the same rows, in the same blocks.

    Yields:
        Rows, and their columns at each snapshot.

    Raises:
        ValueError: if the snapshots have different blocks.

    Example:
        >>> import torch
        >>> snapshot = SnapshotFeatures.of({"features": torch.ones(3, 2)}, {"features": torch.ones(1, 2)})
        >>> [(rows, len(columns)) for rows, columns in in_step([snapshot, snapshot])]
        [(range(0, 3), 2)]
    """
    for blocks in zip(*(snapshot.blocks() for snapshot in snapshots), strict=True):
        rows = [rows for rows, _ in blocks]
        if rows.count(rows[0]) < len(rows):
            raise ValueError(f"Expected the same training rows from every snapshot, but got {rows}.")
        yield rows[0], [columns for _, columns in blocks]


def check_method(owner: object, value: Any, name: str = "method") -> None:
    """Check that a value is a method.

    Example:
        >>> check_method("attribute", "TRAK")
        Traceback (most recent call last):
        ...
        TypeError: Expected argument `method` of attribute to be an AttributionMethod, but got 'TRAK'. Pass an object,
        such as `lightning_attr.methods.TRAK()`.
    """
    remedy = "Pass an object, such as `lightning_attr.methods.TRAK()`."
    check_instance(owner, name, value, AttributionMethod, "an AttributionMethod", remedy)


def compute_precision(features: Tensor) -> Tensor:
    """Give features in the precision that scores are computed in.

    Returns the same in float64 if they are, else in float32.
    """
    return features.to(torch.promote_types(features.dtype, torch.float32))


class AttributionMethod(ABC):
    r"""Scores every training sample for every target.

    Sign and unit: ``scores[i, j]`` estimates how much the model output of target ``j`` would fall if training sample
    ``i`` were left out, :math:`f_j(S) - f_j(S \setminus i)`, in units of the model output. Positive scores are
    proponents.

    Args:
        projector: the projection of the features.

    Attributes:
        projector: None for a method that reads no stored features, but runs the module.
        scale: "measurement" for scores in units of the model output, of one removal; "rank_only" for scores of which
            only the order counts.

    Example:
        >>> import torch
        >>> class FeatureDot(AttributionMethod):          # a method of your own: one class with one function
        ...     def score(self, snapshots):
        ...         for rows, train in in_step(snapshots):
        ...             pairs = [(t["features"], s.targets["features"]) for t, s in zip(train, snapshots)]
        ...             scores = sum(features @ targets.T for features, targets in pairs)
        ...             yield ScoreBlock(rows, scores, sum(features.square().sum(1) for features, _ in pairs))
        >>> snapshot = SnapshotFeatures.of({"features": torch.eye(2)}, {"features": torch.tensor([[3.0, 4.0]])})
        >>> [block.scores.flatten() for block in FeatureDot().score([snapshot])]
        [tensor([3., 4.])]
    """

    projector: Projector | None
    scale: str = "measurement"

    def __init__(self, projector: Projector | None = None) -> None:
        if projector is not None:
            check_projector(self, projector)
        self.projector = UnchosenProjector() if projector is None else projector

    def bind(self, layout: ParameterLayout, snapshot: str) -> Projection:
        """Draw the projection of the features at a snapshot.

        Args:
            layout: the parameters.
            snapshot: key of the projection.

        Returns:
            The projection; without a projector, one of no dimensions.
        """
        return NoProjection() if self.projector is None else self.projector.bind(layout, snapshot)

    @property
    def needs_optimizer_state(self) -> bool:
        """Whether :meth:`precondition` wants what the optimizer knew at a snapshot; the callback records it then."""
        return False

    def second_directions(self, curvature: str) -> int:
        """Count the second directions that the method wants stored of a training sample.

        Args:
            curvature: how the Gauss-Newton matrix of the training loss is known, see
                :attr:`lightning_attr.outputs.ModelOutput.curvature`.

        Returns:
            How many; none by default.
        """
        return 0

    def precondition(self, projection: Projection, layout: ParameterLayout, state: OptimizerState) -> Projection:
        """Give the projection what the optimizer knew at the snapshot; only where the method needs it.

        Args:
            projection: from :meth:`bind`.
            layout: the parameters.
            state: the optimizer's, at the snapshot.

        Returns:
            The map of the training samples.
        """
        return projection

    def projection_at(
        self, layout: ParameterLayout, snapshot: str, optimizer_state: Callable[[], OptimizerState | None]
    ) -> Projection:
        """Bind the map of the training samples, with what the optimizer knew where the method needs it.

        Args:
            layout: the parameters.
            snapshot: key of the projection.
            optimizer_state: reads it; None where there is none.

        Returns:
            The map.
        """
        projection = self.bind(layout, snapshot)
        state = optimizer_state() if self.needs_optimizer_state else None
        return projection if state is None else self.precondition(projection, layout, state)

    def bind_targets(self, projection: Projection) -> Projection:
        """Choose the map of the targets.

        Args:
            projection: of the training samples.

        Returns:
            The same, unless a method compares two different things.
        """
        return projection

    @property
    def projector_config(self) -> dict[str, Any] | None:
        """What a store records of the projector; None without one."""
        return None if self.projector is None else self.projector.config

    def select(self, snapshots: Sequence[T]) -> Sequence[T]:
        """Choose the snapshots that the method uses.

        Args:
            snapshots: all that a run has, in the order of training.

        Returns:
            Those it uses: all, unless a method says otherwise.
        """
        return snapshots

    def prepare(self, snapshots: Sequence[SnapshotFeatures]) -> None:  # noqa: B027 - most methods have nothing to settle
        """Settle what all targets decide together, before they are scored some at a time.

        Args:
            snapshots: in the order of training, with all targets; what is settled goes into their ``cache``.
        """

    @abstractmethod
    def score(self, snapshots: Sequence[SnapshotFeatures]) -> Iterator[ScoreBlock]:
        """Score the rows that this process has, block after block.

        A method reads first what it needs of each snapshot, then walks their blocks :func:`in_step`. It never holds
        more scores than those of a block, so that neither rows nor targets are limited by memory.

        Args:
            snapshots: in the order of training; blocks may come from disk, and can be read several times.

        Yields:
            The blocks of :func:`in_step` with their scores, float32 for float32 features and float64 for float64.
        """

    @property
    def config(self) -> dict[str, Any]:
        """Name and arguments, for the record of a result."""
        own = {name: value for name, value in vars(self).items() if name != "projector"}
        return {"method": type(self).__name__, "scale": self.scale, **own, "projector": self.projector_config}

    def __repr__(self) -> str:
        """Name and arguments, as they are recorded."""
        plain = {name: value for name, value in self.config.items() if name not in {"method", "scale"}}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in plain.items())})"
