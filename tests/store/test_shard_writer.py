"""Batches become shards and tables, whatever the batch size or the device."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from cases import wait_for
from lightning_attr import FeatureStore
from lightning_attr.errors import AttributionError
from lightning_attr.store import feature_store as store_module
from lightning_attr.store.manifest import Fingerprint
from lightning_attr.store.shard_writer import RowTable, ShardWriter

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
    with ShardWriter(store, "final") as writer:
        for shard in range(store.manifest.num_shards):
            rows = store.rows(shard)
            for start in range(rows.start, rows.stop, batch_size):
                batch = list(range(start, min(start + batch_size, rows.stop)))
                writer.add(batch, {"features": values[batch], "label": labels[batch]})
    for column, expected in (("features", values), ("label", labels)):
        assert store.column("final", column).dtype == expected.dtype
        assert torch.equal(store.column("final", column), expected)
    assert (writer.parts, writer.rows) == ([], [])


@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_features_computed_in_their_room_are_not_copied(store: FeatureStore, batch_size: int) -> None:
    values = torch.randn(N, 3, dtype=torch.float64)
    spare: list[torch.Tensor] = []
    for key in ("final", "again"):  # the second snapshot finds what the first has left
        if key == "again":
            store.add_snapshot(key, {"w": torch.ones(1)}, epoch=1, global_step=2, learning_rate=0.1)
        left = {memory.data_ptr() for memory in spare}
        with ShardWriter(store, key, spare) as writer:
            for shard in range(store.manifest.num_shards):
                rows = store.rows(shard)
                for start in range(rows.start, rows.stop, batch_size):
                    batch = list(range(start, min(start + batch_size, rows.stop)))
                    out = writer.output_buffer(batch, 3, torch.float64)
                    assert out is not None
                    assert out.shape == (len(batch), 3)
                    assert key == "final" or writer.features is None or writer.features.data_ptr() in left
                    if start % 2:  # from elsewhere, as from a batch that went through in parts
                        out = values[batch]
                    else:
                        out.copy_(values[batch])
                    writer.add(batch, {"features": out, "loss": values[batch, 0]})
        assert torch.equal(store.column(key, "features"), values)
        assert torch.equal(store.column(key, "loss"), values[:, 0])
    assert 1 <= len(spare) <= 2


def test_spare_memory_of_another_size_or_type_is_not_used(store: FeatureStore) -> None:
    spare = [torch.zeros(8, 3), torch.zeros(8, 2)]
    writer = ShardWriter(store, "final", spare)
    out = writer.output_buffer([0, 1], 3, torch.float32)
    assert out is not None
    assert out.shape == (2, 3)
    writer = ShardWriter(store, "final", [torch.zeros(8, 3)])
    out = writer.output_buffer([0, 1], 3, torch.float64)
    assert out is not None
    assert out.dtype == torch.float64


def test_no_room_in_a_shard_that_began_without(store: FeatureStore) -> None:
    values = torch.randn(8, 2, dtype=torch.float64)
    with ShardWriter(store, "final") as writer:
        writer.add([0, 1], {"features": values[:2]})
        assert writer.output_buffer([2, 3], 2, torch.float64) is None
        writer.add(list(range(2, 8)), {"features": values[2:]})
    assert torch.equal(store.shard("final", 0)["features"], values)


def test_a_shard_is_there_as_soon_as_its_last_batch_and_not_before(store: FeatureStore) -> None:
    writer = ShardWriter(store, "final")
    for start, missing in ((8, [0, 1, 2]), (12, [0, 2]), (0, [0, 2]), (4, [2])):
        rows = list(range(start, start + 4))
        writer.add(rows, {"loss": torch.tensor(rows, dtype=torch.float32)})
        writer.close()
        assert store.missing("final") == missing
        assert FeatureStore.open(store.path).missing("final") == missing
    assert torch.equal(store.shard("final", 1)["loss"], torch.arange(8.0, 16.0))


def test_a_shard_that_lacks_rows_is_not_written(store: FeatureStore) -> None:
    with ShardWriter(store, "final") as writer:
        writer.add([4, 5, 6, 7], {"loss": torch.ones(4)})
    assert store.missing("final") == [0, 1, 2]


def test_a_shard_does_not_change_with_the_batch_that_it_came_from(store: FeatureStore) -> None:
    batch = torch.ones(8, 2, requires_grad=True)
    with ShardWriter(store, "final") as writer, torch.no_grad():
        writer.add(list(range(8)), {"features": batch})
        batch.zero_()
    assert not store.shard("final", 0)["features"].requires_grad
    assert store.shard("final", 0)["features"].sum() == 16


# The thread -----------------------------------------------------------------------------------------------------------


class Gate:
    """Holds writing up until it is opened, and notes who writes what."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failing: tuple[int, ...] = ()) -> None:
        self.opened = threading.Event()
        self.begun: list[int] = []
        self.threads: set[threading.Thread] = set()
        write_shard = FeatureStore.write_shard

        def write(store: FeatureStore, key: str, shard: int, columns: Any) -> None:
            self.begun.append(shard)
            self.threads.add(threading.current_thread())
            assert self.opened.wait(60)
            if shard in failing:
                raise AttributionError(f"no room for {shard}")
            write_shard(store, key, shard, columns)

        monkeypatch.setattr(FeatureStore, "write_shard", write)


