r"""Damped kernels over training samples in place of features: exact where samples are few, and gradients whole.

With the gradients :math:`G` ``(n, p)`` of the training samples, their weights :math:`W` and :math:`K = W^{1/2} G G^\top
W^{1/2}`,

.. math::
    (G^\top W G + \lambda I)^{-1} G^\top W^{1/2} = G^\top W^{1/2} (K + \lambda I)^{-1},

so that a kernel of side ``n`` does what one of side ``p`` would.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from lightning_attr.data.memory import free_bytes
from lightning_attr.methods.base import SnapshotFeatures
from lightning_attr.methods.cache import CacheKey
from lightning_attr.methods.kernels.triangular import triangular_inverse
from lightning_attr.methods.support.module_method import model_of
from lightning_attr.methods.zero_gradients import tell_zero
from lightning_attr.projectors import GradientFactors

_Kernel = TypeVar("_Kernel", bound="DualKernel")

_KERNEL: CacheKey[DualKernel] = CacheKey("kernel of samples")
_MATRICES = 4
"""As large as the kernel, in float64, at one time."""
_KEPT_ROWS = 2**12
"""Rows up to which a kernel is kept for the next targets: 128 MiB a snapshot."""
_LEAST_WEIGHT = 1e-8
"""Of the mean weight: what is less counts as that, for its root is divided by."""


@dataclass(frozen=True)
class SolvedSamples:
    r"""What a damped kernel says of all training samples.

    Args:
        terms: :math:`G (G^\top W G + \lambda I)^{-1} \Psi^\top`, ``(n, m)``.
        leverage: :math:`g_i^\top (G^\top W G + \lambda I)^{-1} g_i`, ``(n,)``.
        dimension: the effective dimension, :math:`\operatorname{tr} K (K + \lambda I)^{-1}`; None where it would cost
            more than all else.

    Example:
        >>> SolvedSamples(torch.zeros(3, 2), torch.zeros(3), 0.0).terms.shape
        torch.Size([3, 2])
    """

    terms: Tensor
    leverage: Tensor
    dimension: float | None


class DualKernel:
    """The gradients of all training samples at a snapshot, and the kernel of their inner products.

    Args:
        snapshot: with its model, which runs once.
        weighted: whether the kernel is weighed by the curvature of the loss in the output.

    Attributes:
        columns: values of the training samples beside their gradients, of all processes, ``(n,)`` each.
        own: rows of the blocks that this process has.

    Raises:
        ValueError: if kernel and gradients do not fit into memory, or the kernel is not finite.

    Example:
        >>> from torch import nn
        >>> from lightning_attr import AttributionMixin
        >>> from lightning_attr.outputs import Regression
        >>> from lightning_attr.features.snapshot_model import SnapshotModel
        >>> class Line(AttributionMixin, nn.Linear):
        ...     model_output = Regression()
        >>> line, batch = Line(1, 1, bias=False).eval(), (torch.tensor([[1.0], [2.0]]), torch.ones(2))
        >>> snapshot = SnapshotFeatures.at(SnapshotModel.of(line, [batch], [batch]), {})
        >>> solved = DualKernel(snapshot, weighted=True).solve(snapshot, ridge=5.0)
        >>> solved.terms, solved.leverage                                            # x_i x_j / (1 + 4 + 5)
        (tensor([[0.1000, 0.2000],
                [0.2000, 0.4000]]), tensor([0.1000, 0.4000]))
    """

    def __init__(self, snapshot: SnapshotFeatures, weighted: bool) -> None:
        model = model_of(snapshot)
        n = model.n_train
        self.weighted = weighted
        self.factors: GradientFactors = model.gradient_factors()
        self._check_memory(n, free_bytes(model.device), model.dtype.itemsize)
        found = list(model.train(self.factors))
        self.own: Sequence[range] = [rows for rows, _ in found]
        self.columns = {
            name: gathered(snapshot, [(rows, columns[name]) for rows, columns in found])
            for name in ("out_to_loss", "newton_weight")
        }
        self.features = gathered(snapshot, [(rows, columns["features"]) for rows, columns in found], self.factors.dim)
        del found
        self.roots = torch.ones(n, dtype=torch.float64, device=model.device)
        self.rows = self._rows(snapshot)
        kernel = self.factors.products(self.rows, self.rows).double()
        self.kernel = kernel.mul_(self.roots[:, None]).mul_(self.roots)
        if not self.kernel.sum().isfinite():
            raise ValueError(
                "Expected a finite kernel, but the inner products of the training samples' gradients hold NaN or "
                "infinite values. Look for a snapshot of a training that diverged."
            )

    rows_a_sample = 1
    """Of the kernel."""
    gradients_a_sample = 1
    """In memory at one time."""

    def _check_memory(self, n: int, free: int | None, itemsize: int) -> None:
        gradients = itemsize * n * self.gradients_a_sample * self.factors.dim
        needed = 8 * _MATRICES * (n * self.rows_a_sample) ** 2 + gradients
        if free is not None and needed > free:
            raise ValueError(
                f"Expected memory for the kernel and the gradients of all {n:,} training samples for `exact=True`, "
                f"about {needed / 1e9:,.1f} GB, but {free / 1e9:,.1f} GB are free. Leave `exact` out, and raise "
                "`proj_dim` where there is room."
            )

    def _rows(self, snapshot: SnapshotFeatures) -> Tensor:
        """Gradients of which the kernel has the products; their roots beside them."""
        if self.weighted:
            self.roots = newton_roots(self.columns["newton_weight"])
        return self.features

    @classmethod
    def at(cls, snapshot: SnapshotFeatures, weighted: bool) -> DualKernel:
        """Give the kernel of a snapshot, kept for the next targets where it is small."""
        return kept_where_small(snapshot, _KERNEL.at(weighted), lambda: cls(snapshot, weighted))

    def solve(self, snapshot: SnapshotFeatures, ridge: float) -> SolvedSamples:
        """Solve for the targets of a snapshot.

        Returns terms and leverages of all training samples, in the features' precision.
        """
        targets = model_of(snapshot).targets(self.factors, snapshot.target_rows)["features"]
        if not self.kernel.any():
            tell_zero(snapshot)
            return SolvedSamples(
                targets.new_zeros(len(self.kernel), len(targets)), targets.new_zeros(len(self.kernel)), 0
            )
        factor = self.factor(ridge)
        products = self.factors.products(self.features, targets).double().mul_(self.roots[:, None])
        terms = torch.cholesky_solve(products, factor).div_(self.roots[:, None])
        left = ridge * triangular_inverse(factor).square_().sum(0)  # of each sample's own part, what the ridge takes
        leverage = (1 - left) / self.roots.square()
        return SolvedSamples(terms.to(targets), leverage.to(targets), (1 - left).sum().item())

    def factor(self, ridge: float) -> Tensor:
        """Factor the damped kernel."""
        damped = self.kernel.clone()
        damped.diagonal().add_(ridge)
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(damped)
        del damped  # of the memory that was asked for
        if failed:
            raise ValueError(
                f"The kernel of {len(self.features)} training samples is singular: gradients of some are combinations "
                "of those of others. Raise the damping (0.3 to 3.0 are good values)."
            )
        return factor


def newton_roots(weights: Tensor) -> Tensor:
    """Take the roots of Newton weights, none of them so small that it cannot be divided by.

    Shapes: weights (n,). Returns ``(n,)``, float64.

    Example:
        >>> newton_roots(torch.tensor([4.0, 9.0]))
        tensor([2., 3.], dtype=torch.float64)
    """
    weights = weights.double()
    return weights.clamp(min=_LEAST_WEIGHT * weights.mean().item()).sqrt()


def gathered(snapshot: SnapshotFeatures, found: Sequence[tuple[range, Tensor]], *width: int) -> Tensor:
    """Bring the rows of all processes together; one may have none.

    Shapes: found (b, *width). Returns ``(n, *width)``.
    """
    model = model_of(snapshot)
    whole = torch.zeros(model.n_train, *width, dtype=model.dtype, device=model.device)
    for rows, values in found:
        whole[rows.start : rows.stop] = values
    return snapshot.reduce(whole)


def kept_where_small(snapshot: SnapshotFeatures, key: CacheKey[_Kernel], make: Callable[[], _Kernel]) -> _Kernel:
    """Give a kernel of a snapshot, kept for the next targets unless it is large."""
    kernel = snapshot.cache.find(key)
    if kernel is None:
        kernel = make()
        if len(kernel.kernel) <= _KEPT_ROWS:
            snapshot.cache.keep(key, kernel)
    return kernel
