"""Kernels of so many features as the sizes of model and data ask for, where nobody said how many."""

from __future__ import annotations

import copy
from typing import Any

from typing_extensions import Self

from lightning_attr.methods.base import SnapshotFeatures
from lightning_attr.methods.choice import MOST_FEATURES, FeatureChoice, choose_features
from lightning_attr.methods.kernels.feature_kernel import KernelMethod
from lightning_attr.projectors import Projector


class ChosenFeatures(KernelMethod):
    """A kernel method that may be left to choose how many features there are.

    Attributes:
        choice: what was chosen and why; None where somebody said, or nothing is chosen yet.
    """

    _open: bool
    choice: FeatureChoice | None

    def settled(self, n_train: int, numel: int) -> Self:
        """Choose how many features there are, where nobody said; see :func:`lightning_attr.methods.choice.settled`.

        Args:
            n_train: training samples.
            numel: parameters of the model, frozen or not.

        Returns:
            The method, with nothing left to choose.
        """
        if not self._open or self.projector is None:
            return self
        own = copy.copy(self)
        own._open, own.choice = False, choose_features(n_train, numel)
        own.projector = type(self.projector)(own.choice.proj_dim, self.projector.seed)
        return own

    def given(self, projector: Projector) -> Self:
        """Take a projector, if nobody chose one; see :func:`lightning_attr.methods.stored_projection.on_store`.

        Args:
            projector: of the features that there are.

        Returns:
            The method, with nothing left to choose; as it is, where somebody chose.
        """
        if not self._open or self.projector is None:
            return self
        own = copy.copy(self)
        own._open, own.projector = False, projector
        return own

    def damping_at(self, snapshot: SnapshotFeatures) -> float:
        """Give the damping as a multiple of the mean diagonal entry; see :meth:`DampedMethod.damping_at`.

        Args:
            snapshot: that is scored.

        Returns:
            The one given or chosen. Where the number of features is chosen, too, the scores do not hang on it: the
            ridge is that of 2,048.
        """
        damping = super().damping_at(snapshot)
        return damping if self.choice is None else damping * snapshot.targets["features"].shape[1] / MOST_FEATURES

    @property
    def config(self) -> dict[str, Any]:
        """Name and arguments, and what was chosen and why; see :meth:`AttributionMethod.config`."""
        own = {name: value for name, value in super().config.items() if name not in {"_open", "choice"}}
        return own if self.choice is None else {**own, "choice": self.choice.reason}
