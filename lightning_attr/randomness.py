"""Random matrices that depend on their key alone: not on the device, the batch, the order of calls or the process.

The bits come from numpy's Philox, a counter-based generator (Salmon et al., 2011) whose raw stream is fixed for good.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

__all__ = ["gaussian", "hashed_seed", "packed_bits", "rademacher", "random_words", "unpacked_bits"]


def hashed_seed(*key: object) -> int:
    """Hash a key into a seed; nearby keys give unrelated seeds.

    Args:
        key: values with a stable ``str``: numbers and strings.

    Returns:
        An integer in ``[0, 2**63)``.

    Example:
        >>> seed = hashed_seed(0, "epoch=1")
        >>> seed == hashed_seed(0, "epoch=1"), seed == hashed_seed(1, "epoch=1")
        (True, False)
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def rademacher(shape: tuple[int, ...], *key: object) -> Tensor:
    """Draw signs.

    Args:
        shape: of the result.
        key: what the result depends on.

    Returns:
        -1 or +1, int8, on the CPU.

    Example:
        >>> signs = rademacher((2, 1000), 0, "weight")
        >>> signs.dtype, sorted(set(signs.flatten().tolist())), abs(signs.float().mean().item()) < 0.1
        (torch.int8, [-1, 1], True)
    """
    count = math.prod(shape)
    bits = unpacked_bits(packed_bits(count, *key), count)
    return bits.view(torch.int8).mul_(2).sub_(1).reshape(shape)


def packed_bits(count: int, *key: object) -> Tensor:
    """Draw fair bits, eight in a byte, the first in the highest place.

    Args:
        count: how many.
        key: what they depend on.

    Returns:
        ``(ceil(count / 64) * 8,)``, uint8, on the CPU.

    Example:
        >>> packed_bits(100, 0, "weight").shape
        torch.Size([16])
    """
    words = random_words(-(-count // 64), *key).astype("<u8", copy=False)
    return torch.from_numpy(words.view(np.uint8))


def unpacked_bits(packed: Tensor, count: int) -> Tensor:
    """Give each bit a byte of its own.

    Args:
        packed: from :func:`packed_bits`, on any device.
        count: bits wanted.

    Returns:
        ``(count,)``, uint8 of 0 and 1, on the same device.

    Example:
        >>> unpacked_bits(torch.tensor([0b10100000], dtype=torch.uint8), 4)
        tensor([1, 0, 1, 0], dtype=torch.uint8)
    """
    if packed.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(packed.numpy(), count=count))
    places = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(1) >> places) & 1).flatten()[:count]


def gaussian(shape: tuple[int, ...], *key: object) -> Tensor:
    """Draw standard normal numbers, by the Box-Muller transform in float64.

    Args:
        shape: of the result.
        key: what the result depends on.

    Returns:
        Float32, on the CPU; equal on every machine to about one unit in the last place.

    Example:
        >>> x = gaussian((10000,), 0, "weight")
        >>> abs(x.mean().item()) < 0.05, abs(x.std().item() - 1) < 0.05
        (True, True)
    """
    count = math.prod(shape)
    pairs = (random_words(2 * -(-count // 2), *key) >> np.uint64(11)).astype(np.float64) + 0.5
    u, v = (pairs / 2.0**53).reshape(2, -1)
    radius = np.sqrt(-2 * np.log(u))
    values = np.concatenate([radius * np.cos(2 * np.pi * v), radius * np.sin(2 * np.pi * v)])[:count]
    return torch.from_numpy(values.astype(np.float32)).reshape(shape)


def random_words(count: int, *key: object) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """Draw 64-bit words.

    Args:
        count: how many; the first ones do not depend on it.
        key: what they depend on.

    Returns:
        ``(count,)``, uint64.

    Example:
        >>> bool((random_words(9, 0, "w")[:5] == random_words(5, 0, "w")).all())
        True
    """
    return np.random.Philox(key=hashed_seed(*key)).random_raw(count)
