"""Random numbers of single samples: noise, timesteps, simulated batches. They depend on nothing but their sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_attr.randomness.streams import random_words, row_gaussians


@dataclass(frozen=True)
class Draw:
    """The random numbers of a batch, one row per sample: the same for any batch, order, worker and process.

    Args:
        rows: of the samples, in their data set.
        snapshot: key of the snapshot; the model of each snapshot sees numbers of its own.
        number: of the draw, where a sample has several.
        device: where results are put.

    Example:
        >>> one, many = Draw([3], "final"), Draw([1, 2, 3], "final")
        >>> torch.equal(one.normal(2, 2)[0], many.normal(2, 2)[2])
        True
        >>> many.integers(1000).shape
        torch.Size([3])
    """

    rows: Sequence[int]
    snapshot: str = ""
    number: int = 0
    device: torch.device | str = "cpu"

    def normal(self, *shape: int, stream: str = "noise") -> Tensor:
        """Draw standard normal numbers.

        Args:
            shape: of one sample.
            stream: a name; streams are independent of each other.

        Returns:
            ``(b, *shape)``, float32.
        """
        return row_gaussians(shape, [self._key(stream, row) for row in self.rows]).to(self.device)

    def integers(self, high: int, *shape: int, stream: str = "integers") -> Tensor:
        """Draw integers from 0 to ``high - 1``, all alike.

        Args:
            high: the first that is too large.
            shape: of one sample.
            stream: as in :meth:`normal`.

        Returns:
            ``(b, *shape)``, int64.
        """
        count = int(np.prod(shape, dtype=int))
        rows = [random_words(count, *self._key(stream, row)) % np.uint64(high) for row in self.rows]
        return torch.from_numpy(np.stack(rows).astype(np.int64)).reshape(len(self.rows), *shape).to(self.device)

    def others(self, population: int, size: int, stream: str = "others") -> Tensor:
        """Choose other samples of the data set, without repetition; never the sample itself.

        Args:
            population: samples to choose from, rows 0 to ``population - 1``.
            size: how many.
            stream: as in :meth:`normal`.

        Returns:
            ``(b, size)``, int64.

        Raises:
            ValueError: if there are not so many others.
        """
        if not 0 < size < population:
            raise ValueError(
                f"Expected to choose between 1 and {population - 1} others among {population} samples, but got {size}."
            )
        chosen = []
        for row in self.rows:
            order = random_words(population, *self._key(stream, row)).argsort(kind="stable")
            chosen.append(order[order != row][:size])
        return torch.from_numpy(np.stack(chosen)).to(self.device)

    def _key(self, stream: str, row: int) -> tuple[object, ...]:
        return ("draw", stream, self.snapshot, self.number, int(row))


@dataclass(frozen=True)
class Samples:
    """The training samples, for what a module computes of them at a snapshot before anything is attributed there.

    Args:
        count: how many there are.
        read: gives those of the rows wanted as ``(rows, batch)`` on the module's device.

    Example:
        >>> samples = Samples(4, lambda rows: iter([(rows, torch.arange(4.0)[list(rows)])]))
        >>> len(samples), [batch for _, batch in samples.batches([1, 3])]
        (4, [tensor([1., 3.])])
    """

    count: int
    read: Callable[[Sequence[int]], Iterator[tuple[Sequence[int], Any]]]

    def __len__(self) -> int:
        return self.count

    def batches(self, rows: Sequence[int] | None = None) -> Iterator[tuple[Sequence[int], Any]]:
        """Read samples.

        Returns ``(rows, batch)``, batch after batch, in order.
        """
        return self.read(range(self.count) if rows is None else rows)
