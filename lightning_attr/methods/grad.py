"""Gradient similarity at the last snapshot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lightning_attr.methods.base import AttributionMethod, ScoreBlock, SnapshotFeatures, compute_precision, in_step

__all__ = ["GradCos", "GradDot"]

T = TypeVar("T")


class GradDot(AttributionMethod):
    r"""Inner product of gradients at the last snapshot, :math:`-\nabla\ell_i \cdot \nabla f_j` (Charpiat et al., 2019).

    The first-order change of the target's output under one gradient step on the training sample, for a learning rate of
    one.

    Example:
        >>> import torch
        >>> train = {"features": torch.tensor([[1.0, 0.0], [3.0, 4.0]]), "out_to_loss": torch.tensor([0.5, 1.0])}
        >>> targets = {"features": torch.tensor([[2.0, 0.0]])}
        >>> (block,) = GradDot().score([SnapshotFeatures.of(train, targets)])
        >>> block.scores.flatten(), block.self_influence
        (tensor([1., 6.]), tensor([ 0.5000, 25.0000]))
    """

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
        targets = self._scale(compute_precision(snapshots[-1].targets["features"]))  # (m, k)
        for rows, columns in in_step(snapshots[-1:]):
            features = self._scale(columns[0]["features"].to(targets))  # (b, k)
            push = self._push(columns[0]["out_to_loss"].to(targets))  # (b,)
            self_influence = push * features.square().sum(1)
            yield ScoreBlock(rows, (push[:, None] * features) @ targets.T, self_influence)

    def _scale(self, features: Tensor) -> Tensor:
        return features

    def _push(self, out_to_loss: Tensor) -> Tensor:
        return out_to_loss


class GradCos(GradDot):
    r"""Cosine of the gradients at the last snapshot, in [-1, 1].

    Self-influence is the sign of :math:`q` and tells nothing.

    Example:
        >>> import torch
        >>> train = {"features": torch.tensor([[1.0, 0.0], [3.0, 4.0]]), "out_to_loss": torch.tensor([0.5, 1.0])}
        >>> targets = {"features": torch.tensor([[2.0, 0.0]])}
        >>> (block,) = GradCos().score([SnapshotFeatures.of(train, targets)])
        >>> block.scores.flatten(), block.self_influence
        (tensor([1.0000, 0.6000]), tensor([1., 1.]))
    """

    def _scale(self, features: Tensor) -> Tensor:
        return torch.nn.functional.normalize(features, dim=1)

    def _push(self, out_to_loss: Tensor) -> Tensor:
        return out_to_loss.sign()
