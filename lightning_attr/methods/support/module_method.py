"""Methods that run the module at each snapshot, instead of reading stored features."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch

from lightning_attr.arguments.checks import check_choice
from lightning_attr.features.snapshot_model import SnapshotModel
from lightning_attr.methods.base import AttributionMethod, ScoreBlock, SnapshotFeatures
from lightning_attr.methods.over_snapshots import balanced_total

T = TypeVar("T")


def model_of(snapshot: SnapshotFeatures) -> SnapshotModel:
    """Give the module at a snapshot, with its weights loaded.

    Args:
        snapshot: of a method that runs the module.

    Returns:
        The model.

    Raises:
        TypeError: if there are features only.

    Example:
        >>> import torch
        >>> model_of(SnapshotFeatures.of({"features": torch.ones(3, 2)}, {"features": torch.ones(1, 2)}))
        Traceback (most recent call last):
        ...
        TypeError: Expected a snapshot with its `model`, but got features only: this method runs the module. Use ...
    """
    if snapshot.model is None:
        raise TypeError(
            "Expected a snapshot with its `model`, but got features only: this method runs the module. Use "
            "`trainer.attribute(..., method=...)`, or SnapshotModel.of(module, train, targets)."
        )
    snapshot.model.load()
    return snapshot.model


class ModelMethod(AttributionMethod):
    """A method that scores one snapshot after the other, and averages the scores over them.

    In the average, each snapshot has an equal part: its weight is inverse to the mean size of the training samples'
    self-influence.

    No features are stored for it. Its snapshots have a :class:`lightning_attr.features.snapshot_model.SnapshotModel`;
    its ``targets`` hold the values of each target, but no features.

    Args:
        snapshots: "last" for the last snapshot, "all" for all of them, each with an equal part.

    Raises:
        ValueError: if ``snapshots`` is neither.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_attr import AttributionMixin
        >>> class Loudness(ModelMethod):                     # a method of your own: one function per snapshot
        ...     def score_snapshot(self, snapshot):
        ...         for rows, batch in model_of(snapshot).train_batches():
        ...             loudness = batch[0].abs().sum(1)
        ...             yield ScoreBlock(range(rows[0], rows[-1] + 1), loudness[:, None], loudness)
        >>> class Classifier(AttributionMixin, nn.Linear): ...
        >>> batch = (torch.eye(2), torch.tensor([0, 1]))
        >>> model = SnapshotModel.of(Classifier(2, 3).eval(), [batch], [batch])
        >>> [block.self_influence for block in Loudness().score([SnapshotFeatures.at(model, {})])]
        [tensor([1., 1.])]
    """

    def __init__(self, snapshots: str = "last") -> None:
        check_choice(self, "snapshots", snapshots, ("last", "all"))
        self.projector = None
        self.snapshots = snapshots

    def select(self, snapshots: Sequence[T]) -> Sequence[T]:
        """Take the last snapshot, or all; see :meth:`AttributionMethod.select`.

        Args:
            snapshots: all that a run has.

        Returns:
            Those it uses.
        """
        return snapshots[-1:] if self.snapshots == "last" else snapshots

    @abstractmethod
    def score_snapshot(self, snapshot: SnapshotFeatures) -> Iterator[ScoreBlock]:
        """Score this process's training samples at one snapshot.

        Args:
            snapshot: with its model, whose weights :func:`model_of` loads, and the ``target_rows`` to score for.

        Yields:
            Blocks of rows, the same blocks at every snapshot.
        """

    def score(self, snapshots: Sequence[SnapshotFeatures]) -> Iterator[ScoreBlock]:
        """Average over the snapshots; see :meth:`AttributionMethod.score`.

        The scores of several snapshots are added up in memory, one snapshot after the other: weights are loaded once.

        Args:
            snapshots: in the order of training.

        Yields:
            Scores, block after block.
        """
        if len(snapshots) == 1:
            yield from self.score_snapshot(snapshots[0])
            return
        total: list[ScoreBlock] = []
        sizes = []
        for snapshot in snapshots:
            blocks = list(self.score_snapshot(snapshot))
            size = sum(block.self_influence.double().abs().sum().item() for block in blocks)
            size = snapshot.reduce(torch.tensor([size], dtype=torch.float64)).item()
            sizes.append(size)
            total = total or [ScoreBlock(b.rows, 0 * b.scores, 0 * b.self_influence) for b in blocks]
            for sum_, block in zip(total, blocks, strict=True):
                sum_.scores.add_(block.scores, alpha=1 / (size or 1.0))
                sum_.self_influence.add_(block.self_influence, alpha=1 / (size or 1.0))
        divisor = balanced_total(sizes)
        for block in total:
            yield ScoreBlock(block.rows, block.scores / divisor, block.self_influence / divisor)
