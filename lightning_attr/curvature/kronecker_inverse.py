r"""The inverse of a K-FAC or EK-FAC curvature, applied to vectors and to per-sample gradients.

In the eigenbasis of a layer the curvature is diagonal:
:math:`V \mapsto Q_S [(Q_S^\top V Q_A) / (\Lambda + \lambda)] Q_A^\top` (Grosse et al., 2023, section 3.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_attr.curvature.fisher import GradientStream
from lightning_attr.curvature.kronecker_factors import BlockFactors, KroneckerFactors, KroneckerMethod
from lightning_attr.curvature.kronecker_layout import KroneckerBlock
from lightning_attr.curvature.kronecker_rotation import BatchUses, rotated, rotated_gradients, squared_gradients
from lightning_attr.gradients import ParameterGradient
from lightning_attr.projectors import Projection


class KroneckerInverse:
    r"""Applies :math:`(C + \lambda I)^{-1}`, a block a layer; parameters without factors give zero.

    Args:
        factors: the fitted factors.
        damping: :math:`\lambda` of each block in units of the mean of its eigenvalues.
        method: "ekfac" or "kfac".
        weight_decay: :math:`\rho` of an L2 term :math:`\frac\rho2 |\theta|^2` of the training objective, whose Hessian
            is added.

    Raises:
        ValueError: if the damping or the weight decay is negative, or a block is singular without damping.

    Example:
        >>> from lightning_attr.curvature.kronecker_layout import KroneckerLayout
        >>> from lightning_attr.curvature.fisher import GradientBatch
        >>> from lightning_attr.gradients import OuterSum
        >>> layer, x, delta = torch.nn.Linear(1, 1, bias=False), torch.full((1, 1, 1), 2.0), torch.ones(1, 1, 1)
        >>> batch = GradientBatch([lambda sink: sink({"weight": OuterSum(delta, x)})], samples=1)
        >>> factors = KroneckerFactors.fit(KroneckerLayout.of(layer), lambda number: [batch])
        >>> KroneckerInverse(factors, damping=0.25).apply(torch.tensor([[10.0]]))  # 10 / (4 + 0.25 * 4)
        tensor([[2.]])
    """

    def __init__(
        self,
        factors: KroneckerFactors,
        *,
        damping: float = 0.1,
        method: KroneckerMethod = "ekfac",
        weight_decay: float = 0.0,
    ) -> None:
        for name, value in (("damping", damping), ("weight_decay", weight_decay)):
            if not 0 <= value < math.inf:
                raise ValueError(f"Expected argument `{name}` to be a non-negative number, but got {value}.")
        self.factors = factors
        self.layout = factors.layout
        self.scales = {
            name: _reciprocal(name, block, method, damping, weight_decay) for name, block in factors.blocks.items()
        }

    def apply(self, vectors: Tensor) -> Tensor:
        """Apply the inverse to each row.

        Shapes: vectors (r, p). Returns ``(r, p)``, of the same dtype.
        """
        size = self.layout.parameters.numel
        if vectors.ndim != 2 or vectors.shape[1] != size:
            raise ValueError(
                f"Expected argument `vectors` of shape (r, {size}), one number a parameter, but got "
                f"{tuple(vectors.shape)}."
            )
        return in_eigenbasis(self.factors, vectors, self.scales)

    def apply_parameters(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Apply the inverse to one vector that is given parameter by parameter.

        Returns the same names and shapes.
        """
        shapes = self.layout.parameters.shapes
        if vectors.keys() != shapes.keys():
            raise ValueError(
                f"Expected argument `vectors` to have the parameters {sorted(shapes)}, but got {sorted(vectors)}."
            )
        row = torch.cat([vectors[name].reshape(-1) for name in shapes])
        parts = self.apply(row.unsqueeze(0)).squeeze(0).split([math.prod(shape) for shape in shapes.values()])
        return {name: part.reshape(shape) for part, (name, shape) in zip(parts, shapes.items(), strict=True)}

    def quadratic_form(self, stream: GradientStream, batch_size: int, *, power: int = 1) -> Tensor:
        r"""Compute :math:`g_i^\top (C + \lambda I)^{-k} g_i` for each sample of a batch from its factored gradients.

        The first power is the self-influence of a sample, the root of the second the length of its influence on the
        parameters; both normalise the scores of RelatIF (Barshan et al., 2020).

        Returns ``(b,)``, of the dtype of the gradients; float32 if there are none.
        """
        uses = BatchUses({block.weight: block for block in self.layout.blocks})
        stream(uses)
        totals: Any = 0
        for block, found in uses:
            factors = self.factors.blocks[block.weight]
            parts = [
                squares.weighted(self.scales[block.weight].to(factors.rows_basis) ** power)
                for _, squares in squared_gradients(block, found, factors.rows_basis, factors.columns_basis)
            ]
            totals = totals + torch.cat(parts)
        return totals if isinstance(totals, Tensor) else torch.zeros(batch_size)

    def turned(self, block: KroneckerBlock, vectors: Tensor) -> Tensor:
        """Apply the inverse to a block's part of each row, but stay in the eigenbasis.

        Shapes: vectors (r, p). Returns ``(r, groups, d_o, d_i)``.
        """
        return _turned(self.factors, block, vectors, self.scales[block.weight])


