"""Which kernel scores: one row per sample, weighed or not, or the whole Gauss-Newton matrix with second directions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_attr.methods.base import SnapshotFeatures
from lightning_attr.methods.dual_gauss_newton import GaussNewtonKernel
from lightning_attr.methods.kernels.chosen_features import ChosenFeatures
from lightning_attr.methods.kernels.sample_kernel import DualKernel


class GaussNewtonMethod(ChosenFeatures):
    """A method whose kernel is the Gauss-Newton matrix, as far as output and stored features know it.

    Attributes:
        kernel: "ggn", "margin" or "auto".
        directions: second directions of a sample.
        newton_weights: whether the kernel is weighed by the curvature of the loss.
        loo_correction: whether each sample is left out of the kernel that it is scored by.
        exact: whether the kernel is that of training samples, and their gradients are whole.
    """

    kernel: str
    directions: int
    newton_weights: bool
    loo_correction: bool
    exact: bool

    def check_kernel(self) -> None:
        """Refuse a kernel that does not go with the other arguments.

        Raises:
            ValueError: if it does not.
        """
        if self.kernel == "ggn" and (self.loo_correction or not self.newton_weights):
            raise ValueError(
                'Expected argument `kernel` of TRAK not to be "ggn" with `newton_weights=False`, which leaves the '
                "curvature out, or with `loo_correction=True`, which is exact for one row a sample."
            )

    def wants_directions(self, curvature: str) -> bool:
        """Say whether the kernel has second directions of an output.

        Args:
            curvature: how its Gauss-Newton matrix is known, see :attr:`lightning_attr.outputs.ModelOutput.curvature`.

        Returns:
            True if it has.

        Raises:
            ValueError: if they are asked for, but not known.
        """
        if self.kernel == "ggn" and curvature == "unknown":
            raise ValueError(
                'Expected a model output with a second direction for `kernel="ggn"`, but that of this module has none, '
                "as a loss without the mixin, NegativeLoss, and an output of your own that does not override "
                '`second_direction`. Use `kernel="auto"`, or "margin".'
            )
        one_row = self.kernel == "margin" or not self.newton_weights or self.loo_correction
        return not one_row and curvature in {"rest", "whole"}

    def second_directions(self, curvature: str) -> int:
        """Store :attr:`directions` where the kernel has them; see :meth:`AttributionMethod.second_directions`.

        Args:
            curvature: as there.

        Returns:
            How many.
        """
        return self.directions if self.wants_directions(curvature) and not self.exact else 0

    def kernel_weights(self, columns: Mapping[str, Tensor]) -> Tensor | None:
        """Weigh by the curvature of the loss, or not at all; see :meth:`KernelMethod.kernel_weights`.

        Args:
            columns: of the store.

        Returns:
            ``(b,)``, or None.
        """
        return columns["newton_weight"] if self.newton_weights else None

    def beside(self, snapshot: SnapshotFeatures, columns: Mapping[str, Tensor]) -> Tensor | None:
        """Give the second directions, where the kernel has them; see :meth:`KernelMethod.beside`.

        Args:
            snapshot: as there.
            columns: as there.

        Returns:
            Features, or None.
        """
        if not snapshot.directions or not self.wants_directions(snapshot.curvature):
            return None
        rows = columns["second_features"].flatten(0, 1)
        return rows if rows[:, 0].all() else rows[rows.any(1)]  # samples without any have zeros

    def _say_kernel(self, snapshot: SnapshotFeatures, directions: int) -> None:
        """Note which kernel there is; refuse features that lack what was asked for."""
        wanted = self.wants_directions(snapshot.curvature)
        if wanted and not directions and self.kernel == "ggn":
            raise ValueError(
                f'Expected features with second directions for `kernel="ggn"`, but those of snapshot {snapshot.key!r} '
                'were stored without, by another method or an earlier version. Use `kernel="auto"`, which scores them '
                "by the kernel that they have, or fit with another directory."
            )
        if self.newton_weights:
            whole = snapshot.curvature == "newton" or (wanted and directions)
            snapshot.evidence["kernel"] = "ggn" if whole else "margin"

    def _dual(self, snapshot: SnapshotFeatures) -> DualKernel:
        self._say_kernel(snapshot, self.directions)
        if not self.wants_directions(snapshot.curvature):
            return DualKernel.at(snapshot, self.newton_weights)
        return GaussNewtonKernel.kept(snapshot, self.directions, snapshot.curvature == "whole")

    def _left(self, leverage: Tensor, columns: Mapping[str, Tensor], rows: range) -> Tensor:
        """Share of its own fit that a sample leaves to the others, ``(b,)``."""
        weights = self.kernel_weights(columns)
        left = 1 - (leverage if weights is None else leverage * weights.to(leverage))
        alone = (~(left > 16 * torch.finfo(left.dtype).eps)).nonzero().flatten().tolist()
        if alone:
            raise ValueError(
                f"Expected leverages below 1 for `loo_correction=True`, but that of training sample "
                f"{rows[alone[0]]} is {1 - left[alone[0]].item():.6g}: nothing but itself determines its output, so "
                "that there is no solution without it. Raise the damping, or lower `proj_dim`."
            )
        return left
