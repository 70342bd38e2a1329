"""Scores of an ensemble of snapshots: each one solved by its kernel, and their sum."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_attr.methods.base import ScoreBlock, SnapshotFeatures, in_step
from lightning_attr.methods.kernels.gauss_newton import GaussNewtonMethod
from lightning_attr.methods.over_snapshots import balanced_total


class EnsembleScores(GaussNewtonMethod):
    """What :class:`lightning_attr.methods.TRAK` computes, by stored features or by whole gradients.

    Attributes:
        balanced: whether each snapshot has an equal part.
        proj_dim: over which the trace of an exact kernel is spread, for its damping.
    """

    balanced: bool
    proj_dim: int

    def score(self, snapshots: Sequence[SnapshotFeatures]) -> Iterator[ScoreBlock]:
        """Average over the snapshots; see :meth:`AttributionMethod.score`.

        Kernels are products of blocks in the features' precision, added up and factored in float64.

        Args:
            snapshots: in the order of training.

        Yields:
            Scores, block after block.

        Raises:
            ValueError: if a kernel is singular, or not finite, or a leverage leaves nothing to divide by.
        """
        plain = not (self.balanced and self.newton_weights)
        if self.exact:
            yield from self._exact(snapshots, plain)
            return
        for snapshot in snapshots:
            self._say_kernel(snapshot, snapshot.directions)
        kernels = [self.solve(snapshot) for snapshot in snapshots]
        weights = [1 / len(kernels)] * len(kernels) if plain else self.balanced_weights(snapshots, kernels)
        for rows, train in in_step(snapshots):
            m = len(snapshots[0].targets["features"])
            like = kernels[0].targets
            scores, self_influence, q_sum = (like.new_zeros(size) for size in ((len(rows), m), len(rows), len(rows)))
            for columns, kernel, weight in zip(train, kernels, weights, strict=True):
                features, q = columns["features"].to(like), columns["out_to_loss"].to(like)
                leverage = kernel.leverage(features, rows)
                if self.loo_correction:
                    left = self._left(leverage, columns, rows)
                    leverage, features = leverage / left, features / left[:, None]
                if self.newton_weights:
                    leverage = q * leverage
                _add_product(
                    scores, features, kernel.targets, weight * (q if self.newton_weights else torch.ones_like(q))
                )
                self_influence += weight * leverage
                q_sum += weight * q
            if not self.newton_weights:
                scores, self_influence = scores * q_sum[:, None], self_influence * q_sum
            yield ScoreBlock(rows, scores, self_influence)

    def _exact(self, snapshots: Sequence[SnapshotFeatures], plain: bool) -> Iterator[ScoreBlock]:
        scores = self_influence = q_sum = torch.zeros(())
        sizes = []
        for snapshot in snapshots:
            kernel = self._dual(snapshot)
            ridge = self.damping_at(snapshot) * kernel.kernel.diagonal().sum().item() / self.proj_dim
            solved = kernel.solve(snapshot, ridge)
            if solved.dimension is not None:
                snapshot.evidence["effective_dimension"] = solved.dimension
            terms, leverage, q = solved.terms, solved.leverage, kernel.columns["out_to_loss"]
            if self.loo_correction:
                left = self._left(leverage, kernel.columns, range(len(leverage)))
                leverage, terms = leverage / left, terms / left[:, None]
            if self.newton_weights:
                leverage, terms = q * leverage, q[:, None] * terms
            sizes.append(1.0 if plain else leverage.abs().double().mean().item())
            weight = 1 / (sizes[-1] or 1.0)
            scores = scores + weight * terms
            self_influence = self_influence + weight * leverage
            q_sum = q_sum + weight * q
        total = balanced_total(sizes)
        if not self.newton_weights:
            scores, self_influence = scores * q_sum[:, None] / total, self_influence * q_sum / total
        for rows in kernel.own:
            own = slice(rows.start, rows.stop)
            yield ScoreBlock(rows, scores[own] / total, self_influence[own] / total)


def _add_product(scores: Tensor, features: Tensor, solved: Tensor, factors: Tensor) -> None:
    """Add ``diag(factors) features solved`` to scores; the smaller matrix is scaled."""
    if solved.shape[1] < features.shape[1]:
        scores.addcmul_(features @ solved, factors[:, None])
    else:
        scores.addmm_(factors[:, None] * features, solved)
