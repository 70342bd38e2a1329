"""Collects featurized batches into the shards of a store, or into one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_attr.store import FeatureStore

__all__ = ["RowTable", "ShardWriter"]


class ShardWriter:
    """Writes a shard as soon as all of its rows are there.

    Args:
        store: where to.
        key: the snapshot.

    Example:
        >>> import tempfile
        >>> from lightning_attr.manifest import Fingerprint
        >>> folder = tempfile.TemporaryDirectory()
        >>> store = FeatureStore.create(folder.name, Fingerprint(3, None, {"w": (2,)}, None))
        >>> _ = store.add_snapshot("final", {"w": torch.ones(2)}, epoch=0, global_step=1, learning_rate=0.1)
        >>> writer = ShardWriter(store, "final")
        >>> writer.add([0, 1], {"loss": torch.tensor([1.0, 2.0])})
        >>> store.missing("final")
        [0]
        >>> writer.add([2], {"loss": torch.tensor([3.0])})
        >>> store.column("final", "loss")
        tensor([1., 2., 3.])
        >>> folder.cleanup()
    """

    def __init__(self, store: FeatureStore, key: str) -> None:
        self.store = store
        self.key = key
        self.parts: list[Mapping[str, Tensor]] = []
        self.rows: list[int] = []

    def add(self, rows: Sequence[int], columns: Mapping[str, Tensor]) -> None:
        """Add a batch; the batches of a shard come one after the other, in order.

        Args:
            rows: its row numbers, all of one shard.
            columns: column name -> values ``(b, ...)``, on any device.
        """
        self.parts.append({name: values.detach().cpu() for name, values in columns.items()})
        self.rows += rows
        shard = rows[0] // self.store.manifest.shard_rows
        if self.rows == list(self.store.rows(shard)):
            whole = {name: torch.cat([part[name] for part in self.parts]) for name in self.parts[0]}
            self.store.write_shard(self.key, shard, whole)
            self.parts, self.rows = [], []


class RowTable:
    """Keeps columns in memory, rows in any order.

    Args:
        num_rows: of the table.

    Example:
        >>> table = RowTable(2)
        >>> table.add([1], {"loss": torch.tensor([5.0])})
        >>> table.columns["loss"]
        tensor([0., 5.])
    """

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.columns: dict[str, Tensor] = {}

    def add(self, rows: Sequence[int], columns: Mapping[str, Tensor]) -> None:
        """Add a batch.

        Args:
            rows: its row numbers.
            columns: column name -> values ``(b, ...)``, on any device.
        """
        for name, values in columns.items():
            values = values.detach().cpu()
            if name not in self.columns:
                self.columns[name] = values.new_zeros(self.num_rows, *values.shape[1:])
            self.columns[name][list(rows)] = values
