"""TRAK over the snapshots of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_attr.methods.base import AttributionMethod, ScoreBlock, SnapshotFeatures, compute_precision, in_step
from lightning_attr.projectors import KroneckerProjector, Projector

__all__ = ["TRAK"]

_STRIP = 256
"""Columns at once where half of a product is known to be zero or to mirror the other half."""
_SOLVE = 4096
"""Targets solved for at once, in float64."""


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
    ) -> None:
        if not damping >= 0:
            raise ValueError(f"Expected argument `damping` to be a number >= 0, but got {damping}.")
        super().__init__(projector or KroneckerProjector(proj_dim, seed))
        self.damping = damping
        self.newton_weights = newton_weights

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
        solutions = [self._solve(snapshot) for snapshot in snapshots]
        for rows, train in in_step(snapshots):
            m, count = len(snapshots[0].targets["features"]), len(snapshots)
            like = solutions[0][0]
            scores, self_influence, push = (like.new_zeros(size) for size in ((len(rows), m), len(rows), len(rows)))
            for columns, (solved, inverse) in zip(train, solutions, strict=True):
                features, q = columns["features"].to(like), columns["out_to_loss"].to(like)
                leverage = _squared_norms(features, inverse)
                if self.newton_weights:
                    leverage, features = q * leverage, q[:, None] * features
                scores.addmm_(features, solved)
                self_influence += leverage
                push += q
            weight = torch.full_like(push, 1 / count) if self.newton_weights else push / count**2
            yield ScoreBlock(rows, scores.mul_(weight[:, None]), self_influence * weight)

    def _solve(self, snapshot: SnapshotFeatures) -> tuple[Tensor, Tensor]:
        """Return the solved targets ``(k, m)`` and, with the kernel L L^T, the inverse of L, ``(k, k)``."""
        if "factor" not in snapshot.memo:
            snapshot.memo["factor"] = self._factor(snapshot)
        factor = snapshot.memo["factor"]
        targets = compute_precision(snapshot.targets["features"])
        solved = targets.new_empty(targets.shape[1], len(targets))
        for start in range(0, len(targets), _SOLVE):
            part = slice(start, start + _SOLVE)
            solved[:, part] = torch.cholesky_solve(targets[part].T.double(), factor)
        unit = torch.eye(len(factor), dtype=targets.dtype, device=factor.device)
        return solved, torch.linalg.solve_triangular(factor.to(targets.dtype), unit, upper=False)

    def _factor(self, snapshot: SnapshotFeatures) -> Tensor:
        """Return the lower triangular factor of the kernel, float64."""
        k = snapshot.targets["features"].shape[1]
        upper = torch.zeros(k, k, dtype=torch.float64, device=snapshot.targets["features"].device)
        for _, columns in snapshot.blocks():
            features = compute_precision(columns["features"])
            if self.newton_weights:
                features = features * columns["newton_weight"].to(features).sqrt()[:, None]
            for start in range(0, k, _STRIP):
                strip = slice(start, start + _STRIP)
                upper[strip, start:] += features[:, strip].T @ features[:, start:]
        kernel = snapshot.reduce(upper.triu_() + upper.triu(1).T)
        kernel.diagonal().add_(self.damping * kernel.diagonal().mean())
        if not kernel.isfinite().all():
            raise ValueError(
                "Expected finite features, but the kernel of the training features holds NaN or infinite values. Look "
                "for them in the columns `features` and `newton_weight` of the store, and featurize these rows again."
            )
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(kernel)
        if failed:
            raise ValueError(
                f"The kernel of {k} features is singular with `damping={self.damping}`. Raise the damping (1.0 is a "
                "good value), or lower `proj_dim` below the number of training samples."
            )
        return factor


def _squared_norms(features: Tensor, lower: Tensor) -> Tensor:
    """Return the squared norms ``(b,)`` of ``features @ lower.T``, without the half of the product that is zeros."""
    norms = features.new_zeros(len(features))
    for start in range(0, len(lower), _STRIP):
        stop = start + _STRIP
        norms += (features[:, :stop] @ lower[start:stop, :stop].T).square_().sum(1)
    return norms
