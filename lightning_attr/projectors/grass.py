r"""GraSS: a random mask of the gradient's entries, then SJLT; for whole and for factored gradients.

Hu et al. (2025), GraSS. A mask with ``m`` of ``p`` entries, scaled by :math:`\sqrt{p/m}`, is unbiased, but spiky
gradients make it noisy: with :math:`z_j = x_j y_j` and its sample variance :math:`S^2`, that of an inner product is
:math:`p^2 (1 - m/p) S^2 / m`. SJLT to ``k`` features adds
:math:`(|x|^2 |y|^2 + \langle x, y\rangle^2 - 2 \sum_j z_j^2)\, p (m - 1) / (k m (p - 1))`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_attr.arguments.checks import check_flag, check_int
from lightning_attr.gradients.factored import FactoredGradient, GatherSum, OuterSum, ParameterGradient
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.projectors.base import Projection, Projector, by_layer, flat_rows, flat_slots
from lightning_attr.projectors.sjlt import Sketch
from lightning_attr.randomness.streams import random_words

_GATHER_BELOW = 1 / 128
"""Share of a matrix below which gathering entries from its factors is faster than forming it (measured: 1/220 took 0.6
of the time on a CPU)."""


class _MaskedProjector(Projector):
    """What both have in common: a mask of ``mask_factor * proj_dim`` entries, then SJLT."""

    def __init__(self, proj_dim: int = 2048, seed: int = 0, mask_factor: int = 4) -> None:
        super().__init__(proj_dim, seed)
        self.mask_factor = check_int(self, "mask_factor", mask_factor, minimum=1)

    def bind(self, layout: ParameterLayout, snapshot: str) -> Projection:
        """Draw the mask of a snapshot.

        Args:
            layout: the parameters.
            snapshot: key of the snapshot.

        Returns:
            The linear map.
        """
        key = (self.seed, snapshot)
        masks = self.masks(layout, key)
        return _MaskedProjection(masks, self.sketches(masks, key))

    def sketches(self, masks: Mapping[str, _Mask], key: tuple[object, ...]) -> _Maps:
        """Draw the map of the entries that are kept: one for all parameters.

        Args:
            masks: of each parameter.
            key: what the map depends on.

        Returns:
            Parameter name -> columns of the features, and the map to them, or None where they are the entries.
        """
        if sum(mask.kept for mask in masks.values()) <= self.proj_dim:
            return _side_by_side(masks)
        sketch = Sketch(self.proj_dim, key)
        return {name: (slice(0, self.proj_dim), sketch) for name in masks}

    @abstractmethod
    def masks(self, layout: ParameterLayout, key: tuple[object, ...]) -> dict[str, _Mask]:
        """Draw the mask of each parameter."""

    @property
    def config(self) -> dict[str, Any]:
        """What a store records of the projector: kind and arguments."""
        return {**super().config, "mask_factor": self.mask_factor}


class GraSSProjector(_MaskedProjector):
    r"""Keeps ``mask_factor * proj_dim`` random entries of the whole gradient, and projects them by SJLT.

    The mask is one subset of all ``p`` entries, without repetition, scaled by :math:`\sqrt{p/m}`; where they are no
    more than that, all are kept, and where they are no more than ``proj_dim``, they are the features themselves,
    without SJLT. Entries of linear layers and tables are gathered from the factors where they are few;
    other gradients (convolutions) are formed first, one parameter at a time. On CUDA features repeat to rounding only
    (see :class:`SJLTProjector`).

    Args:
        proj_dim: projection dimension ``k``.
        seed: projections of equal seed, layout and snapshot are equal everywhere.
        mask_factor: entries kept for each feature.

    Raises:
        ValueError: if ``proj_dim`` or ``mask_factor`` is not a positive integer.

    Example:
        >>> import torch
        >>> projection = GraSSProjector(4, mask_factor=2).bind(ParameterLayout({"w": (32,)}), "final")
        >>> features = torch.zeros(32, 4)
        >>> projection.accumulate(features, "w", torch.eye(32))   # 8 of 32 entries are kept, scaled by 2
        >>> features.abs().sum()
        tensor(16.)
    """

    kind: ClassVar[str] = "grass-2"  # in stores of the first, few entries were hashed

    def masks(self, layout: ParameterLayout, key: tuple[object, ...]) -> dict[str, _Mask]:
        """Draw one subset of all entries, and cut it by parameter.

        Args:
            layout: the parameters.
            key: what the subset depends on.

        Returns:
            Parameter name -> mask; a parameter of which nothing is kept has none.
        """
        total = layout.numel
        kept = min(self.mask_factor * self.proj_dim, total)
        subset, scale = _subset(kept, total, *key), math.sqrt(total / kept)
        found: dict[str, _Mask] = {}
        for name, slot in flat_slots(layout).items():
            start, stop = torch.searchsorted(subset, torch.tensor([slot.start, slot.stop])).tolist()
            if stop > start:
                found[name] = _EntryMask(subset[start:stop] - slot.start, layout.shapes[name], scale)
        return found


class FactGraSSProjector(_MaskedProjector):
    r"""Keeps random rows and columns of each weight matrix, and projects the entries where they meet by SJLT.

    Each matrix keeps at most ``side`` rows and columns, each vector at most ``side ** 2`` entries, with the largest
    ``side`` whose total is at most ``mask_factor * proj_dim``; what is kept is scaled by
    :math:`\sqrt{d_o d_i / (k_o k_i)}`. Where no more than ``proj_dim`` are kept, they are the features themselves,
    without SJLT. Rows and columns are gathered from the factors of linear layers and tables, so
    that a sample of ``L`` positions costs :math:`L k_o k_i`; convolutions take them by their factored projection onto
    unit vectors, at the cost of the Kronecker projection. On CUDA features repeat to rounding only (see
    :class:`SJLTProjector`).

    Args:
        proj_dim: projection dimension ``k``.
        seed: projections of equal seed, layout and snapshot are equal everywhere.
        mask_factor: entries kept for each feature.
        per_layer: give each layer features of its own, in proportion to the entries it keeps and at least one, instead
            of adding all up in the same; for methods with a kernel a layer.

    Raises:
        ValueError: if ``proj_dim`` or ``mask_factor`` is not a positive integer.

    Example:
        >>> import torch
        >>> projection = FactGraSSProjector(4, mask_factor=1).bind(ParameterLayout({"weight": (4, 4)}), "final")
        >>> features = torch.zeros(16, 4)
        >>> units = torch.eye(16).reshape(16, 4, 4)
        >>> projection.accumulate(features, "weight", units)   # 2 x 2 of the entries are kept, scaled by 2
        >>> features.abs().sum()
        tensor(8.)
    """

    kind: ClassVar[str] = "factgrass-2"  # as above

    def __init__(self, proj_dim: int = 2048, seed: int = 0, mask_factor: int = 4, per_layer: bool = False) -> None:
        super().__init__(proj_dim, seed, mask_factor)
        self.per_layer = check_flag(self, "per_layer", per_layer)

    def sketches(self, masks: Mapping[str, _Mask], key: tuple[object, ...]) -> _Maps:
        """Draw the map of the entries that are kept: one for all parameters, or one a layer.

        Args:
            masks: of each parameter.
            key: what the maps depend on.

        Returns:
            Parameter name -> columns of the features, and the map to them, or None where they are the entries.

        Raises:
            ValueError: if the layers are more than the features.
        """
        if not self.per_layer:
            return super().sketches(masks, key)
        kept: dict[str, int] = {}
        for name, mask in masks.items():
            layer = name.rpartition(".")[0]
            kept[layer] = kept.get(layer, 0) + mask.kept
        spare, total = self.proj_dim - len(kept), sum(kept.values())
        if spare < 0:
            raise ValueError(
                f"Expected argument `proj_dim` to be at least {len(kept)}, one for each layer, but got "
                f"{self.proj_dim}. Raise it, or freeze parameters that should not be attributed."
            )
        if total <= self.proj_dim:
            return _side_by_side(masks)
        own: _Maps = {}
        start = 0
        for layer, count in kept.items():
            dim = min(count, 1 + spare * count // total)
            own[layer] = (slice(start, start + dim), Sketch(dim, key))
            start += dim
        return {name: own[name.rpartition(".")[0]] for name in masks}

    @property
    def config(self) -> dict[str, Any]:
        """What a store records of the projector: kind and arguments."""
        return {**super().config, "per_layer": True} if self.per_layer else super().config

    def masks(self, layout: ParameterLayout, key: tuple[object, ...]) -> dict[str, _Mask]:
        """Draw the rows and columns that each matrix keeps, and the entries of each vector.

        Args:
            layout: the parameters.
            key: what the subsets depend on.

        Returns:
            Parameter name -> mask.

        Raises:
            ValueError: if the parameters are more than the entries to keep.
        """
        shapes = {name: _as_matrix(shape) for name, shape in layout.shapes.items()}
        budget = self.mask_factor * self.proj_dim
        if len(shapes) > budget:
            raise ValueError(
                f"Expected `mask_factor * proj_dim` to be at least {len(shapes)}, one for each parameter, but got "
                f"{budget}. Raise them, or freeze parameters that should not be attributed."
            )
        low, high = 1, max(max(shape) for shape in shapes.values())
        while low < high:  # bisection: the total grows with the side
            side = (low + high + 1) // 2
            fits = sum(math.prod(_kept(shape, side)) for shape in shapes.values()) <= budget
            low, high = (side, high) if fits else (low, side - 1)
        found: dict[str, _Mask] = {}
        for name, (rows, columns) in shapes.items():
            kept_rows, kept_columns = _kept((rows, columns), low)
            scale = math.sqrt(rows * columns / (kept_rows * kept_columns))
            row = _subset(kept_rows, rows, *key, name, "rows")
            if columns == 1:
                found[name] = _EntryMask(row, layout.shapes[name], scale)
            else:
                column = _subset(kept_columns, columns, *key, name, "columns")
                found[name] = _SideMask(row, column, (rows, columns), scale)
        return found


class _MaskedProjection(Projection):
    def __init__(self, masks: dict[str, _Mask], sketches: _Maps) -> None:
        super().__init__(max(columns.stop for columns, _ in sketches.values()))
        self.masks = masks
        self.sketches = sketches
        layers = {(columns.start, name.rpartition(".")[0]) for name, (columns, _) in sketches.items()}
        if len({start for start, _ in layers}) == len(layers):  # no feature is of two layers
            self.layers = by_layer({name: columns for name, (columns, _) in sketches.items()})

    def accumulate(self, features: Tensor, name: str, gradient: ParameterGradient) -> None:
        if name in self.masks:
            mask, (columns, sketch) = self.masks[name], self.sketches[name]
            entries = mask.apply(gradient, features) * mask.scale
            if sketch is None:
                features[:, columns] += entries
            else:
                sketch.add(features[:, columns], name, entries)


def _side_by_side(masks: Mapping[str, _Mask]) -> _Maps:
    """Give every entry a feature of its own, so that inner products of what is kept are exact."""
    maps: _Maps = {}
    start = 0
    for name, mask in masks.items():
        maps[name] = (slice(start, start + mask.kept), None)
        start += mask.kept
    return maps


_Maps: TypeAlias = "dict[str, tuple[slice, Sketch | None]]"


class _Mask(ABC):
    """What is kept of one parameter: how many entries, and by what they are multiplied."""

    def __init__(self, kept: int, scale: float) -> None:
        self.kept = kept
        self.scale = scale

    @abstractmethod
    def apply(self, gradient: ParameterGradient, like: Tensor) -> Tensor:
        """Take what is kept from the gradients of a batch, ``(b, kept)``, on the device of ``like``."""


class _EntryMask(_Mask):
    """Keeps single entries of a parameter."""

    def __init__(self, entries: Tensor, shape: tuple[int, ...], scale: float) -> None:
        super().__init__(len(entries), scale)
        self.entries = entries
        self.shape = shape
        self.size = math.prod(shape)

    def apply(self, gradient: ParameterGradient, like: Tensor) -> Tensor:
        self.entries = self.entries.to(like.device)
        if isinstance(gradient, (OuterSum, GatherSum)) and len(self.entries) < _GATHER_BELOW * self.size:
            width = math.prod(self.shape[1:])
            row, column = self.entries // width, self.entries % width
            if isinstance(gradient, OuterSum):
                left = gradient.rows.mT.index_select(1, row)  # (b, kept, s): whole runs of positions are copied
            else:
                left = (gradient.ids.unsqueeze(1) == row.unsqueeze(1)).to(gradient.columns.dtype)
            return (left * gradient.columns.mT.index_select(1, column)).sum(2)
        return flat_rows(gradient, self.shape).index_select(1, self.entries)


class _SideMask(_Mask):
    """Keeps rows and columns of a matrix."""

    def __init__(self, row: Tensor, column: Tensor, shape: tuple[int, int], scale: float) -> None:
        super().__init__(len(row) * len(column), scale)
        self.row = row
        self.column = column
        self.shape = shape

    def apply(self, gradient: ParameterGradient, like: Tensor) -> Tensor:
        self.row, self.column = self.row.to(like.device), self.column.to(like.device)
        return self._kept(gradient, like).flatten(1)

    def _kept(self, gradient: ParameterGradient, like: Tensor) -> Tensor:
        if isinstance(gradient, OuterSum):
            rows, columns = gradient.rows.index_select(2, self.row), gradient.columns.index_select(2, self.column)
            return OuterSum(rows, columns).materialise()
        if isinstance(gradient, GatherSum):
            rest = len(self.row)  # one more row, for all that are not kept
            place = torch.full((gradient.num_rows,), rest, device=self.row.device)
            place[self.row] = torch.arange(rest, device=self.row.device)
            columns = gradient.columns.index_select(2, self.column)
            return GatherSum(place[gradient.ids], columns, rest + 1).materialise()[:, :rest]
        if isinstance(gradient, FactoredGradient):
            left, right = (
                F.one_hot(kept, size).to(like) for kept, size in zip((self.row, self.column), self.shape, strict=True)
            )
            return gradient.project(left, right)
        return gradient.reshape(-1, *self.shape).index_select(1, self.row).index_select(2, self.column)


def _as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0] if shape else 1), math.prod(shape[1:])


def _kept(shape: tuple[int, int], side: int) -> tuple[int, int]:
    """Rows and columns to keep; a vector keeps as many entries as a large matrix."""
    rows, columns = shape
    return (min(side**2, rows), 1) if columns == 1 else (min(side, rows), min(side, columns))


def _subset(count: int, size: int, *key: object) -> Tensor:
    """Draw a subset of ``range(size)``, all of one size equally likely: sorted, int64, ``(count,)``."""
    # The first different ones among random numbers are such a subset. Where more than half is kept, the rest is drawn.
    if 2 * count > size:
        chosen = torch.ones(size, dtype=torch.bool)
        chosen[_subset(size - count, size, *key)] = False
        return chosen.nonzero().flatten()
    draws = 2 * count
    while True:
        numbers = random_words(draws, *key, "mask") % np.uint64(size)
        values, first = np.unique(numbers, return_index=True)
        if len(values) >= count:
            return torch.from_numpy(np.sort(values[np.argsort(first)[:count]]).astype(np.int64))
        draws *= 2  # the first half is drawn again, and equal
