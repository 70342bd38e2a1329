"""Damped kernels of the training features: one matrix over all of them, or one a layer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_attr.arguments.checks import check_flag
from lightning_attr.methods.base import SnapshotFeatures, compute_precision
from lightning_attr.methods.cache import CacheKey
from lightning_attr.methods.kernels.triangular import squared_norms, triangular_inverse
from lightning_attr.methods.over_snapshots import balanced_weights
from lightning_attr.methods.sampling import RowSample, leverage_error, leverage_sketch, sampled_rows
from lightning_attr.methods.support.damping import DampedMethod, check_damping
from lightning_attr.methods.support.subset_truth import SubsetTruth
from lightning_attr.methods.zero_gradients import tell_zero
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.projectors import Projection, Projector

_STRIP = 256
"""Columns at once where half of a product is known to be zero or to mirror the other half."""
_SUMMED = 4096
"""Rows whose products are added up in the features' precision before they go into float64."""
_SOLVE = 4096
"""Targets solved for at once, in float64."""

Blocks: TypeAlias = "Sequence[tuple[slice, Tensor]]"
"""Columns, and a matrix of that side."""

_KERNELS: CacheKey[Blocks] = CacheKey("kernels")
_LEVERAGES: CacheKey[dict[range, Tensor]] = CacheKey("leverages")
_MEAN: CacheKey[float] = CacheKey("mean size of self-influence")


@dataclass(frozen=True)
class SolvedKernel:
    r"""The inverse of a damped kernel :math:`K = L L^\top`, block by block, applied to targets and samples.

    Args:
        targets: :math:`K^{-1} \Psi^\top`, ``(k, m)``.
        inverses: columns of a block and its :math:`L^{-1}`, lower triangular; or a sketch of it, ``(s, k)``, that is
            good for leverages only.
        known: leverages of training rows; :meth:`leverage` adds to them.

    Example:
        >>> kernel = SolvedKernel(torch.ones(2, 1), [(slice(0, 2), torch.eye(2) / 2)])
        >>> kernel.leverage(torch.ones(1, 2), range(1)), kernel.solve(torch.ones(1, 2))
        (tensor([0.5000]), tensor([[0.2500, 0.2500]]))
    """

    targets: Tensor
    inverses: Blocks
    known: dict[range, Tensor] = field(default_factory=dict)

    def leverage(self, features: Tensor, rows: range) -> Tensor:
        r"""Compute :math:`\phi^\top K^{-1} \phi` of each training sample, once.

        Shapes: features (b, k). Returns ``(b,)``.
        """
        if rows not in self.known:
            norms = [_norms(features[:, columns], inverse) for columns, inverse in self.inverses]
            self.known[rows] = norms[0] if len(norms) == 1 else torch.stack(norms).sum(0)
        return self.known[rows]

    def solve(self, features: Tensor) -> Tensor:
        r"""Compute :math:`K^{-1} \phi` of each sample.

        Shapes: features (b, k). Returns ``(b, k)``.
        """
        return torch.cat([features[:, columns] @ inverse.T @ inverse for columns, inverse in self.inverses], dim=1)


