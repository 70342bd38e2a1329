"""TRAK over the snapshots of a run."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_attr.methods.base import AttributionMethod, SnapshotFeatures
from lightning_attr.projectors import KroneckerProjector, Projector

__all__ = ["TRAK"]


class TRAK(AttributionMethod):
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

    Raises:
        ValueError: if the damping is negative.

    Example:
        >>> import torch
        >>> train = {"features": torch.eye(2), "out_to_loss": torch.ones(2), "newton_weight": torch.ones(2)}
        >>> targets = {"features": torch.tensor([[1.0, 0.0]])}
        >>> scores, self_influence = torch.zeros(2, 1), torch.zeros(2)
        >>> TRAK(damping=1.0).score([SnapshotFeatures.of(train, targets)], scores, self_influence)
        >>> scores.flatten(), self_influence
        (tensor([0.5000, 0.0000]), tensor([0.5000, 0.5000]))
    """

    def __init__(
        self,
        proj_dim: int = 2048,
        projector: Projector | None = None,
        damping: float = 1.0,
        newton_weights: bool = True,
        seed: int = 0,
    ) -> None:
        if not damping >= 0:
            raise ValueError(f"Expected argument `damping` to be a number >= 0, but got {damping}.")
        super().__init__(projector or KroneckerProjector(proj_dim, seed))
        self.damping = damping
        self.newton_weights = newton_weights

    def score(self, snapshots: Iterable[SnapshotFeatures], scores: Tensor, self_influence: Tensor) -> None:
        """Add up the snapshots; see :meth:`AttributionMethod.score`.

        Args:
            snapshots: read once, in order.
            scores: changed in place.
            self_influence: changed in place.
        """
        push = torch.zeros_like(self_influence)
        count = 0
        for snapshot in snapshots:
            count += 1
            factor = self._factor(snapshot)  # lower triangular L, K = L L^T, float64
            solved = torch.cholesky_solve(snapshot.targets["features"].double().T, factor).to(scores)  # (k, m)
            half = factor.to(scores)
            for rows, columns in snapshot.blocks():
                block = slice(rows.start, rows.stop)
                features, q = columns["features"].to(scores), columns["out_to_loss"].to(scores)
                leverage = torch.linalg.solve_triangular(half, features.T, upper=False).square().sum(0)
                if self.newton_weights:
                    scores[block] += q[:, None] * (features @ solved)
                    self_influence[block] += q * leverage
                else:
                    scores[block] += features @ solved
                    self_influence[block] += leverage
                    push[block] += q
        weight = torch.full_like(push, 1 / count) if self.newton_weights else push / count**2
        scores *= weight[:, None]
        self_influence *= weight

    def _factor(self, snapshot: SnapshotFeatures) -> Tensor:
        k = snapshot.targets["features"].shape[1]
        kernel = torch.zeros(k, k, dtype=torch.float64, device=snapshot.targets["features"].device)
        for _, columns in snapshot.blocks():
            features = columns["features"]
            if self.newton_weights:
                features = features * columns["newton_weight"].sqrt()[:, None]
            kernel += features.T @ features
        kernel = snapshot.reduce(kernel)
        kernel.diagonal().add_(self.damping * kernel.diagonal().mean())
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(kernel)
        if failed:
            raise ValueError(
                f"The kernel of {k} features is singular with `damping={self.damping}`. Raise the damping (1.0 is a "
                "good value), or lower `proj_dim` below the number of training samples."
            )
        return factor
