"""Batches become shards and tables, whatever the batch size or the device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_attr import FeatureStore
from lightning_attr import store as store_module
from lightning_attr.manifest import Fingerprint
from lightning_attr.shards import RowTable, ShardWriter

N = 23


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FeatureStore:
    monkeypatch.setattr(store_module, "_SHARD_ROWS", 8)
    store = FeatureStore.create(tmp_path / "store", Fingerprint(N, None, {"w": (1,)}, None))
    store.add_snapshot("final", {"w": torch.ones(1)}, epoch=0, global_step=1, learning_rate=0.1)
    return store


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 8])
def test_every_batch_size_gives_the_same_columns(store: FeatureStore, batch_size: int) -> None:
    values = torch.randn(N, 3, dtype=torch.float64)
    labels = torch.randint(10, (N,))
    writer = ShardWriter(store, "final")
    for shard in range(store.manifest.num_shards):
        rows = store.rows(shard)
        for start in range(rows.start, rows.stop, batch_size):
            batch = list(range(start, min(start + batch_size, rows.stop)))
            writer.add(batch, {"features": values[batch], "label": labels[batch]})
    for column, expected in (("features", values), ("label", labels)):
        assert store.column("final", column).dtype == expected.dtype
        assert torch.equal(store.column("final", column), expected)
    assert (writer.parts, writer.rows) == ([], [])


def test_a_shard_is_there_as_soon_as_its_last_batch_and_not_before(store: FeatureStore) -> None:
    writer = ShardWriter(store, "final")
    for start, missing in ((8, [0, 1, 2]), (12, [0, 2]), (0, [0, 2]), (4, [2])):
        rows = list(range(start, start + 4))
        writer.add(rows, {"loss": torch.tensor(rows, dtype=torch.float32)})
        assert store.missing("final") == missing
        assert FeatureStore.open(store.path).missing("final") == missing
    assert torch.equal(store.shard("final", 1)["loss"], torch.arange(8.0, 16.0))


def test_a_shard_that_lacks_rows_is_not_written(store: FeatureStore) -> None:
    ShardWriter(store, "final").add([4, 5, 6, 7], {"loss": torch.ones(4)})
    assert store.missing("final") == [0, 1, 2]


def test_a_shard_does_not_change_with_the_batch_that_it_came_from(store: FeatureStore) -> None:
    batch = torch.ones(8, 2, requires_grad=True)
    ShardWriter(store, "final").add(list(range(8)), {"features": batch})
    with torch.no_grad():
        batch.zero_()
    assert not store.shard("final", 0)["features"].requires_grad
    assert store.shard("final", 0)["features"].sum() == 16


def test_a_table_takes_rows_in_any_order_and_again() -> None:
    values = torch.randn(N, 2)
    labels = torch.arange(N)
    table = RowTable(N)
    for rows in torch.randperm(N).split(4):
        table.add(rows.tolist(), {"features": values[rows], "label": labels[rows]})
    table.add([0], {"features": values[:1], "label": labels[:1]})
    assert torch.equal(table.columns["features"], values)
    assert torch.equal(table.columns["label"], labels)
    assert table.columns["label"].dtype == torch.int64


def test_rows_that_never_came_are_zero() -> None:
    table = RowTable(3)
    table.add([2], {"loss": torch.tensor([4.0], requires_grad=True)})
    assert table.columns["loss"].tolist() == [0, 0, 4]
    assert not table.columns["loss"].requires_grad
