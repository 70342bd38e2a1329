"""Influence functions on stored, projected gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar, get_args

from torch import Tensor

from lightning_attr.arguments.checks import check_choice
from lightning_attr.methods.base import ScoreBlock, SnapshotFeatures
from lightning_attr.methods.kernels.feature_kernel import KernelMethod
from lightning_attr.methods.over_snapshots import sum_over_snapshots
from lightning_attr.methods.support.relatif import Relative, divisor
from lightning_attr.methods.support.subset_truth import SubsetTruth
from lightning_attr.projectors import FactGraSSProjector, KroneckerProjector, Projector
from lightning_attr.projectors.unchosen import UnchosenProjector

T = TypeVar("T")


class ProjectedInfluence(KernelMethod):
    r"""Influence functions in the space of the projected gradients, with one curvature per layer (Choe et al., 2024).

    .. math::
        \tau_{ij} = \frac1n q_i \sum_l \phi_{il}^\top (C_l + \lambda_l I)^{-1} \psi_{jl}, \qquad
        C_l = \frac1n \sum_i w_i \phi_{il} \phi_{il}^\top

    with the projected output gradients of training samples :math:`\phi` and targets :math:`\psi` and
    :math:`q = -d\ell/df`. The model is not needed again: the features that the callback stores are all there is.
    Positive scores are proponents, in units of the model output.

    Args:
        projector: the projection; by default :class:`lightning_attr.projectors.KroneckerProjector`.
        curvature: "ggn" for :math:`w = d^2\ell/df^2`, the curvature of the loss in the model output that is stored (of
            a classifier's labelled margin; other directions of its logits are not there); "empirical_fisher" for
            :math:`w = q^2`, the second moments of the gradients of the loss.
        per_layer: a curvature a layer; without, one for all, in which layers interact.
        damping: :math:`\lambda` as a multiple of the mean diagonal entry of each curvature.
        relative: "theta" or "loss" for RelatIF, see :mod:`lightning_attr.methods.support.relatif`; scores are then for
            ranking only.
        snapshots: "last" for the last snapshot, "all" for all of them, each with an equal part.
        truth: models retrained on subsets, for ``damping="auto"``.

    Raises:
        ValueError: if an argument is none of these, or the damping is negative or does not go with the truth.

    Example:
        >>> import torch
        >>> train = {"features": torch.eye(2), "out_to_loss": torch.ones(2), "newton_weight": torch.ones(2)}
        >>> targets = {"features": torch.tensor([[1.0, 0.0]])}
        >>> method = ProjectedInfluence(per_layer=False, damping=1.0)
        >>> (block,) = method.score([SnapshotFeatures.of(train, targets)])
        >>> block.scores.flatten(), block.self_influence
        (tensor([0.5000, 0.0000]), tensor([0.5000, 0.5000]))
    """

    usual_damping = 0.1

    def __init__(
        self,
        projector: Projector | None = None,
        curvature: str = "ggn",
        per_layer: bool = True,
        damping: float | str = 0.1,
        relative: str | None = None,
        snapshots: str = "last",
        truth: SubsetTruth | None = None,
    ) -> None:
        super().__init__(UnchosenProjector() if projector is None else projector, damping, per_layer, truth)
        remedy = "Features hold no second derivatives of the model."
        check_choice(self, "curvature", curvature, ("ggn", "empirical_fisher"), remedy=remedy)
        check_choice(self, "relative", relative, (*get_args(Relative), None))
        check_choice(self, "snapshots", snapshots, ("last", "all"))
        self.curvature = curvature
        self.relative = relative
        self.snapshots = snapshots

    @property
    def config(self) -> dict[str, Any]:
        """Name and arguments, for the record of a result."""
        scale = "measurement" if self.relative is None else "rank_only"
        return {**super().config, "scale": scale}

    def select(self, snapshots: Sequence[T]) -> Sequence[T]:
        """Take the last snapshot, or all; see :meth:`AttributionMethod.select`.

        Args:
            snapshots: all that a run has.

        Returns:
            Those it uses.
        """
        return snapshots[-1:] if self.snapshots == "last" else snapshots

    def kernel_weights(self, columns: Mapping[str, Tensor]) -> Tensor | None:
        """Weigh by the curvature of the loss in the output, or by its squared slope.

        Args:
            columns: of the store.

        Returns:
            ``(b,)``.
        """
        if self.curvature == "ggn":
            return columns["newton_weight"]
        return columns["out_to_loss"].double().square()

    def score(self, snapshots: Sequence[SnapshotFeatures]) -> Iterator[ScoreBlock]:
        """Average over the snapshots; see :meth:`AttributionMethod.score`.

        Args:
            snapshots: in the order of training.

        Yields:
            Scores, block after block.

        Raises:
            ValueError: if a curvature is singular, or not finite.
        """
        kernels = [self.solve(snapshot) for snapshot in snapshots]  # sums over samples: they hold the 1/n
        weights = self.balanced_weights(snapshots, kernels)

        def term(number: int, rows: range, columns: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
            kernel = kernels[number]
            features, q = columns["features"].to(kernel.targets), columns["out_to_loss"].to(kernel.targets)
            leverage = kernel.leverage(features, rows)
            change = kernel.solve(features).square().sum(1) if self.relative == "theta" else leverage
            q = weights[number] * q / divisor(self.relative, q.square() * leverage, q.square() * change)
            return q[:, None] * features, q * leverage

        yield from sum_over_snapshots(snapshots, [kernel.targets.T for kernel in kernels], term)


class LoGra(ProjectedInfluence):
    """LoGra as published (Choe et al., 2024): gradients of each layer projected from both sides, damped Gram a layer.

    Args:
        proj_dim: features in all; each weight matrix gets a square of one side for all.
        damping: of each layer's Gram matrix of loss gradients, as a multiple of its mean diagonal entry.
        seed: of the projection.
        relative: as in :class:`ProjectedInfluence`.
        snapshots: as in :class:`ProjectedInfluence`.
        truth: as in :class:`ProjectedInfluence`.

    Example:
        >>> LoGra(proj_dim=256).config["projector"]
        {'kind': 'kronecker', 'proj_dim': 256, 'seed': 0}
    """

    def __init__(
        self,
        proj_dim: int = 2048,
        damping: float | str = 0.1,
        seed: int = 0,
        relative: str | None = None,
        snapshots: str = "last",
        truth: SubsetTruth | None = None,
    ) -> None:
        projector = KroneckerProjector(proj_dim, seed)
        super().__init__(projector, "empirical_fisher", True, damping, relative, snapshots, truth)


class FactGraSS(ProjectedInfluence):
    """FactGraSS as published (Hu et al., 2025): factored mask and sparse projection, with a damped Gram a layer.

    Args:
        proj_dim: features in all, shared out among the layers by the entries that they keep.
        damping: of each layer's Gram matrix of loss gradients, as a multiple of its mean diagonal entry.
        seed: of the projection.
        mask_factor: entries kept for each feature.
        relative: as in :class:`ProjectedInfluence`.
        snapshots: as in :class:`ProjectedInfluence`.
        truth: as in :class:`ProjectedInfluence`.

    Example:
        >>> FactGraSS(proj_dim=256).config["projector"]
        {'kind': 'factgrass-2', 'proj_dim': 256, 'seed': 0, 'mask_factor': 4, 'per_layer': True}
    """

    def __init__(
        self,
        proj_dim: int = 2048,
        damping: float | str = 0.1,
        seed: int = 0,
        mask_factor: int = 4,
        relative: str | None = None,
        snapshots: str = "last",
        truth: SubsetTruth | None = None,
    ) -> None:
        projector = FactGraSSProjector(proj_dim, seed, mask_factor, per_layer=True)
        super().__init__(projector, "empirical_fisher", True, damping, relative, snapshots, truth)
