"""Dense random projections of the flattened gradient, in tiles of fixed position, so that chunking changes nothing."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from lightning_attr.arguments.checks import check_int
from lightning_attr.gradients.factored import OuterSum, ParameterGradient
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.projectors.base import Projection, Projector, flat_rows
from lightning_attr.randomness.streams import gaussian, packed_columns

_KEYED = 1024
"""Parameters that are drawn with a key of their own, of each parameter tensor."""

_TILE = 4 * _KEYED
"""Parameters whose products are formed together, and share the scale of their integers."""

_PIECE = 16 * _TILE
"""About how many parameters of a gradient are formed at a time: less memory, and what is formed stays in the caches."""

_BLOCK = 2**21
"""Bytes of signs that are unpacked together: they stay in the cache, and memory does not grow with the dimension."""


class RademacherProjector(Projector):
    r"""Entries :math:`\pm 1/\sqrt{k}` (Achlioptas, 2003): bit-identical on every machine.

    Where the processor multiplies 8-bit integers exactly and fast (VNNI), float32 gradients are rounded to 16 bits with
    one scale for a sample and 4096 parameters, and their products with the signs are exact. The features are off by
    about 1e-4 of their size, less than by storing them in float16. In float64 nothing is rounded.

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
        self.cache_bytes = check_int(self, "cache_bytes", cache_bytes, minimum=0)

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
        size = math.prod(self.layout.shapes[name])
        if (name, 0) not in self.cache and self.cache_bytes:
            # Drawn beforehand: small tiles that stay would settle in the gaps that large floats leave behind.
            for start in range(0, size, _TILE):
                self._tile(name, start, size, features.device)
        for first, rows in _pieces(gradient, self.layout.shapes[name]):
            parts = rows.to(features.dtype).split(_TILE, dim=1)
            tiles = (self._tile(name, first + i * _TILE, size, features.device) for i in range(len(parts)))
            self._add(features, parts, tiles, 1 / math.sqrt(self.dim))

    def _tile(self, name: str, start: int, size: int, device: torch.device) -> Tensor:
        tile = self.cache.get((name, start))
        if tile is None:
            stop = min(start + _TILE, size)
            drawn = [self._draw(min(_KEYED, stop - i), (*self.key, name, i)) for i in range(start, stop, _KEYED)]
            tile = torch.cat(drawn, dim=1).to(device)
            if tile.nbytes <= self.cache_bytes:
                self.cache[name, start] = tile
                self.cache_bytes -= tile.nbytes
        return tile

    @abstractmethod
    def _draw(self, size: int, key: tuple[object, ...]) -> Tensor: ...

    @abstractmethod
    def _add(self, features: Tensor, parts: Sequence[Tensor], tiles: Iterator[Tensor], scale: float) -> None: ...


class _RademacherProjection(_DenseProjection):
    def _draw(self, size: int, key: tuple[object, ...]) -> Tensor:
        return packed_columns(size, self.dim, *key).view(torch.int8)

    def _add(self, features: Tensor, parts: Sequence[Tensor], tiles: Iterator[Tensor], scale: float) -> None:
        b, width = len(features), -(-self.dim // 8)
        in_integers = features.dtype == torch.float32 and features.is_cpu and _multiplies_bytes()
        masks = (1 << torch.arange(7, -1, -1, device=features.device)).to(torch.int8).view(8, 1, 1)  # the first is -128
        count = max(1, _BLOCK // (8 * _TILE * (1 if in_integers else features.itemsize)))  # bytes per parameter
        unpacked = masks.new_empty(8 * min(count, width) * parts[0].shape[1])
        floats = features.new_empty(0 if in_integers else len(unpacked))
        sums = features.new_zeros(8, width, 2 * b if in_integers else b)
        total = features.new_zeros(b)
        for part, tile in zip(parts, tiles, strict=True):
            factors, steps, part_total = _limbs(part) if in_integers else (part, None, part.sum(1))
            total += part_total
            for target, packed in zip(sums.split(count, dim=1), tile.split(count), strict=True):
                # A bit times its mask, in one operation; bits of equal place follow each other.
                size = 8 * packed.numel()
                torch.bitwise_and(packed, masks, out=unpacked[:size].view(8, *packed.shape))
                bits = unpacked[:size].view(-1, part.shape[1])
                if steps is None:
                    target += (floats[:size].view_as(bits).copy_(bits) @ factors.T).view_as(target)
                else:
                    target += _integer_product(bits, factors).to(part.dtype).mul_(steps).view_as(target)
        products = sums[..., :b] + sums[..., b:] if in_integers else sums
        # A sign is twice its bit, less one.
        signed = products.div_(masks).mul_(2).sub_(total).mul_(scale)  # (8, width, b)
        features += signed.permute(2, 1, 0).flatten(1)[:, : self.dim]


class _GaussianProjection(_DenseProjection):
    def _draw(self, size: int, key: tuple[object, ...]) -> Tensor:
        return gaussian((size, self.dim), *key).T

    def _add(self, features: Tensor, parts: Sequence[Tensor], tiles: Iterator[Tensor], scale: float) -> None:
        for part, tile in zip(parts, tiles, strict=True):
            features.addmm_(part, tile.to(part).T, alpha=scale)


def _pieces(gradient: ParameterGradient, shape: tuple[int, ...]) -> Iterator[tuple[int, Tensor]]:
    """Form gradients, ``(b, size)``, those of a linear map in pieces that begin where tiles do."""
    if not isinstance(gradient, OuterSum):
        yield 0, flat_rows(gradient, shape)
        return
    columns = gradient.columns.shape[2]
    step = _TILE // math.gcd(_TILE, columns)  # rows, whole tiles
    step *= max(1, _PIECE // (step * columns))
    for i, rows in enumerate(gradient.rows.split(step, dim=2)):
        yield i * step * columns, OuterSum(rows, gradient.columns).materialise().flatten(1)


def _limbs(part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round to 16 bits, ``(b, size)``: higher and lower bytes ``(2 b, size)``, what a one is, totals."""
    peak = part.abs().amax(1).clamp_min_(2.0**-100)  # nothing is divided by zero; NaN and Inf stay what they are
    step = peak / (127 * 256 + 127)
    whole = (part * step.reciprocal().unsqueeze(1)).round_()
    words = whole.to(torch.int16)
    limbs = torch.empty(2, *part.shape, dtype=torch.int8)
    limbs[1] = words  # wraps around: the remainder in [-128, 127]
    limbs[0] = words.add_(128).bitwise_right_shift_(8)
    return limbs.flatten(0, 1), torch.cat((256 * step, step)), whole.sum(1) * step


def _integer_product(bits: Tensor, factors: Tensor) -> Tensor:
    """Multiply 8-bit integers, ``(m, size), (n, size) -> (m, n)``, int32."""
    if bits.shape[1] == 1:  # torch mistakes the strides of a single column, and reads elsewhere
        return bits.int() * factors.int().T
    return torch._int_mm(bits, factors.T)


@cache
def _multiplies_bytes() -> bool:
    """Whether this processor multiplies 8-bit integers fast, and without the saturation of older ones."""
    # With them, 512 features of 100,000 entries take 54 ms for 64 samples on one core, and 100 ms in float32.
    supported = getattr(torch.cpu, "_is_vnni_supported", None)  # not in every version of torch, like the product
    if supported is None or not supported() or not hasattr(torch, "_int_mm"):
        return False
    extremes = torch.full((64, 64), -128, dtype=torch.int8)
    return bool((torch._int_mm(extremes, extremes.T) == 64 * 128**2).all())
