"""What an attribution method is: features of the training set and of targets in, scores out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from lightning_attr.projectors import KroneckerProjector, Projector

__all__ = ["AttributionMethod", "SnapshotFeatures"]

T = TypeVar("T")


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

    Example:
        >>> import torch
        >>> SnapshotFeatures.of({"features": torch.ones(3, 2)}, {"features": torch.ones(1, 2)}).learning_rate
        1.0
    """

    blocks: Callable[[], Iterator[tuple[range, Mapping[str, Tensor]]]]
    targets: Mapping[str, Tensor]
    learning_rate: float = 1.0
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor

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
        return cls(lambda: iter([(rows, train)]), targets)


class AttributionMethod(ABC):
    r"""Scores every training sample for every target.

    Sign and unit: ``scores[i, j]`` estimates how much the model output of target ``j`` would fall if training sample
    ``i`` were left out, :math:`f_j(S) - f_j(S \setminus i)`, in units of the model output. Positive scores are
    proponents.

    Args:
        projector: the projection of the features.

    Example:
        >>> import torch
        >>> class FeatureDot(AttributionMethod):          # a method of your own: one class with one function
        ...     def score(self, snapshots, scores, self_influence):
        ...         for snapshot in snapshots:
        ...             for rows, columns in snapshot.blocks():
        ...                 block = slice(rows.start, rows.stop)
        ...                 scores[block] += columns["features"] @ snapshot.targets["features"].T
        ...                 self_influence[block] += columns["features"].square().sum(1)
        >>> scores, self_influence = torch.zeros(2, 1), torch.zeros(2)
        >>> snapshot = SnapshotFeatures.of({"features": torch.eye(2)}, {"features": torch.tensor([[3.0, 4.0]])})
        >>> FeatureDot().score([snapshot], scores, self_influence)
        >>> scores.flatten()
        tensor([3., 4.])
    """

    def __init__(self, projector: Projector | None = None) -> None:
        self.projector = projector or KroneckerProjector()

    def select(self, snapshots: Sequence[T]) -> Sequence[T]:
        """Choose the snapshots that the method uses.

        Args:
            snapshots: all that a run has, in the order of training.

        Returns:
            Those it uses: all, unless a method says otherwise.
        """
        return snapshots

    @abstractmethod
    def score(self, snapshots: Iterable[SnapshotFeatures], scores: Tensor, self_influence: Tensor) -> None:
        """Fill the rows that this process scores.

        Args:
            snapshots: read once, in order; features may come from disk.
            scores: zeros ``(n, m)``, float32 or float64, changed in place.
            self_influence: zeros ``(n,)``, changed in place: the score of each sample for its own model output.
        """

    @property
    def config(self) -> dict[str, Any]:
        """Name and arguments, for the record of a result."""
        own = {name: value for name, value in vars(self).items() if name != "projector"}
        return {"method": type(self).__name__, **own, "projector": self.projector.config}
