"""Dense random projections of the flattened gradient, in tiles of fixed position, so that chunking changes nothing."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar

from torch import Tensor

from lightning_attr.gradients.factored import ParameterGradient
from lightning_attr.layout import ParameterLayout
from lightning_attr.projectors.base import Projection, Projector, flat_rows
from lightning_attr.randomness import gaussian, packed_bits, unpacked_bits

__all__ = ["GaussianProjector", "RademacherProjector"]

_TILE = 1024
"""Parameters a tile: as floats it stays in the cache of a core. Each tile of each parameter has a key of its own."""


class RademacherProjector(Projector):
    r"""Entries :math:`\pm 1/\sqrt{k}` (Achlioptas, 2003): bit-identical on every machine.

    Args:
        proj_dim: projection dimension ``k``.
        seed: projections of equal seed, layout and snapshot are equal everywhere.
        cache_bytes: tiles, a bit an entry, are kept in memory up to this size and drawn again for every batch beyond.

    Example:
        >>> import torch
        >>> projection = RademacherProjector(proj_dim=64).bind(ParameterLayout({"w": (3,)}), "final")
        >>> features = torch.zeros(1, 64)
        >>> projection.accumulate(features, "w", torch.tensor([[1.0, 0.0, 0.0]]))
        >>> features.square().sum()
        tensor(1.)
    """

    kind: ClassVar[str] = "rademacher"

    def __init__(self, proj_dim: int = 2048, seed: int = 0, cache_bytes: int = 2**30) -> None:
        super().__init__(proj_dim, seed)
        self.cache_bytes = cache_bytes

    def bind(self, layout: ParameterLayout, snapshot: str) -> Projection:
        """Prepare the projection of a snapshot; its tiles are drawn when they are first used.

        Args:
            layout: the parameters.
            snapshot: key of the snapshot.

        Returns:
            The linear map.
        """
        return self._projection(layout, self.proj_dim, (self.seed, snapshot), self.cache_bytes)

    @property
    def _projection(self) -> type[_DenseProjection]:
        return _RademacherProjection


class GaussianProjector(RademacherProjector):
    r"""Entries :math:`N(0, 1/k)`.

    Args:
        proj_dim: projection dimension ``k``.
        seed: as in :class:`RademacherProjector`.
        cache_bytes: as in :class:`RademacherProjector`; an entry takes four bytes.

    Example:
        >>> GaussianProjector(proj_dim=8).bind(ParameterLayout({"w": (3,)}), "final").dim
        8
    """

    kind: ClassVar[str] = "gaussian"

    @property
    def _projection(self) -> type[_DenseProjection]:
        return _GaussianProjection


class _DenseProjection(Projection):
    """Adds up the products with tiles, which are kept as subclasses draw them."""

    def __init__(self, layout: ParameterLayout, proj_dim: int, key: tuple[object, ...], cache_bytes: int) -> None:
        super().__init__(proj_dim)
        self.layout = layout
        self.key = key
        self.cache_bytes = cache_bytes
        self.cache: dict[tuple[str, int], Tensor] = {}

    def accumulate(self, features: Tensor, name: str, gradient: ParameterGradient) -> None:
        rows = flat_rows(gradient, self.layout.shapes[name]).to(features.dtype)  # (b, size)
        scale = 1 / math.sqrt(self.dim)
        parts = {start: rows[:, start : start + _TILE] for start in range(0, rows.shape[1], _TILE)}
        if (name, 0) not in self.cache and self.cache_bytes:
            # Drawn beforehand: small tiles that stay would settle in the gaps that large floats leave behind.
            for start, part in parts.items():
                self._tile(name, start, part)
        for start, part in parts.items():
            self._add(features, part, self._tile(name, start, part), scale)

    def _tile(self, name: str, start: int, part: Tensor) -> Tensor:
        tile = self.cache.get((name, start))
        if tile is None:
            tile = self._draw((part.shape[1], self.dim), (*self.key, name, start)).to(part.device)
            if tile.nbytes <= self.cache_bytes:
                self.cache[name, start] = tile
                self.cache_bytes -= tile.nbytes
        return tile

    @abstractmethod
    def _draw(self, shape: tuple[int, int], key: tuple[object, ...]) -> Tensor: ...

    @abstractmethod
    def _add(self, features: Tensor, part: Tensor, tile: Tensor, scale: float) -> None: ...


class _RademacherProjection(_DenseProjection):
    def _draw(self, shape: tuple[int, int], key: tuple[object, ...]) -> Tensor:
        return packed_bits(math.prod(shape), *key)

    def _add(self, features: Tensor, part: Tensor, tile: Tensor, scale: float) -> None:
        bits = unpacked_bits(tile, part.shape[1] * self.dim).view(part.shape[1], self.dim)
        features.addmm_(part, bits.to(part), alpha=2 * scale)
        features.sub_(part.sum(1, keepdim=True), alpha=scale)  # a sign is twice its bit, less one


class _GaussianProjection(_DenseProjection):
    def _draw(self, shape: tuple[int, int], key: tuple[object, ...]) -> Tensor:
        return gaussian(shape, *key)

    def _add(self, features: Tensor, part: Tensor, tile: Tensor, scale: float) -> None:
        features.addmm_(part, tile.to(part), alpha=scale)