def in_eigenbasis(factors: KroneckerFactors, vectors: Tensor, scales: Mapping[str, Tensor]) -> Tensor:
    """Multiply the coordinates of vectors in the eigenbasis of each block; parameters without factors give zero.

    Shapes: vectors (r, p), scales (groups, d_o, d_i) by the name of the block's weight. Returns ``(r, p)``.
    """
    result, slots = torch.zeros_like(vectors), factors.layout.slots
    for block in factors.layout.blocks if len(vectors) else ():
        own = factors.blocks[block.weight]
        rows, columns = own.rows_basis.to(vectors), own.columns_basis.to(vectors)
        turned = _turned(factors, block, vectors, scales[block.weight])
        for name, part in block.vectors(rotated(rows @ turned, columns.mT)).items():
            result[:, slots[name]] = part
    return result


def _turned(factors: KroneckerFactors, block: KroneckerBlock, vectors: Tensor, scales: Tensor) -> Tensor:
    """Coordinates of a block's part of each row, times their scales, ``(r, groups, d_o, d_i)``."""
    own, slots = factors.blocks[block.weight], factors.layout.slots
    matrices = block.matrices({name: vectors[:, slots[name]] for name in block.names})
    rows, columns = own.rows_basis.to(matrices), own.columns_basis.to(matrices)
    return rotated(rows.mT @ matrices, columns).mul_(scales.to(matrices))


class InverseForms(Projection):
    r"""Inner products of gradients with solved vectors, and their own quadratic forms, from one rotation of each.

    Features are :math:`v_r^\top (C + \lambda I)^{-1} g` for each vector, and
    :math:`g^\top (C + \lambda I)^{-k} g` for each power; these are not linear in the gradient.

    Args:
        inverse: the inverse.
        vectors: ``(r, p)``.
        powers: ``k``.

    Example:
        >>> from lightning_attr.curvature.kronecker_layout import KroneckerLayout
        >>> from lightning_attr.curvature.fisher import GradientBatch
        >>> from lightning_attr.gradients import OuterSum
        >>> layer, gradient = torch.nn.Linear(1, 1, bias=False), OuterSum(torch.ones(1, 1, 1), torch.ones(1, 1, 1) * 2)
        >>> batch = GradientBatch([lambda sink: sink({"weight": gradient})], samples=1)
        >>> factors = KroneckerFactors.fit(KroneckerLayout.of(layer), lambda number: [batch])
        >>> forms = InverseForms(KroneckerInverse(factors, damping=0.25), torch.tensor([[10.0]]), powers=[1])
        >>> features = torch.zeros(1, forms.dim)
        >>> with forms.filling(features) as add:
        ...     add({"weight": gradient})
        >>> features                                                    # 10 * 2 / 5 and 2 * 2 / 5
        tensor([[4.0000, 0.8000]])
    """

    def __init__(self, inverse: KroneckerInverse, vectors: Tensor, powers: Sequence[int]) -> None:
        super().__init__(len(vectors) + len(powers))
        self.inverse = inverse
        self.powers = powers
        self.names = frozenset(inverse.layout.names)
        self.turned = {block.weight: inverse.turned(block, vectors).flatten(1) for block in inverse.layout.blocks}

    def accumulate(self, features: Tensor, name: str, gradient: ParameterGradient) -> None:
        """Never called: the uses of a layer belong together, see :meth:`filling`."""
        raise NotImplementedError

    @contextmanager
    def filling(self, features: Tensor) -> Iterator[Callable[[Mapping[str, ParameterGradient]], None]]:
        """Gather the uses of each layer, and rotate them in the end; see :meth:`Projection.filling`."""
        uses = BatchUses({block.weight: block for block in self.inverse.layout.blocks})
        yield uses
        features.zero_()
        for block, found in uses:
            factors = self.inverse.factors.blocks[block.weight]
            turned, scales = self.turned[block.weight], self.inverse.scales[block.weight].to(features).flatten()
            for samples, formed in rotated_gradients(block, found, factors.rows_basis, factors.columns_basis):
                rows, part = formed.flatten(1).to(features), features[samples]
                part[:, : len(turned)].addmm_(rows, turned.T)
                rows.square_()
                for column, power in enumerate(self.powers, len(turned)):
                    part[:, column] += rows @ scales**power


def _reciprocal(
    name: str, factors: BlockFactors, method: KroneckerMethod, damping: float, weight_decay: float
) -> Tensor:
    eigenvalues = factors.eigenvalues(method)
    if not eigenvalues.any() and weight_decay == 0:
        return eigenvalues  # all gradients are zero, and so is the influence
    damped = eigenvalues + damping * eigenvalues.mean() + weight_decay
    # Squares of what rounding leaves of a gradient along a direction in which it is zero.
    noise = max(damped.shape[1:]) * torch.finfo(factors.rows_basis.dtype).eps ** 2 * damped.max()
    if damped.min() <= noise:
        raise ValueError(
            f"Expected argument `damping` to be positive (0.1 is usual) for the singular curvature of `{name}`, but "
            f"got {damping}: {int((damped <= noise).sum())} of its {damped.numel()} eigenvalues are zero."
        )
    return damped.reciprocal()
