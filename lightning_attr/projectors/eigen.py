r"""Projection onto the coordinates of the Kronecker eigenbasis in which the gradients of a snapshot are large.

A layer's gradient is :math:`G = \sum_s \delta_s a_s^\top`. With the eigenvectors :math:`U` of
:math:`\sum \delta \delta^\top` and :math:`V` of :math:`\sum a a^\top` over some training samples, its coordinates are

.. math:: C = U^\top G V .

Their second moments :math:`E[C_{ij}^2]` are very uneven. The ``proj_dim`` largest over the whole model are the
features: layers share them as the data ask. Nothing is random but the choice of the samples. The basis is that of
EK-FAC (George et al., 2018, section 3); inner products lose only what lies outside the chosen coordinates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_attr.arguments.checks import check_int
from lightning_attr.gradients.factored import ParameterGradient
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.projectors.base import Projection, Projector, by_layer
from lightning_attr.projectors.chosen_entries import ChosenEntries
from lightning_attr.projectors.kronecker import (
    KroneckerProjector,
    MatrixBlock,
    Sides,
    TwoSidedProjection,
    matrix_blocks,
)
from lightning_attr.projectors.learned import LearnedProjection, LearningRun
from lightning_attr.projectors.side_moments import VECTORS, BlockMoments
from lightning_attr.randomness.streams import random_words

_LEAST_SIDE = 64
"""Eigenvectors that are tried on each side of a weight, at least."""
_LEAST_SAMPLES = 128
_SHARE = 8
"""On small data one sample in eight is learned from: on 1,437 digits, 128, 256 and 512 of them gave the same LDS."""
_FEWER = 4
"""Second moments are taken of one sample in four: they only rank the coordinates."""


class EigenProjector(Projector):
    """Keeps the coordinates of the gradients' own Kronecker eigenbasis that have the largest second moments.

    The basis of a snapshot is learned from a few training samples there, and kept in the store. With
    ``proj_dim >= number of parameters`` there is nothing to learn: gradients are kept as they are.

    Args:
        proj_dim: features per sample, at most.
        seed: chooses the samples that the basis is learned from.
        samples: how many of them at most; on small data an eighth, but no fewer than 128.

    Raises:
        ValueError: if ``proj_dim`` or ``samples`` is not a positive integer.

    Example:
        >>> projection = EigenProjector(4).bind(ParameterLayout({"weight": (3, 5)}), "final")
        >>> gradients = torch.randn(20, 3, 5)
        >>> def run(learner, every=1, entries=1):          # sends the samples' gradients through a map
        ...     with learner.filling(torch.zeros(20, learner.dim)) as add:
        ...         add({"weight": gradients})
        >>> projection.learn(run)
        >>> features = torch.zeros(20, projection.dim)
        >>> projection.accumulate(features, "weight", gradients)
        >>> bool(features.square().sum() < gradients.square().sum())  # the four largest of 15 coordinates
        True
    """

    kind = "eigen"

    def __init__(self, proj_dim: int = 2048, seed: int = 0, samples: int = 512) -> None:
        super().__init__(proj_dim, seed)
        self.samples = check_int(self, "samples", samples, minimum=1)

    def bind(self, layout: ParameterLayout, snapshot: str) -> Projection:
        """Prepare the map of a snapshot; it has to :meth:`EigenProjection.learn` or :meth:`EigenProjection.load`.

        Args:
            layout: the parameters.
            snapshot: key of the snapshot.

        Returns:
            The linear map, without its basis; that of whole gradients where there are no more than ``proj_dim``.
        """
        if layout.numel <= self.proj_dim:
            return KroneckerProjector(self.proj_dim, self.seed).bind(layout, snapshot)
        return EigenProjection(layout, self.proj_dim, self.samples, (self.seed, snapshot))

    @property
    def config(self) -> dict[str, Any]:
        """What a store records of the projector: kind and arguments."""
        return {**super().config, "samples": self.samples}


class DefaultProjector(EigenProjector):
    """An :class:`EigenProjector` that nobody chose, so that it may give way where there is nothing to learn from.

    Example:
        >>> DefaultProjector(64).config == EigenProjector(64).config, DefaultProjector(64, seed=3).random().config
        (True, {'kind': 'kronecker', 'proj_dim': 64, 'seed': 3})
    """

    def random(self) -> KroneckerProjector:
        """Give the projector that takes its place.

        Returns a random one of as many features.
        """
        return KroneckerProjector(self.proj_dim, self.seed)


class EigenProjection(LearnedProjection):
    """The linear map of a snapshot, once it has a basis.

    Args:
        layout: the parameters.
        proj_dim: features per sample, at most.
        samples: how many to learn from.
        key: what their choice depends on.
    """

    def __init__(self, layout: ParameterLayout, proj_dim: int, samples: int, key: tuple[object, ...]) -> None:
        self.blocks = matrix_blocks(layout)
        self.side = max(_LEAST_SIDE, proj_dim // 8)
        super().__init__(min(proj_dim, sum(block.size(self.side) for block in self.blocks)))
        self.layers = {}  # apart, but nobody knows yet which columns are whose
        self.samples = samples
        self.key = key
        self._chosen: dict[str, ChosenEntries] = {}
        self._weights = {block.bias: block.weight for block in self.blocks if block.bias is not None}
        self._basis: dict[str, Tensor] = {}

    def learning_rows(self, n_train: int) -> Sequence[int]:
        """Choose the training samples to learn from.

        Returns their rows, in order; all where there are no more.
        """
        count = min(self.samples, max(_LEAST_SAMPLES, n_train // _SHARE))
        if n_train <= count:
            return range(n_train)
        order = random_words(n_train, "eigen", *self.key).argsort(kind="stable")
        return [int(row) for row in np.sort(order[:count])]

    def learn(self, run: LearningRun) -> None:
        """Learn the basis: covariances of both sides in one pass over the samples, second moments in another."""
        moments = _SideMoments(self.blocks, self.names, self.side)
        run(moments, entries=VECTORS)
        wide = TwoSidedProjection([(block, moments.sides(block)) for block in self.blocks])
        squares = _Squares(wide, self.names)
        run(squares, every=_FEWER, entries=wide.dim)
        # Stable: among equal moments the first win, whatever the device.
        largest = squares.sums.argsort(descending=True, stable=True)[: self.dim]
        self.load(_basis(wide, largest.sort().values.cpu()))

    def rehearse(self) -> None:
        """Take axes in place of eigenvectors, about as many as are kept of them, and entries from everywhere."""
        wanted = 4 * self.dim
        side = next((n for n in range(1, self.side) if sum(b.size(n) for b in self.blocks) >= wanted), self.side)
        axes = [(b, Sides(_axes(side, b.rows), _axes(side, b.columns), b.weight)) for b in self.blocks]
        wide = TwoSidedProjection(axes)
        self.load(_basis(wide, torch.arange(self.dim) * wide.dim // self.dim))

    @property
    def basis(self) -> Mapping[str, Tensor]:
        """What :meth:`load` takes: both sides of every weight that has features, and which entries these are."""
        return self._basis

    def load(self, basis: Mapping[str, Tensor]) -> None:
        """Take a basis that was learned before."""
        sides = []
        for block in self.blocks:
            left, right = basis.get(f"{block.weight}.left"), basis.get(f"{block.weight}.right")
            if left is not None and right is not None:
                if left.shape[1] != block.rows or right.shape[1] != block.columns:
                    raise ValueError(
                        f"Expected the basis of `{block.weight}` to be of {block.rows} x {block.columns} parameters, "
                        f"but got {left.shape[1]} x {right.shape[1]}: it was learned for another model."
                    )
                sides.append((block, Sides(left, right, block.weight)))
        wide = TwoSidedProjection(sides)
        chosen = basis.get("chosen", torch.zeros(0, dtype=torch.long))
        if len(chosen) != self.dim or not sides or int(chosen.max()) >= wide.dim or int(chosen.min()) < 0:
            raise ValueError(
                f"Expected a basis of {self.dim} features, but got one of {len(chosen)}: it was learned for another "
                "model or projector."
            )
        self._basis, self._chosen, start = dict(basis), {}, 0
        for (block, matrices), two_sided in zip(sides, wide.maps.values(), strict=True):
            slot = two_sided.slot
            own = chosen[(chosen >= slot.start) & (chosen < slot.stop)] - slot.start
            self._chosen[block.weight] = ChosenEntries(block, matrices, own, start)
            start += len(own)
        self.layers = by_layer({name: entries.slot for name, entries in self._chosen.items()})

    def accumulate(self, features: Tensor, name: str, gradient: ParameterGradient) -> None:  # noqa: D102 - inherited
        self.accumulate_layer(features, {name: gradient})

    def accumulate_layer(  # noqa: D102 - inherited
        self, features: Tensor, gradients: Mapping[str, ParameterGradient]
    ) -> None:
        self._add(features, set(), gradients)

    @contextmanager
    def filling(self, features: Tensor) -> Iterator[Callable[[Mapping[str, ParameterGradient]], None]]:
        """Fill the features of a batch; layers without gradients become zero.

        Shapes: features (b, dim). Yields a function that adds the gradients from one use of a layer.
        """
        fresh = set(self._learned())
        yield partial(self._add, features, fresh)
        for name in fresh:
            features[:, self._learned()[name].slot] = 0

    def _add(self, features: Tensor, fresh: set[str], gradients: Mapping[str, ParameterGradient]) -> None:
        """Add the gradients of a layer; what a block in ``fresh`` holds is overwritten, and then it is not fresh."""
        chosen = self._learned()
        for name in {self._weights.get(name, name) for name in gradients}:
            if name in chosen:
                chosen[name].add(features, gradients, name in fresh)
                fresh.discard(name)

    def _learned(self) -> dict[str, ChosenEntries]:
        if not self._chosen:
            raise RuntimeError(
                "Expected a basis before features are computed, but this projection has none. Call `learn` or `load`."
            )
        return self._chosen


def _axes(most: int, size: int) -> Tensor:
    return torch.eye(min(most, size), size)


def _basis(wide: TwoSidedProjection, chosen: Tensor) -> dict[str, Tensor]:
    """Keep of each side the eigenvectors that chosen entries need, and number the entries anew."""
    basis: dict[str, Tensor] = {}
    numbers, start = [], 0
    for name, two_sided in wide.maps.items():
        slot, left, right = two_sided.slot, two_sided.sides.left, two_sided.sides.right
        assert left is not None
        assert right is not None
        own = chosen[(chosen >= slot.start) & (chosen < slot.stop)] - slot.start
        if len(own):
            rows, row = (own // len(right)).unique(return_inverse=True)
            columns, column = (own % len(right)).unique(return_inverse=True)
            basis[f"{name}.left"], basis[f"{name}.right"] = left[rows].contiguous(), right[columns].contiguous()
            numbers.append(start + row * len(columns) + column)
            start += len(rows) * len(columns)
    return {**basis, "chosen": torch.cat(numbers)}


class _SideMoments(Projection):
    """Takes gradients in, gives no features: it gathers the covariances of both sides of every block."""

    def __init__(self, blocks: Sequence[MatrixBlock], names: frozenset[str] | None, most: int) -> None:
        super().__init__(1)  # none would mean that no gradients are wanted
        self.names = names
        self.moments = {block.weight: BlockMoments(block, most) for block in blocks}
        self.biases = {block.bias: block.weight for block in blocks if block.bias is not None}

    def accumulate(self, features: Tensor, name: str, gradient: ParameterGradient) -> None:
        self.accumulate_layer(features, {name: gradient})

    def accumulate_layer(self, features: Tensor, gradients: Mapping[str, ParameterGradient]) -> None:
        for name in {self.biases.get(name, name) for name in gradients}:
            block = self.moments[name].block
            for side in self.moments[name].add(gradients.get(name), gradients.get(str(block.bias))):
                _mark(features, side.sum(1).view(len(features), -1).sum(1))

    def sides(self, block: MatrixBlock) -> Sides:
        """The leading eigenvectors of both sides."""
        left, right = self.moments[block.weight].leading()
        return Sides(left, right, block.weight)


class _Squares(Projection):
    """Adds up the squares of all coordinates."""

    def __init__(self, wide: TwoSidedProjection, names: frozenset[str] | None) -> None:
        super().__init__(1)
        self.names = names
        self.wide = wide
        self.sums = torch.zeros(wide.dim, dtype=torch.float64)

    def accumulate(self, features: Tensor, name: str, gradient: ParameterGradient) -> None:
        raise NotImplementedError("squares are of whole gradients: use `filling`")

    @contextmanager
    def filling(self, features: Tensor) -> Iterator[Callable[[Mapping[str, ParameterGradient]], None]]:
        features.zero_()
        entries = features.new_empty(len(features), self.wide.dim)
        with self.wide.filling(entries) as add:
            yield add
        _mark(features, entries.sum(1))
        self.sums += entries.square().sum(0).to(self.sums)


def _mark(features: Tensor, sums: Tensor) -> None:
    """Put NaN where a sample's numbers are not finite, so that whoever featurizes can name it."""
    features[:, 0] += sums * 0
