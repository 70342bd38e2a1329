"""Gradient similarity at the last snapshot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from lightning_attr.methods.base import ScoreBlock, SnapshotFeatures
from lightning_attr.methods.tracin import TracIn
from lightning_attr.projectors import Projector

T = TypeVar("T")


class GradDot(TracIn):
    r"""Inner product of gradients at the last snapshot, :math:`-\nabla\ell_i \cdot \nabla f_j` (Charpiat et al., 2019).

    The first-order change of the target's output under one gradient step on the training sample, for a learning rate of
    one: :class:`TracIn` at one snapshot, with a weight of one. Scores are rank-only.

    Args:
        projector: the projection; by default :class:`lightning_attr.projectors.KroneckerProjector`.
        exact: whole gradients in place of projected ones; see :class:`TracIn`.

    Example:
        >>> import torch
        >>> train = {"features": torch.tensor([[1.0, 0.0], [3.0, 4.0]]), "out_to_loss": torch.tensor([0.5, 1.0])}
        >>> targets = {"features": torch.tensor([[2.0, 0.0]])}
        >>> (block,) = GradDot().score([SnapshotFeatures.of(train, targets)])
        >>> block.scores.flatten(), block.self_influence
        (tensor([1., 6.]), tensor([ 0.5000, 25.0000]))
    """

    def __init__(self, projector: Projector | None = None, exact: bool = False) -> None:
        super().__init__(projector, weights="uniform", exact=exact)

    def select(self, snapshots: Sequence[T]) -> Sequence[T]:
        """Take the last one.

        Args:
            snapshots: all, in the order of training.

        Returns:
            The last.
        """
        return snapshots[-1:]

    def score(self, snapshots: Sequence[SnapshotFeatures]) -> Iterator[ScoreBlock]:
        """Multiply the features; see :meth:`AttributionMethod.score`.

        Args:
            snapshots: the last one counts.

        Yields:
            Scores, block after block.
        """
        yield from super().score(snapshots[-1:])


class GradCos(GradDot):
    r"""Cosine of the gradients at the last snapshot, in [-1, 1]: :class:`GAS` at one snapshot.

    Self-influence is the sign of :math:`q` and tells nothing. Scores are rank-only.

    Args:
        projector: the projection; by default :class:`lightning_attr.projectors.KroneckerProjector`.
        exact: whole gradients in place of projected ones; see :class:`TracIn`.

    Example:
        >>> import torch
        >>> train = {"features": torch.tensor([[1.0, 0.0], [3.0, 4.0]]), "out_to_loss": torch.tensor([0.5, 1.0])}
        >>> targets = {"features": torch.tensor([[2.0, 0.0]])}
        >>> (block,) = GradCos().score([SnapshotFeatures.of(train, targets)])
        >>> block.scores.flatten(), block.self_influence
        (tensor([1.0000, 0.6000]), tensor([1., 1.]))
    """

    def __init__(self, projector: Projector | None = None, exact: bool = False) -> None:
        super().__init__(projector, exact)
        self.normalize = True
