r"""Sparse random projection (SJLT): each entry of the gradient goes to a few features, with random signs.

Kane and Nelson (2014), the block construction; with one feature per entry it is the count sketch of Charikar et al.
(2002). It costs ``nonzeros`` additions per entry, whatever the projection dimension.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lightning_attr.arguments.checks import check_int
from lightning_attr.gradients.factored import ParameterGradient
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.projectors.base import Projection, Projector, flat_rows
from lightning_attr.randomness.streams import random_words

_TILE = 4096
"""Entries a tile; each tile of each parameter has a key of its own."""


class SJLTProjector(Projector):
    r"""Adds each entry of the gradient to ``nonzeros`` features, with signs :math:`\pm 1/\sqrt{s}`.

    The features are cut into ``s = nonzeros`` intervals and an entry goes to one feature of each, so that

    .. math:: E\langle Px, Py\rangle = \langle x, y\rangle, \qquad
        \mathrm{Var}\langle Px, Py\rangle = \frac{|x|^2 |y|^2 + \langle x, y\rangle^2 - 2 \sum_j x_j^2 y_j^2}{k},

    the variance of :class:`RademacherProjector` (exact where ``s`` divides ``k``). Features and signs are functions of
    (seed, snapshot, parameter name, tile). On CUDA the order in which entries are added is not fixed (atomic adds):
    there features repeat to rounding only, unless ``torch.use_deterministic_algorithms(True)`` is on.

    Args:
        proj_dim: projection dimension ``k``.
        seed: projections of equal seed, layout and snapshot are equal everywhere.
        nonzeros: features that an entry goes to, from 1 to ``proj_dim``.
        cache_bytes: what is drawn is kept in memory up to this size (5 bytes per entry and nonzero), and drawn again
            for every batch beyond it.

    Raises:
        ValueError: if ``proj_dim`` or ``nonzeros`` is out of range.

    Example:
        >>> import torch
        >>> projection = SJLTProjector(proj_dim=64, nonzeros=4).bind(ParameterLayout({"w": (3,)}), "final")
        >>> features = torch.zeros(1, 64)
        >>> projection.accumulate(features, "w", torch.tensor([[2.0, 0.0, 0.0]]))
        >>> features[features != 0].abs()
        tensor([1., 1., 1., 1.])
    """

    kind: ClassVar[str] = "sjlt"

    def __init__(self, proj_dim: int = 2048, seed: int = 0, nonzeros: int = 1, cache_bytes: int = 2**29) -> None:
        super().__init__(proj_dim, seed)
        self.nonzeros = check_int(self, "nonzeros", nonzeros, 1, self.proj_dim, remedy="`proj_dim` is the most.")
        self.cache_bytes = check_int(self, "cache_bytes", cache_bytes, minimum=0)

    def bind(self, layout: ParameterLayout, snapshot: str) -> Projection:
        """Prepare the projection of a snapshot; its tiles are drawn when they are first used.

        Args:
            layout: the parameters.
            snapshot: key of the snapshot.

        Returns:
            The linear map.
        """
        return _SJLTProjection(layout, Sketch(self.proj_dim, (self.seed, snapshot), self.nonzeros, self.cache_bytes))

    @property
    def config(self) -> dict[str, Any]:
        """What a store records of the projector: kind and the arguments that change the map."""
        return {**super().config, "nonzeros": self.nonzeros}


class _SJLTProjection(Projection):
    def __init__(self, layout: ParameterLayout, sketch: Sketch) -> None:
        super().__init__(sketch.dim)
        self.layout = layout
        self.sketch = sketch

    def accumulate(self, features: Tensor, name: str, gradient: ParameterGradient) -> None:
        self.sketch.add(features, name, flat_rows(gradient, self.layout.shapes[name]))


class Sketch:
    """The sparse map itself, from the entries of named parts to features; also the last stage of other projections.

    Args:
        dim: number of features.
        key: what the map depends on, besides a part's name.
        nonzeros: features that an entry goes to.
        cache_bytes: tiles are kept up to this size.

    Example:
        >>> features = torch.zeros(1, 8)
        >>> Sketch(8, (0, "final")).add(features, "w", torch.tensor([[3.0]]))
        >>> features.abs().sum()
        tensor(3.)
    """

    def __init__(self, dim: int, key: tuple[object, ...], nonzeros: int = 1, cache_bytes: int = 2**29) -> None:
        self.dim = dim
        self.key = key
        self.nonzeros = nonzeros
        self.cache_bytes = cache_bytes
        self.cache: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

    def add(self, features: Tensor, name: str, rows: Tensor) -> None:
        """Add the image of one part.

        Shapes: features (b, dim), rows (b, size).
        """
        scaled = rows.to(features.dtype)
        if self.nonzeros > 1:
            scaled = scaled / math.sqrt(self.nonzeros)
        for start in range(0, rows.shape[1], _TILE):
            part = scaled[:, start : start + _TILE]
            for index, signs in zip(*self._tile(name, start, part), strict=True):
                # Ten times faster on the CPU than index_add_, which goes down the columns.
                features.scatter_add_(1, index.long().expand(part.shape), part * signs)

    def _tile(self, name: str, start: int, part: Tensor) -> tuple[Tensor, Tensor]:
        """Features and signs of a tile's entries, ``(nonzeros, size)`` each."""
        tile = self.cache.get((name, start))
        if tile is None:
            index, signs = _draw(part.shape[1], self.dim, self.nonzeros, (*self.key, name, start))
            tile = (index.to(part.device), signs.to(part.device))
            size = index.nbytes + signs.nbytes
            if size <= self.cache_bytes:
                self.cache[name, start] = tile
                self.cache_bytes -= size
        index, signs = tile
        return index.to(part.device), signs.to(part.device)


def _draw(size: int, dim: int, nonzeros: int, key: tuple[object, ...]) -> tuple[Tensor, Tensor]:
    """Draw features (int32) and signs (int8): a bit of each word for the sign, 63 for the feature."""
    words = random_words(nonzeros * size, *key, "sjlt").reshape(nonzeros, size)
    signs = (words & np.uint64(1)).astype(np.int8) * np.int8(2) - np.int8(1)
    index = np.empty((nonzeros, size), np.int32)
    for i, row in enumerate(words):
        start, stop = i * dim // nonzeros, (i + 1) * dim // nonzeros
        # The remainder of 63 bits is as good as unbiased: to a relative dim / 2**63.
        index[i] = start + ((row >> np.uint64(1)) % np.uint64(stop - start)).astype(np.int32)
    return torch.from_numpy(index), torch.from_numpy(signs)
