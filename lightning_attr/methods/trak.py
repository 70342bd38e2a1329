"""TRAK over the snapshots of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lightning_attr.methods.base import ScoreBlock, SnapshotFeatures, in_step
from lightning_attr.methods.kernel import KernelMethod
from lightning_attr.projectors import KroneckerProjector, Projector

__all__ = ["TRAK"]


class TRAK(KernelMethod):
    r"""Tracing with the randomly-projected after kernel (Park et al., 2023), every snapshot a member of the ensemble.

    .. math::
        S = \tfrac1T \sum_t \operatorname{diag}(q_t)\, \Phi_t (\Phi_t^\top W_t \Phi_t + \lambda_t I)^{-1} \Psi_t^\top

    with the projected output gradients of training samples :math:`\Phi_t` ``(n, k)`` and targets :math:`\Psi_t` ``(m,
    k)``, :math:`q = -d\ell/df` and :math:`W = \operatorname{diag}(d^2\ell/df^2)`: one Newton step of leaving a sample
    out of the linearised model, averaged over snapshots. With ``newton_weights=False`` it is TRAK as published, which
    drops :math:`W` and averages :math:`q` apart from the kernel term,

    .. math::
        S = \Big[\tfrac1T \sum_t q_t\Big] \odot \Big[\tfrac1T \sum_t \Phi_t (\Phi_t^\top \Phi_t + \lambda_t I)^{-1}
        \Psi_t^\top\Big].

    Args:
        proj_dim: projection dimension of the default projector.
        projector: the projection; by default :class:`lightning_attr.projectors.KroneckerProjector` with ``proj_dim``
            and ``seed``.
        damping: :math:`\lambda_t` as a multiple of the kernel's mean diagonal entry. Zero is allowed for a regular
            kernel.
        newton_weights: weigh the kernel by the curvature of the loss; ``tests/benchmarks/lds.py`` compares both.
        seed: of the default projector.
        per_layer: one kernel a layer, each damped on its own, whose features do not interact; for projectors that keep
            the layers apart. Larger projections can be afforded so.

    Raises:
        ValueError: if the damping is negative.

    Example:
        >>> import torch
        >>> train = {"features": torch.eye(2), "out_to_loss": torch.ones(2), "newton_weight": torch.ones(2)}
        >>> targets = {"features": torch.tensor([[1.0, 0.0]])}
        >>> (block,) = TRAK(damping=1.0).score([SnapshotFeatures.of(train, targets)])
        >>> block.scores.flatten(), block.self_influence
        (tensor([0.5000, 0.0000]), tensor([0.5000, 0.5000]))
    """

    def __init__(
        self,
        proj_dim: int = 2048,
        projector: Projector | None = None,
        damping: float = 1.0,
        newton_weights: bool = True,
        seed: int = 0,
        per_layer: bool = False,
    ) -> None:
        super().__init__(projector or KroneckerProjector(proj_dim, seed), damping, per_layer)
        self.newton_weights = newton_weights

    def kernel_weights(self, columns: Mapping[str, Tensor]) -> Tensor | None:
        """Weigh by the curvature of the loss, or not at all; see :meth:`KernelMethod.kernel_weights`.

        Args:
            columns: of the store.

        Returns:
            ``(b,)``, or None.
        """
        return columns["newton_weight"] if self.newton_weights else None

    def score(self, snapshots: Sequence[SnapshotFeatures]) -> Iterator[ScoreBlock]:
        """Average over the snapshots; see :meth:`AttributionMethod.score`.

        Kernels are products of blocks in the features' precision, added up and factored in float64.

        Args:
            snapshots: in the order of training.

        Yields:
            Scores, block after block.

        Raises:
            ValueError: if a kernel is singular, or not finite.
        """
        kernels = [self.solve(snapshot) for snapshot in snapshots]
        for rows, train in in_step(snapshots):
            m, count = len(snapshots[0].targets["features"]), len(snapshots)
            like = kernels[0].targets
            scores, self_influence, push = (like.new_zeros(size) for size in ((len(rows), m), len(rows), len(rows)))
            for columns, kernel in zip(train, kernels, strict=True):
                features, q = columns["features"].to(like), columns["out_to_loss"].to(like)
                leverage = kernel.leverage(features)
                if self.newton_weights:
                    leverage, features = q * leverage, q[:, None] * features
                scores.addmm_(features, kernel.targets)
                self_influence += leverage
                push += q
            weight = torch.full_like(push, 1 / count) if self.newton_weights else push / count**2
            yield ScoreBlock(rows, scores.mul_(weight[:, None]), self_influence * weight)
