r"""Gradient descent on a quadratic, unrolled: what is left of a push after a time, and what pushes add up to.

In an eigenbasis of the curvature, with eigenvalues :math:`\lambda` and the time :math:`t`, the sum of learning rates:
:math:`e^{-t \lambda}` and :math:`(1 - e^{-t \lambda}) / \lambda` (Bae et al., 2024).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_attr.curvature.kronecker_factors import KroneckerFactors, KroneckerMethod
from lightning_attr.curvature.kronecker_inverse import in_eigenbasis


def response(eigenvalues: Tensor, time: float) -> Tensor:
    r"""Compute :math:`(1 - e^{-t \lambda}) / \lambda`, which is the time itself where there is no curvature.

    Example:
        >>> response(torch.tensor([0.0, 2.0]), 1.0)
        tensor([1.0000, 0.4323])
    """
    x = time * eigenvalues
    small = x.abs() < 1e-8
    return time * torch.where(small, 1 - x / 2, -torch.expm1(-x) / torch.where(small, 1.0, x))


class UnrolledSegment:
    r"""A part of training with constant curvature, walked backwards by the targets of attribution.

    .. math::
        r = D^{1/2} \frac{1 - e^{-t \tilde H}}{\tilde H} D^{1/2} q, \qquad
        q' = q - D^{-1/2} (1 - e^{-t \tilde H}) D^{1/2} q, \qquad \tilde H = D^{1/2} (H + \rho I) D^{1/2}

    with the curvature :math:`H` by its Kronecker factors, and :math:`\tilde H` by its diagonal in the eigenbasis of
    :math:`H`, in which ``D`` counts by its own diagonal. Without ``D`` that is exact; parameters without factors have
    no part in ``r``.

    Args:
        factors: of the curvature.
        time: the sum of the learning rates.
        method: "ekfac" or "kfac".
        weight_decay: :math:`\rho`.
        decoupled: whether :math:`\rho` stands beside :math:`\tilde H`, not in it.
        metric: :math:`D`, ``(p,)``: what the optimizer multiplies gradients with; None for ones.

    Example:
        >>> from lightning_attr.curvature.fisher import GradientBatch
        >>> from lightning_attr.curvature.kronecker_layout import KroneckerLayout
        >>> from lightning_attr.gradients import OuterSum
        >>> layer, x, delta = torch.nn.Linear(1, 1, bias=False), torch.full((1, 1, 1), 2.0), torch.ones(1, 1, 1)
        >>> batch = GradientBatch([lambda sink: sink({"weight": OuterSum(delta, x)})], samples=1)
        >>> factors = KroneckerFactors.fit(KroneckerLayout.of(layer), lambda number: [batch])  # a curvature of 4
        >>> UnrolledSegment(factors, time=1.0).back(torch.tensor([[8.0]]))  # 8 (1 - exp(-4)) / 4, and 8 exp(-4)
        (tensor([[1.9634]]), tensor([[0.1465]]))
    """

    def __init__(
        self,
        factors: KroneckerFactors,
        time: float,
        method: KroneckerMethod = "ekfac",
        weight_decay: float = 0.0,
        decoupled: bool = False,
        metric: Tensor | None = None,
    ) -> None:
        self.factors = factors
        self.root = None if metric is None else metric.sqrt()
        self.responses: dict[str, Tensor] = {}
        self.decayed: dict[str, Tensor] = {}
        """What is gone of a push at the end of the time, a share of one in each direction."""
        for name, own in self._damped(method, weight_decay, decoupled, metric).items():
            self.responses[name] = response(own, time)
            self.decayed[name] = own * self.responses[name]

    def back(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Walk from the end of the segment to its beginning.

        Shapes: vectors (m, p). Returns ``r`` and ``q'``, ``(m, p)`` each, of the same dtype.
        """
        root = None if self.root is None else self.root.to(vectors)
        scaled = vectors if root is None else vectors * root
        found = in_eigenbasis(self.factors, scaled, self.responses)
        gone = in_eigenbasis(self.factors, scaled, self.decayed)
        if root is None:
            return found, vectors - gone
        return found * root, vectors - gone / torch.where(root > 0, root, torch.inf)

    def _damped(
        self, method: KroneckerMethod, weight_decay: float, decoupled: bool, metric: Tensor | None
    ) -> Mapping[str, Tensor]:
        found, slots = {}, self.factors.layout.slots
        for block in self.factors.layout.blocks:
            factors = self.factors.blocks[block.weight]
            own = factors.eigenvalues(method)
            scale: Tensor | float = 1.0
            if metric is not None:
                row = metric.to(own)[None]
                entries = block.matrices({name: row[:, slots[name]] for name in block.names})[0]
                squares = factors.rows_basis.to(own).square(), factors.columns_basis.to(own).square()
                scale = squares[0].mT @ entries @ squares[1]
            found[block.weight] = own * scale + weight_decay * (1.0 if decoupled else scale)
        return found
