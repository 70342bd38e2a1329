"""Random matrices that depend on their key alone: not on the device, the batch, the order of calls or the process.

The bits come from numpy's Philox, a counter-based generator (Salmon et al., 2011) whose raw stream is fixed for good.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

_Words: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.uint64]]


def hashed_seed(*key: object) -> int:
    """Hash a key into a seed; nearby keys give unrelated seeds.

    Returns an integer in ``[0, 2**63)``.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def rademacher(shape: tuple[int, ...], *key: object) -> Tensor:
    """Draw signs.

    Returns -1 or +1, int8, on the CPU.
    """
    count = math.prod(shape)
    bits = torch.from_numpy(np.unpackbits(packed_bits(count, *key).numpy(), count=count))
    return bits.view(torch.int8).mul_(2).sub_(1).reshape(shape)


def packed_bits(count: int, *key: object) -> Tensor:
    """Draw fair bits, eight in a byte, the first in the highest place.

    Returns ``(ceil(count / 64) * 8,)``, uint8, on the CPU.

    Example:
        >>> packed_bits(100, 0, "weight").shape
        torch.Size([16])
    """
    words = random_words(-(-count // 64), *key).astype("<u8", copy=False)
    return torch.from_numpy(words.view(np.uint8))


def packed_columns(rows: int, columns: int, *key: object) -> Tensor:
    """Draw the bits of a matrix, those of eight neighbouring columns in a byte; :func:`packed_bits` row by row.

    Returns ``(ceil(columns / 8), rows)``, uint8, on the CPU; the first column of a byte is in its highest place.

    Example:
        >>> packed_columns(3, 20, 0, "weight").shape
        torch.Size([3, 3])
    """
    packed = packed_bits(rows * columns, *key).numpy()
    if columns % 8:  # rows do not end where bytes do
        packed = np.packbits(np.unpackbits(packed, count=rows * columns).reshape(rows, columns), axis=1)
    width = -(-columns // 8)
    return torch.from_numpy(packed.reshape(-1)[: rows * width].reshape(rows, width).T.copy())


def gaussian(shape: tuple[int, ...], *key: object) -> Tensor:
    """Draw standard normal numbers, by the Box-Muller transform in float64.

    Returns float32, on the CPU; equal on every machine to about one unit in the last place.
    """
    return row_gaussians(shape, [key])[0]


def row_gaussians(shape: tuple[int, ...], keys: Sequence[tuple[object, ...]]) -> Tensor:
    """Draw standard normal numbers for several keys at once, those that :func:`gaussian` gives for each.

    Returns ``(b, *shape)``, float32, on the CPU.
    """
    count = math.prod(shape)
    words = np.stack([random_words(2 * -(-count // 2), *key) for key in keys])
    pairs = (words >> np.uint64(11)).astype(np.float64) + 0.5
    u, v = (pairs / 2.0**53).reshape(len(keys), 2, -1).swapaxes(0, 1)
    radius = np.sqrt(-2 * np.log(u))
    values = np.concatenate([radius * np.cos(2 * np.pi * v), radius * np.sin(2 * np.pi * v)], axis=1)[:, :count]
    return torch.from_numpy(values.astype(np.float32)).reshape(len(keys), *shape)


def random_words(count: int, *key: object) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """Draw 64-bit words.

    Returns ``(count,)``, uint64.
    """
    return np.random.Philox(key=hashed_seed(*key)).random_raw(count)


def row_uniforms(rows: Sequence[int], count: int, *key: object) -> Tensor:
    """Draw uniform numbers for rows of a data set, each row its own: no row's depend on the others asked for.

    Returns ``(b, count)``, float64, in the open interval (0, 1), on the CPU.
    """
    seed = hashed_seed(*key)
    row = np.asarray(rows, dtype=np.uint64)[:, None]
    block = np.arange(-(-count // 2), dtype=np.uint64)[None]
    words = philox((row & _LOW, row >> _HALF, block & _LOW, block >> _HALF), (seed & 0xFFFFFFFF, seed >> 32))
    pairs = np.stack([words[0] << _HALF | words[1], words[2] << _HALF | words[3]], axis=-1)  # (b, blocks, 2)
    values = ((pairs >> np.uint64(12)).astype(np.float64) + 0.5) / 2.0**52
    return torch.from_numpy(values.reshape(len(row), block.size * 2)[:, :count])


def row_words(rows: Sequence[int], *key: object) -> Tensor:
    """Draw one word for each row of a data set, from which :func:`hashed_uniforms` draws more on any device.

    Returns ``(b,)``, int64, on the CPU.

    Example:
        >>> bool(row_words([3], 0, "labels") == row_words([5, 3], 0, "labels")[1])
        True
    """
    seed = hashed_seed(*key)
    row, zero = np.asarray(rows, dtype=np.uint64), np.zeros(1, dtype=np.uint64)
    words = philox((row & _LOW, row >> _HALF, zero, zero), (seed & 0xFFFFFFFF, seed >> 32))
    return torch.from_numpy((words[0] << _HALF | words[1]).view(np.int64))


def hashed_uniforms(words: Tensor, count: int) -> Tensor:
    """Draw uniform numbers from a word a row by SplitMix64 (Steele et al., 2014): the same on every device.

    Shapes: words (b,). Returns ``(b, count)``, float64, in the open interval (0, 1), on the device of the words.

    Example:
        >>> u = hashed_uniforms(row_words([5, 3], 0), 1000)
        >>> u.shape, bool((u.mean(1) - 0.5).abs().max() < 0.05)
        (torch.Size([2, 1000]), True)
    """
    steps = torch.arange(1, count + 1, device=words.device)
    mixed = words[:, None] + steps * _signed(0x9E3779B97F4A7C15)  # integers wrap around
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ _shifted(mixed, shift)) * _signed(factor)
    mixed = mixed ^ _shifted(mixed, 31)
    return (_shifted(mixed, 12).double() + 0.5) / 2.0**52


def _shifted(values: Tensor, bits: int) -> Tensor:
    """Shift to the right, zeros from the left."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def philox(counter: tuple[_Words, _Words, _Words, _Words], key: tuple[int, int]) -> tuple[_Words, ...]:
    """Run Philox4x32-10 (Salmon et al., 2011) on many counters at once.

    ``numpy.random.Philox`` draws for one counter at a time: for 1,000 rows of ten numbers it takes 32 times as long.

    Returns four words of 32 bits, uint64, in the shape of the counters together.
    """
    c0, c1, c2, c3 = np.broadcast_arrays(*counter)
    k0, k1 = key
    for _ in range(10):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # 32 x 32 bits: no overflow
        c0, c1 = second >> _HALF ^ c1 ^ np.uint64(k0), second & _LOW
        c2, c3 = first >> _HALF ^ c3 ^ np.uint64(k1), first & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
