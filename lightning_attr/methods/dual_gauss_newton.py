r"""The damped kernel over training samples of the whole Gauss-Newton matrix: two kinds of rows per sample.

With the output gradients :math:`\Phi` ``(n, p)``, their Newton weights :math:`W`, and :math:`G` ``(r n, p)`` of the
second directions (see :mod:`lightning_attr.outputs.directions`), the rows are :math:`F = [G; W^{1/2} \Phi]`, or
:math:`G` alone where that is the whole matrix, and

.. math::
    \Phi (F^\top F + \lambda I)^{-1} \Psi^\top
    = \big[\Phi \Psi^\top - \Phi F^\top (F F^\top + \lambda I)^{-1} F \Psi^\top\big] / \lambda .

Where :math:`W^{1/2} \Phi` is among the rows, the difference cancels: it is :math:`W^{-1/2}` times its rows of :math:`(F
F^\top + \lambda I)^{-1} F \Psi^\top`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_attr.methods.base import SnapshotFeatures
from lightning_attr.methods.cache import CacheKey
from lightning_attr.methods.kernels.sample_kernel import (
    DualKernel,
    SolvedSamples,
    gathered,
    kept_where_small,
    newton_roots,
)
from lightning_attr.methods.kernels.triangular import triangular_inverse
from lightning_attr.methods.support.module_method import model_of
from lightning_attr.methods.zero_gradients import tell_zero

_KERNEL: CacheKey[GaussNewtonKernel] = CacheKey("Gauss-Newton kernel")


class GaussNewtonKernel(DualKernel):
    """The gradients and second directions of all training samples at a snapshot, and the kernel of their products.

    Args:
        snapshot: with its model, which runs once for the gradients and once for each direction.
        directions: second directions a sample.
        whole: whether they alone are the Gauss-Newton matrix.

    Raises:
        ValueError: if kernel and gradients do not fit into memory, or the kernel is not finite.

    Example:
        >>> from torch import nn
        >>> from lightning_attr import AttributionMixin
        >>> from lightning_attr.features.snapshot_model import SnapshotModel
        >>> class Classifier(AttributionMixin, nn.Linear): ...
        >>> classifier, batch = Classifier(2, 3).eval(), (torch.randn(4, 2), torch.tensor([0, 1, 2, 0]))
        >>> snapshot = SnapshotFeatures.at(SnapshotModel.of(classifier, [batch], [batch]), {})
        >>> kernel = GaussNewtonKernel(snapshot, directions=2, whole=False)
        >>> kernel.kernel.shape, kernel.solve(snapshot, ridge=1.0).terms.shape
        (torch.Size([12, 12]), torch.Size([4, 4]))
    """

    def __init__(self, snapshot: SnapshotFeatures, directions: int, whole: bool) -> None:
        self.directions = directions
        self.whole = whole
        self.rows_a_sample = directions + (not whole)
        self.gradients_a_sample = 2 * directions + 1
        super().__init__(snapshot, weighted=not whole)

    @classmethod
    def kept(cls, snapshot: SnapshotFeatures, directions: int, whole: bool) -> GaussNewtonKernel:
        """Give the kernel of a snapshot, kept for the next targets where it is small."""
        return kept_where_small(snapshot, _KERNEL.at(directions, whole), lambda: cls(snapshot, directions, whole))

    def _rows(self, snapshot: SnapshotFeatures) -> Tensor:
        """Second directions first: what is wanted of the first ones is in the last block of the factor."""
        model = model_of(snapshot)
        found = list(model.second_directions(self.factors, self.directions))
        second = gathered(snapshot, found, self.directions, self.factors.dim).flatten(0, 1)
        roots = torch.ones(len(second), dtype=torch.float64, device=second.device)
        if self.whole:
            self.roots = roots
            return second
        self.roots = torch.cat([roots, newton_roots(self.columns["newton_weight"])])
        rows = torch.cat([second, self.features])
        self.features = rows[len(second) :]
        return rows

    def solve(self, snapshot: SnapshotFeatures, ridge: float) -> SolvedSamples:
        """Solve for the targets of a snapshot; see :meth:`DualKernel.solve`.

        Returns terms and leverages of all training samples, in the features' precision.
        """
        targets = model_of(snapshot).targets(self.factors, snapshot.target_rows)["features"]
        n = len(self.features)
        if not self.kernel.any():
            tell_zero(snapshot)
            return SolvedSamples(targets.new_zeros(n, len(targets)), targets.new_zeros(n), 0)
        factor = self.factor(ridge)
        solved = self._solved(factor, targets)
        if self.whole:
            # [Phi Psi' - C' D] / lambda with C = L^-1 F Phi' and D = L^-1 F Psi'
            own = self._solved(factor, self.features)
            terms = (self.factors.products(self.features, targets).double() - own.T @ solved) / ridge
            leverage = (self.factors.squares(self.features).double() - own.square().sum(0)) / ridge
            return SolvedSamples(terms.to(targets), leverage.to(targets), None)
        last, roots = factor[-n:, -n:], self.roots[-n:]
        terms = torch.linalg.solve_triangular(last.T, solved[-n:], upper=True).div_(roots[:, None])
        left = ridge * triangular_inverse(last).square_().sum(0)
        return SolvedSamples(terms.to(targets), ((1 - left) / roots.square()).to(targets), None)

    def _solved(self, factor: Tensor, right: Tensor) -> Tensor:
        """The factor's inverse times the rows' products with others, float64."""
        products = self.factors.products(self.rows, right).double().mul_(self.roots[:, None])
        whole: Tensor = torch.linalg.solve_triangular(factor, products, upper=False)
        return whole