def add_shard(writer: ShardWriter, shard: int) -> None:
    rows = list(writer.store.rows(shard))
    writer.add(rows, {"features": torch.tensor(rows)[:, None] / 4, "loss": torch.tensor(rows, dtype=torch.float32)})


def test_computing_goes_on_while_a_shard_is_written(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with ShardWriter(store, "final") as writer:
        add_shard(writer, 0)
        writer.add([8, 9, 10, 11], {"loss": torch.arange(8.0, 12.0)})  # of the next
        wait_for(lambda: gate.begun == [0])
        assert store.missing("final") == [0, 1, 2]
        gate.opened.set()
    assert FeatureStore.open(store.path).missing("final") == [1, 2]
    assert threading.current_thread() not in gate.threads
    assert not any(thread.is_alive() for thread in gate.threads)


def test_one_shard_is_on_its_way_at_a_time(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    writer = ShardWriter(store, "final")
    add_shard(writer, 0)
    producer = threading.Thread(target=add_shard, args=(writer, 1))
    producer.start()
    producer.join(0.2)
    assert producer.is_alive()  # it waits: a slow disk must not fill the memory
    assert gate.begun == [0]
    gate.opened.set()
    producer.join(60)
    writer.close()
    assert gate.begun == [0, 1]
    assert len(gate.threads) == 1
    assert store.missing("final") == [2]


def test_no_thread_before_the_first_full_shard_and_none_after_the_end(store: FeatureStore) -> None:
    """What is forked in between, a loader's workers, inherits no thread of ours."""
    before = threading.active_count()
    writer = ShardWriter(store, "final")
    writer.add([0, 1], {"loss": torch.ones(2)})
    assert threading.active_count() == before
    writer.add([2, 3, 4, 5, 6, 7], {"loss": torch.ones(6)})
    writer.close()
    assert threading.active_count() == before
    writer.close()  # again is no error


@pytest.mark.parametrize("late", [False, True])
def test_a_failure_to_write_reaches_the_caller_once(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    gate = Gate(monkeypatch, failing=(0,))
    gate.opened.set()
    writer = ShardWriter(store, "final")
    add_shard(writer, 0)
    with pytest.raises(AttributionError, match="no room for 0"):
        writer.close() if late else add_shard(writer, 1)
    writer.close()
    assert not any(thread.is_alive() for thread in gate.threads)
    assert store.missing("final") == [0, 1, 2]
    add_shard(writer, 2)
    writer.close()
    assert store.missing("final") == [0, 1]


@pytest.mark.parametrize("failing", [(), (0,)])
def test_an_exception_waits_for_the_thread_and_is_the_one_that_is_seen(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch, failing: tuple[int, ...]
) -> None:
    gate = Gate(monkeypatch, failing)

    def featurize() -> None:
        with ShardWriter(store, "final") as writer:
            add_shard(writer, 0)
            threading.Timer(0.05, gate.opened.set).start()
            raise KeyError("featurizing failed")

    with pytest.raises(KeyError, match="featurizing failed"):
        featurize()
    assert not any(thread.is_alive() for thread in gate.threads)
    assert FeatureStore.open(store.path).missing("final") == ([0, 1, 2] if failing else [1, 2])
    assert not list(store.path.rglob("*.tmp"))


# Tables ---------------------------------------------------------------------------------------------------------------


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


def test_room_in_a_table() -> None:
    table = RowTable(5)
    out = table.output_buffer([1, 2], 2, torch.float64)
    assert out is not None
    out[:] = 7
    table.add([1, 2], {"features": out})
    table.add([3], {"features": torch.ones(1, 2)})
    assert table.output_buffer([0, 4], 2, torch.float64) is None  # not in sequence
    assert table.columns["features"].tolist() == [[0, 0], [7, 7], [7, 7], [1, 1], [0, 0]]


def test_rows_that_never_came_are_zero() -> None:
    table = RowTable(3)
    table.add([2], {"loss": torch.tensor([4.0], requires_grad=True)})
    assert table.columns["loss"].tolist() == [0, 0, 4]
    assert not table.columns["loss"].requires_grad
