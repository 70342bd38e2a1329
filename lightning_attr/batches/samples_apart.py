"""Samples that cannot be taken from a batch: each as a batch of its own, one after the other."""

from __future__ import annotations

from typing import Any


class SamplesApart(list[Any]):
    """In the place of a batch: one batch of one sample for each row, as the loader's collate function makes it.

    Graphs that are joined into one, images of different sizes, packed sequences and the like lie in a batch in a way
    that no rule takes apart. A list, so that all that goes through collections (pinning, conversion) goes through it.

    Example:
        >>> batch = SamplesApart(["graph 0", "graph 1", "graph 2"])
        >>> batch.rows([2, 0])
        ['graph 2', 'graph 0']
    """

    def rows(self, positions: Any) -> SamplesApart:
        """Take some samples."""
        return SamplesApart(self[int(position)] for position in positions)