class KernelMethod(DampedMethod):
    r"""A method that solves for its targets against the damped kernel :math:`\Phi^\top W \Phi` of its features.

    Args:
        projector: the projection.
        damping: added to the diagonal, as a multiple of the mean of each matrix's diagonal; or "auto".
        per_layer: one kernel per layer, whose features do not interact, instead of one for all.
        truth: models retrained on subsets, for ``damping="auto"`` to choose by.

    Attributes:
        sampling: whether kernels and leverages of many samples may be estimated, see
            :mod:`lightning_attr.methods.sampling`.

    Raises:
        ValueError: if the damping is negative, or does not go with the truth.

    Example:
        >>> class Plain(KernelMethod):                       # a method of your own: weights, and what to do with them
        ...     def kernel_weights(self, columns):
        ...         return None
        ...     def score(self, snapshots):
        ...         for snapshot in snapshots:
        ...             yield self.solve(snapshot).targets
        >>> train, targets = {"features": torch.eye(2)}, {"features": torch.ones(1, 2)}
        >>> next(Plain(None, damping=1.0).score([SnapshotFeatures.of(train, targets)])).flatten()
        tensor([0.5000, 0.5000])
    """

    sampling: bool = False

    def __init__(
        self,
        projector: Projector | None,
        damping: float | str,
        per_layer: bool = False,
        truth: SubsetTruth | None = None,
    ) -> None:
        super().__init__(projector)
        self.damping = check_damping(self, damping, truth)
        self.per_layer = check_flag(self, "per_layer", per_layer)
        self.truth = truth

    def bind(self, layout: ParameterLayout, snapshot: str) -> Projection:
        """Draw the projection, see :meth:`AttributionMethod.bind`.

        Args:
            layout: the parameters.
            snapshot: key of the projection.

        Returns:
            The projection.

        Raises:
            ValueError: if kernels are wanted layer by layer, but the projection mixes layers.
        """
        projection = super().bind(layout, snapshot)
        if self.per_layer and projection.layers is None:
            raise self._mixed()
        return projection

    @abstractmethod
    def kernel_weights(self, columns: Mapping[str, Tensor]) -> Tensor | None:
        """Weigh training samples in the kernel.

        Args:
            columns: of the store, ``(b, ...)``.

        Returns:
            ``W``, ``(b,)``; None for ones.
        """

    def solve(self, snapshot: SnapshotFeatures) -> SolvedKernel:
        r"""Solve for the targets; the kernel is computed once a snapshot, and kept for the next targets.

        Products are of blocks of rows in the features' precision, added up and factored in float64. The evidence gets
        the effective dimension, :math:`\operatorname{tr} K (K + \lambda I)^{-1}`.

        Args:
            snapshot: with the features.

        Returns:
            The solved targets, and the inverse of the kernel, in the features' precision.

        Raises:
            ValueError: if a kernel is singular, or not finite.
        """
        damping = self.damping_at(snapshot)
        rows = self._sampled(snapshot, damping)
        # Not damped: one serves every damping.
        kernels = snapshot.cache.once(_KERNELS.at(rows), lambda: self.kernels(snapshot, rows))
        targets = compute_precision(snapshot.targets["features"])
        solved = targets.new_empty(targets.shape[1], len(targets))
        inverses, dimension = [], 0.0
        for columns, kernel in kernels:
            ridge = damping * kernel.diagonal().mean()
            if not kernel.any():  # of gradients that are zero, any ridge makes scores of zero
                ridge = torch.ones_like(ridge)
                tell_zero(snapshot)
            factor = _factor(kernel, ridge, damping)
            for start in range(0, len(targets), _SOLVE):
                part = slice(start, start + _SOLVE)
                solved[columns, part] = torch.cholesky_solve(targets[part, columns].T.double(), factor)
            sketch = leverage_sketch(factor, snapshot.n_train, snapshot.key) if self.sampling else None
            inverse = triangular_inverse(factor.to(targets.dtype)) if sketch is None else sketch.to(targets.dtype)
            if sketch is not None:
                snapshot.evidence["leverage_error"] = leverage_error()
            inverses.append((columns, inverse))
            dimension += (len(factor) - ridge * inverse.square().sum()).item()
        snapshot.evidence["effective_dimension"] = dimension
        return SolvedKernel(solved, inverses, snapshot.cache.once(_LEVERAGES.at(damping), dict))

    def beside(self, snapshot: SnapshotFeatures, columns: Mapping[str, Tensor]) -> Tensor | None:
        """Give more rows of the kernel, beside those of the features.

        Args:
            snapshot: whose they are.
            columns: of some training samples.

        Returns:
            ``(rows, k)``; None for no more. Of a snapshot whose ``curvature`` is "whole", they are all.
        """
        return None

    def _sampled(self, snapshot: SnapshotFeatures, damping: float) -> int | None:
        """How many rows the kernel is added up from; None for all."""
        whole = snapshot.directions and snapshot.curvature == "whole"  # second directions, of a share of the samples
        if (
            whole or not self.sampling or self.truth is not None
        ):  # one kernel serves all dampings that the truth chooses from
            return None
        rows = sampled_rows(snapshot.n_train, snapshot.targets["features"].shape[1], damping)
        if rows is not None:
            snapshot.evidence["kernel_rows"] = rows
        return rows

    def kernels(self, snapshot: SnapshotFeatures, sampled: int | None = None) -> Blocks:
        """Add up the kernel, without damping.

        Args:
            snapshot: with the training features.
            sampled: how many random rows to add it up from; None for all.

        Returns:
            Columns and matrix of each block, float64.
        """
        columns = self.columns(snapshot)
        return list(zip(columns, self._sums(snapshot, columns, sampled), strict=True))

    def columns(self, snapshot: SnapshotFeatures) -> Sequence[slice]:
        """List the features that share a kernel.

        Args:
            snapshot: whose they are.

        Returns:
            Columns of each kernel.

        Raises:
            ValueError: if kernels are wanted layer by layer, but the features mix layers.
        """
        if not self.per_layer:
            return [slice(0, snapshot.targets["features"].shape[1])]
        if snapshot.layers is None:
            raise self._mixed()
        return [columns for columns in snapshot.layers.values() if columns.stop > columns.start]

    def _weighted(self, block: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """Features times the roots of their weights."""
        features, weights = block["features"].to(like), self.kernel_weights(block)
        return features if weights is None else features * weights.to(features).sqrt()[:, None]

    def _sums(self, snapshot: SnapshotFeatures, columns: Sequence[slice], sampled: int | None = None) -> list[Tensor]:
        """Sum the kernels over the training samples of all processes, or over a sample of them, float64."""
        targets = compute_precision(snapshot.targets["features"])
        sides = [own.stop - own.start for own in columns]
        sums = [torch.zeros(k, k, dtype=torch.float64, device=targets.device) for k in sides]
        parts = [targets.new_zeros(k, k) for k in sides]  # of the rows since the last that went into the sums
        pending, sample = 0, None
        if sampled is not None:
            sizes = (_sizes(self._weighted(block, targets)) for _, block in snapshot.blocks())
            sample = RowSample.of(sizes, sampled, snapshot)
        for rows, block in snapshot.blocks():
            more = self.beside(snapshot, block)
            if more is not None:
                for own, part in zip(columns, parts, strict=True):
                    _add_upper(part, more.to(targets)[:, own])
                pending += len(more)
                if snapshot.curvature == "whole":
                    continue
            features = self._weighted(block, targets)
            if sample is not None:
                factors = sample.factors(rows, _sizes(features))
                features = features[factors > 0] * factors[factors > 0].sqrt()[:, None]
            for own, part in zip(columns, parts, strict=True):
                _add_upper(part, features[:, own])
            pending += len(features)
            if pending >= _SUMMED:
                pending = 0
                for total, part in zip(sums, parts, strict=True):
                    total += part
                    part.zero_()
        return [snapshot.reduce(_mirrored(total.add_(part))) for total, part in zip(sums, parts, strict=True)]

    def balanced_weights(self, snapshots: Sequence[SnapshotFeatures], kernels: Sequence[SolvedKernel]) -> list[float]:
        """Weigh snapshots so that each has an equal part in the scores; several are read once more for it.

        Args:
            snapshots: in the order of training.
            kernels: from :meth:`solve`, for each.

        Returns:
            Weights with the sum one, inverse to the mean size of the training samples' self-influence.
        """
        if len(snapshots) == 1:
            return [1.0]
        means = []
        for snapshot, kernel in zip(snapshots, kernels, strict=True):
            key = _MEAN.at(self.damping_at(snapshot))
            means.append(snapshot.cache.once(key, partial(_mean_self_influence, snapshot, kernel)))
        return balanced_weights(means)

    def _mixed(self) -> ValueError:
        kind = type(self.projector).__name__
        return ValueError(
            f"Expected features that keep the layers apart for `per_layer=True`, but {kind} mixes them. Use "
            "KroneckerProjector, FactGraSSProjector(per_layer=True) or IdentityProjector, or `per_layer=False`."
        )


def _sizes(features: Tensor) -> Tensor:
    return features.square().sum(1)


def _norms(features: Tensor, inverse: Tensor) -> Tensor:
    """Squared norms of ``features @ inverse.T``, of a triangular inverse or of a sketch."""
    if len(inverse) == inverse.shape[1]:
        return squared_norms(features, inverse)
    return (features @ inverse.T).square_().sum(1)


def _factor(kernel: Tensor, ridge: Tensor, damping: float) -> Tensor:
    """Return the lower triangular factor of a kernel with a ridge, which is the damping times its scale."""
    if not kernel.isfinite().all():
        raise ValueError(
            "Expected finite features, but the kernel of the training features holds NaN or infinite values. Look "
            "for them in the columns `features` and `newton_weight` of the store, and featurize these rows again."
        )
    factor: Tensor
    damped = kernel.clone()
    damped.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        raise ValueError(
            f"The kernel of {len(kernel)} features is singular with `damping={damping}`. Raise the damping "
            "(0.1 to 1.0 are good values), or lower `proj_dim` below the number of training samples."
        )
    return factor


def _add_upper(kernel: Tensor, features: Tensor) -> None:
    """Add the products of features to the upper triangle of a kernel; what is below it does not matter."""
    for start in range(0, len(kernel), _STRIP):
        strip = slice(start, start + _STRIP)
        kernel[strip, start:].addmm_(features[:, strip].T, features[:, start:])


def _mirrored(kernel: Tensor) -> Tensor:
    """Copy the upper triangle to the lower, in place."""
    for start in range(0, len(kernel), _STRIP):
        stop = start + _STRIP
        corner = kernel[start:stop, start:stop]
        corner.copy_(corner.triu() + corner.triu(1).T)
        kernel[stop:, start:stop] = kernel[start:stop, stop:].T
    return kernel


def _mean_self_influence(snapshot: SnapshotFeatures, kernel: SolvedKernel) -> float:
    """Mean size over the training samples of all processes."""
    sums = torch.zeros(2, dtype=torch.float64)
    for rows, columns in snapshot.blocks():
        q = columns["out_to_loss"].to(kernel.targets)
        size = (q * kernel.leverage(columns["features"].to(q), rows)).abs().double().sum().item()
        sums += torch.tensor([size, len(rows)], dtype=torch.float64)
    total, count = snapshot.reduce(sums).tolist()
    return float(total / count)
