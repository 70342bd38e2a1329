"""How samples lie in the batches of a loader: which tensors have one row per sample, and which all samples share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_attr.batches.nested import batched_tensors, map_leaves, shared_alias


@dataclass
class BatchForm:
    """What batches of two sizes have told; one object for all who read a source, filled in by the first look at it.

    Args:
        apart: whether samples cannot be taken from a batch, so that each is collated on its own.
        rows: of each tensor or list of plain values of a batch, whether it has one entry per sample; None where nobody
            has looked, or where there was but one size: there the length decides.

        iterates: whether batches are read through the ``__iter__`` of the loader's own class, which changes them.
        put_back: whether what reading a sample changes is put back after it, because it changes samples.
        drifting: names of what that is.
        random: whether a sample has other values each time it is read, which nothing repeats.

    Example:
        >>> import torch
        >>> form, scale = BatchForm(), torch.ones(3)
        >>> form.learn((torch.ones(2), scale), 2, (torch.ones(3), scale), 3)
        >>> form.rows
        (True, False)
        >>> x, _ = form.marked((torch.ones(3), scale), 3)
        >>> form.wrong_size((torch.ones(2), scale), 3)
        2
    """

    apart: bool = False
    rows: tuple[bool, ...] | None = None
    iterates: bool = False
    put_back: bool = False
    drifting: tuple[str, ...] = ()
    random: bool = False

    def learn(self, batch: Any, size: int, other: Any, other_size: int) -> None:
        """Compare batches of two sizes: what is one row a sample has followed the size."""
        first, second = leaves(batch), leaves(other)
        self.rows = None
        if size != other_size and len(first) == len(second):
            pairs = zip(first, second, strict=True)
            self.rows = tuple(_length(a) == size and _length(b) == other_size for a, b in pairs)

    def wrong_size(self, batch: Any, size: int) -> int | None:
        """Count the samples of a batch that holds not as many as were asked for.

        Returns how many it holds; 0 where nothing in it has rows at all; None if it holds as many as it should.
        """
        found = leaves(batch)
        if self.rows is None or len(found) != len(self.rows):
            return None if batched_tensors(batch, size) else 0
        lengths = [
            _length(leaf) for leaf, row in zip(found, self.rows, strict=True) if row and isinstance(leaf, Tensor)
        ]
        return next((length for length in lengths if length != size), None if lengths else 0)

    def marked(self, batch: Any, size: int) -> Any:
        """Mark what the samples share, where its length happens to be their number.

        Returns the batch, with these tensors and lists as :func:`lightning_attr.batches.nested.shared_alias` marks
        them.
        """
        if self.rows is None or all(self.rows):
            return batch
        found = leaves(batch)
        if len(found) != len(self.rows):
            return batch
        if not any(not row and _length(leaf) == size for leaf, row in zip(found, self.rows, strict=True)):
            return batch
        rows = iter(self.rows)
        return map_leaves(batch, lambda leaf: leaf if next(rows) or _length(leaf) != size else shared_alias(leaf))


def leaves(batch: Any) -> list[Any]:
    """List the tensors and lists of plain values of a batch.

    Returns them, in the order of :func:`lightning_attr.batches.nested.map_leaves`.
    """
    found: list[Any] = []

    def collect(leaf: Any) -> Any:
        found.append(leaf)
        return leaf

    map_leaves(batch, collect)
    return found


def _length(leaf: Any) -> int:
    return -1 if isinstance(leaf, Tensor) and leaf.ndim == 0 else len(leaf)
