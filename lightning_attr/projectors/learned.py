"""Projections that are learned from gradients of training samples at their snapshot."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from lightning_attr.projectors.base import Projection


class LearningRun(Protocol):
    """Sends the gradients of samples through a map.

    Example:
        >>> import torch
        >>> from lightning_attr.parameters.layout import ParameterLayout
        >>> from lightning_attr.projectors import EigenProjector
        >>> def run(learner, every=1, entries=1):          # of one batch, whatever it is asked to spare
        ...     with learner.filling(torch.zeros(20, learner.dim)) as add:
        ...         add({"weight": torch.ones(20, 3, 5)})
        >>> EigenProjector(4).bind(ParameterLayout({"weight": (3, 5)}), "final").learn(run)
    """

    def __call__(self, learner: Projection, every: int = 1, entries: int = 1) -> None:
        """Send them through."""


class LearnedProjection(Projection):
    """A linear map that is learned from training samples at its snapshot, and kept with it.

    Args:
        dim: number of features, known before.

    Example:
        >>> from lightning_attr.parameters.layout import ParameterLayout
        >>> from lightning_attr.projectors import EigenProjector
        >>> isinstance(EigenProjector(4).bind(ParameterLayout({"weight": (3, 5)}), "final"), LearnedProjection)
        True
    """

    @abstractmethod
    def learning_rows(self, n_train: int) -> Sequence[int]:
        """Choose the training samples to learn from.

        Args:
            n_train: how many there are.

        Returns:
            Their rows, in order; all where there are no more.
        """

    @abstractmethod
    def learn(self, run: LearningRun) -> None:
        """Learn the map.

        Args:
            run: sends the gradients of the samples through the map it is given, as often as it is called.
        """

    @abstractmethod
    def rehearse(self) -> None:
        """Take a basis of the size of a learned one that says nothing of the data: to try the way that samples go."""

    @property
    @abstractmethod
    def basis(self) -> Mapping[str, Tensor]:
        """What :meth:`load` takes; empty before."""

    @abstractmethod
    def load(self, basis: Mapping[str, Tensor]) -> None:
        """Take what was learned before.

        Args:
            basis: from :attr:`basis` of an equal map.

        Raises:
            ValueError: if it was learned for other parameters, or for another number of features.
        """


def check_not_learned(projection: Projection, where: str) -> None:
    """Refuse a projection that is learned from gradients where there are none to learn from.

    Args:
        projection: any.
        where: what it is used in.

    Raises:
        ValueError: if it is learned.

    Example:
        >>> from lightning_attr.projectors import NoProjection
        >>> check_not_learned(NoProjection(), "DropoutEnsemble")
    """
    if isinstance(projection, LearnedProjection):
        kind = type(projection).__name__.removesuffix("ion") + "or"
        raise ValueError(
            f"Expected a projector for {where} that learns nothing from gradients, but got {kind}. Use "
            "KroneckerProjector() or another random one."
        )
