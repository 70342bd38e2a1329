"""The store: what it refuses, resuming after a kill, repair, setting aside, merging, several processes."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cases import child, wait_for
from lightning_attr import FeatureStore
from lightning_attr.errors import CorruptedStoreError, IncompleteFeaturesError, StoreMismatchError
from lightning_attr.files import io as files
from lightning_attr.files.io import read_tensors
from lightning_attr.files.writer_lock import WriterLock
from lightning_attr.store import feature_store as store_module
from lightning_attr.store.manifest import Fingerprint
from lightning_attr.store.shard_writer import ShardWriter

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")  # newer Pythons, of `child`

N, DIM, BATCH = 23, 5, 4  # shards of 8 rows: the last has 7, its last batch 3
FINGERPRINT = Fingerprint(N, "abc", {"w": (2,)}, {"kind": "identity"})


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_SHARD_ROWS", 8)


def make(
    path: Path,
    keys: tuple[str, ...] = ("epoch=0",),
    fingerprint: Fingerprint = FINGERPRINT,
    feature_dtype: str = "float32",
) -> FeatureStore:
    store = FeatureStore.create(path, fingerprint, batch_size=BATCH, feature_dtype=feature_dtype)
    for i, key in enumerate(keys):
        store.add_snapshot(key, {"w": torch.full((2,), float(i))}, epoch=i, global_step=i + 1, learning_rate=0.1)
    return store


def row_values(key: str, rows: list[int]) -> dict[str, Tensor]:
    """Values that tell row and snapshot apart, and keep every bit busy."""
    salt = sum(key.encode())
    grid = torch.tensor(rows, dtype=torch.float64)[:, None] * 7919 + torch.arange(DIM) + salt
    return {"features": torch.sin(grid).float(), "loss": torch.cos(grid[:, 0]).float()}


def featurize(store: FeatureStore, key: str, shards: list[int] | None = None) -> None:
    with ShardWriter(store, key) as writer:
        for shard in store.missing(key) if shards is None else shards:
            rows = store.rows(shard)
            for start in range(rows.start, rows.stop, BATCH):
                batch = list(range(start, min(start + BATCH, rows.stop)))
                writer.add(batch, row_values(key, batch))


def whole(path: Path, keys: tuple[str, ...] = ("epoch=0",), **arguments: Any) -> FeatureStore:
    store = make(path, keys, **arguments)
    for key in keys:
        featurize(store, key)
    return store


def assert_complete(store: FeatureStore, key: str, values_of: str | None = None) -> None:
    expected = row_values(values_of or key, list(range(N)))
    for name, values in expected.items():
        assert torch.equal(store.column(key, name), values)


def shard_files(store: FeatureStore, key: str = "epoch=0") -> list[Path]:
    return sorted((store.path / store.snapshot(key).folder / "features").glob("*.safetensors"))


# Making and opening ---------------------------------------------------------------------------------------------------


def test_what_was_stored_is_there_after_opening(tmp_path: Path) -> None:
    whole(tmp_path / "a", ("epoch=0", "epoch=1"))
    store = FeatureStore.open(str(tmp_path / "a"))
    assert store.fingerprint == FINGERPRINT
    assert [s.key for s in store.snapshots] == ["epoch=0", "epoch=1"]
    assert store.snapshot("epoch=1").projection == "epoch=1"
    for key in ("epoch=0", "epoch=1"):
        assert_complete(store, key)
        assert store.missing(key) == []
    assert torch.equal(store.weights("epoch=1")["w"], torch.ones(2))


def test_features_are_mapped_from_the_file_and_writing_to_them_changes_no_file(tmp_path: Path) -> None:
    store = whole(tmp_path)
    store.shard("epoch=0", 0)["features"].zero_()
    assert_complete(FeatureStore.open(tmp_path), "epoch=0")


def test_create_refuses_a_directory_that_holds_a_store(tmp_path: Path) -> None:
    make(tmp_path)
    before = (tmp_path / "manifest.json").read_bytes()
    with pytest.raises(
        StoreMismatchError, match=r"already holds an attribution store\. Open it, or use another directory"
    ):
        make(tmp_path)
    assert (tmp_path / "manifest.json").read_bytes() == before


def test_open_refuses_a_directory_without_a_store(tmp_path: Path) -> None:
    assert not FeatureStore.exists(tmp_path)
    assert not FeatureStore.exists(tmp_path / "none")
    with pytest.raises(CorruptedStoreError, match="holds no attribution store"):
        FeatureStore.open(tmp_path)


def test_unknown_and_taken_names_of_snapshots(tmp_path: Path) -> None:
    store = make(tmp_path)
    with pytest.raises(KeyError, match=r"has no snapshot 'epoch=7'; it has \['epoch=0'\]"):
        store.weights("epoch=7")
    with pytest.raises(StoreMismatchError, match="already holds the snapshot 'epoch=0'"):
        store.add_snapshot("epoch=0", {}, epoch=0, global_step=1, learning_rate=0.1)


@pytest.mark.parametrize(
    "changes", [{"length": 24}, {"data": "x"}, {"layout": {"v": (2,)}}, {"projector": {"kind": "x"}}]
)
def test_check_refuses_another_setup_and_changes_nothing(tmp_path: Path, changes: dict[str, object]) -> None:
    store = make(tmp_path)
    before = (tmp_path / "manifest.json").read_bytes()
    with pytest.raises(StoreMismatchError, match=f"{tmp_path} was"):
        store.check(replace(FINGERPRINT, **changes))
    assert (tmp_path / "manifest.json").read_bytes() == before
    store.check(FINGERPRINT)


def test_check_adopts_the_first_projection_for_good(tmp_path: Path) -> None:
    store = make(tmp_path, fingerprint=replace(FINGERPRINT, projector=None))
    store.check(FINGERPRINT)
    assert FeatureStore.open(tmp_path).fingerprint.projector == {"kind": "identity"}
    with pytest.raises(StoreMismatchError, match="projection"):
        FeatureStore.open(tmp_path).check(replace(FINGERPRINT, projector={"kind": "other"}))


@pytest.mark.parametrize("batch_size", [1, 3, 7, 8, 9, 100])
@pytest.mark.parametrize("length", [1, 8, 23, 5000])
def test_shards_hold_whole_batches_and_cover_every_row_once(tmp_path: Path, length: int, batch_size: int) -> None:
    store = FeatureStore.create(tmp_path, replace(FINGERPRINT, length=length), batch_size=batch_size)
    shards = [store.rows(shard) for shard in range(store.manifest.num_shards)]
    assert list(itertools.chain(*shards)) == list(range(length))
    assert all(rows.start % batch_size == 0 for rows in shards)
    assert len(shards) <= 256


def test_a_batch_size_larger_than_the_shards_goes_on_in_the_same_shards(tmp_path: Path) -> None:
    store = make(tmp_path)
    with ShardWriter(store, "epoch=0") as writer:
        for shard in store.missing("epoch=0"):
            rows = list(store.rows(shard))
            writer.add(rows, row_values("epoch=0", rows))
    assert_complete(store, "epoch=0")


def test_write_shard_refuses_another_number_of_rows(tmp_path: Path) -> None:
    store = make(tmp_path)
    with pytest.raises(ValueError, match="Expected column 'loss' to have the 7 rows 16 to 22 of its shard, but got 8"):
        store.write_shard("epoch=0", 2, {"features": torch.zeros(7, 2), "loss": torch.zeros(8)})
    assert store.missing("epoch=0") == [0, 1, 2]
    assert shard_files(store) == []


def test_write_shard_refuses_nan(tmp_path: Path) -> None:
    store = make(tmp_path)
    columns = row_values("epoch=0", list(range(8, 16)))
    columns["features"][5, 2] = float("nan")
    with pytest.raises(ValueError, match="Expected finite values in column 'features', but row 13 holds NaN or Inf"):
        store.write_shard("epoch=0", 1, columns)
    assert shard_files(store) == []


# Half precision -------------------------------------------------------------------------------------------------------


def assert_rounded(store: FeatureStore, key: str, digits: float = 2.0**-11, values_of: str | None = None) -> None:
    """The features of a complete snapshot are right to their digits, whichever way they are read."""
    expected = row_values(values_of or key, list(range(N)))
    features = store.column(key, "features")
    assert torch.equal(torch.cat([columns["features"] for _, columns in store.blocks(key)]), features)
    error = (features - expected["features"]).abs()
    assert (error <= digits * expected["features"].abs()).all()
    assert error.any()
    assert torch.equal(store.column(key, "loss"), expected["loss"])


@pytest.mark.parametrize(("feature_dtype", "digits"), [("float16", 2.0**-11), ("bfloat16", 2.0**-8)])
def test_half_precision_is_stored_and_float32_read(tmp_path: Path, feature_dtype: str, digits: float) -> None:
    store = whole(tmp_path, feature_dtype=feature_dtype)
    for opened in (store, FeatureStore.open(tmp_path)):
        assert opened.manifest.feature_dtype == feature_dtype
        assert_rounded(opened, "epoch=0", digits)
        assert opened.shard("epoch=0", 1).keys() == {"features", "loss"}
        assert opened.shard("epoch=0", 1)["features"].dtype == torch.float32
    for file in shard_files(store):
        assert load_file(file)["features"].dtype == getattr(torch, feature_dtype)
        assert torch.equal(load_file(file)["loss"], read_tensors(file)["loss"])


def test_safetensors_alone_reads_the_features(tmp_path: Path) -> None:
    store = whole(tmp_path, feature_dtype="float16")
    shards = [load_file(file) for file in shard_files(store)]
    features = torch.cat([shard["features"].float() * shard["features_scale"] for shard in shards])
    assert torch.equal(features, store.column("epoch=0", "features"))


def test_features_are_float16_unless_told_otherwise(tmp_path: Path) -> None:
    assert FeatureStore.create(tmp_path / "a", FINGERPRINT).manifest.feature_dtype == "float16"
    with pytest.raises(ValueError, match=r"`feature_dtype` of .* to be 'float16', .* but got 'int8'"):
        FeatureStore.create(tmp_path / "b", FINGERPRINT, feature_dtype="int8")
    assert not (tmp_path / "b").exists()


def test_every_shard_has_its_own_scale(tmp_path: Path) -> None:
    """What a shard holds depends on its rows alone, not on the others or on the order in which they came."""
    store = make(tmp_path / "a", feature_dtype="float16")
    shutil.copytree(store.path, tmp_path / "b")
    other = FeatureStore.open(tmp_path / "b")
    for one, order in ((store, (0, 1, 2)), (other, (2, 0, 1))):
        for shard in order:
            values = row_values("epoch=0", list(one.rows(shard)))
            one.write_shard("epoch=0", shard, {**values, "features": values["features"] * 1000.0**shard})
    files = shard_files(store)
    assert len({load_file(file)["features_scale"].item() for file in files}) == 3
    assert [file.read_bytes() for file in files] == [file.read_bytes() for file in shard_files(other)]
    assert store.manifest == other.manifest


def test_decoded_features_are_not_kept(tmp_path: Path) -> None:
    store = whole(tmp_path, feature_dtype="float16")
    store.shard("epoch=0", 0)["features"].zero_()
    assert_rounded(store, "epoch=0")
    assert {type(kept) for kept in store._verified} == {str}  # digests, and no tensor


def test_a_shard_is_hashed_once_and_another_file_in_its_place_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole(tmp_path, ("epoch=0", "epoch=1"))
    store, hashes = FeatureStore.open(tmp_path), []
    digest = files.digest
    monkeypatch.setattr(files, "digest", lambda tensors: hashes.append(1) or digest(tensors))
    for _ in range(3):
        assert_complete(store, "epoch=0")
    assert len(hashes) == 3  # one a shard
    shutil.copy(shard_files(store, "epoch=1")[1], shard_files(store)[1])
    with pytest.raises(
        CorruptedStoreError,
        match="it is of snapshot epoch=1, not epoch=0",
    ):
        store.column("epoch=0", "loss")


def test_half_precision_is_adopted_repaired_and_merged(tmp_path: Path) -> None:
    half, single = make(tmp_path / "half", feature_dtype="float16"), whole(tmp_path / "single")
    featurize(FeatureStore.open(half.path, writer=False), "epoch=0")
    half.adopt("epoch=0")
    assert_rounded(half, "epoch=0")
    damage(shard_files(half)[1])
    half = FeatureStore.open(half.path)
    assert half.repair() == [half.path / "snapshots/epoch=0/features/00001.safetensors"]
    featurize(half, "epoch=0")
    assert_rounded(half, "epoch=0")
    for order, first in (((half, single), "float16"), ((single, half), "float32")):
        merged = FeatureStore.merge(order, tmp_path / first)
        assert merged.manifest.feature_dtype == first
        for i, source in enumerate(order):
            found, expected = (s.column(k, "features") for s, k in ((merged, f"run{i}/epoch=0"), (source, "epoch=0")))
            assert torch.equal(found, expected)


def test_incomplete_features_are_named(tmp_path: Path) -> None:
    store = make(tmp_path)
    featurize(store, "epoch=0", [0, 2])
    assert store.missing("epoch=0") == [1]
    assert [rows for rows, _ in store.blocks("epoch=0", [2, 0])] == [range(16, 23), range(8)]
    with pytest.raises(IncompleteFeaturesError, match=r"rows 8 to 15 of snapshot 'epoch=0' .* have no features yet"):
        store.column("epoch=0", "loss")


# Killed and resumed ---------------------------------------------------------------------------------------------------


def featurize_and_die(path: Path, writes: int, moment: str) -> None:
    """Write this many files, then die before or after the rename of the next."""
    rename, done = Path.replace, itertools.count()

    def dying(self: Path, target: Path) -> Path:
        if next(done) == writes:
            if moment == "after":
                rename(self, target)
            os.kill(os.getpid(), 9)
        return rename(self, target)

    with WriterLock(path):  # as a run has it
        Path.replace = dying  # type: ignore[method-assign]
        featurize(FeatureStore.open(path), "epoch=0")


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("writes", range(6))  # three shards, each with its manifest
def test_a_run_killed_anywhere_goes_on_and_equals_one_that_was_not(tmp_path: Path, writes: int, moment: str) -> None:
    path = make(tmp_path / "killed").path
    shutil.copytree(path, tmp_path / "reference")  # one store, so that even its id is the same
    reference = FeatureStore.open(tmp_path / "reference")
    featurize(reference, "epoch=0")
    with child(featurize_and_die, path, writes, moment) as process:
        process.join()
    assert process.exitcode == -9

    store = FeatureStore.open(path)
    there = {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in shard_files(store)}
    assert len(there) == (writes + 1 + (moment == "after")) // 2
    store.adopt("epoch=0")
    assert store.missing("epoch=0") == list(range(len(there), 3))
    featurize(store, "epoch=0")

    for file, identity in there.items():  # not computed again
        assert (file.stat().st_ino, file.stat().st_mtime_ns) == identity
    assert FeatureStore.open(path).manifest == reference.manifest
    for one, other in zip(shard_files(store), shard_files(reference), strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert (path / "manifest.json").read_bytes() == (reference.path / "manifest.json").read_bytes()
    assert_complete(FeatureStore.open(path), "epoch=0")
    assert all(file.name.endswith(".tmp") for file in store.repair())
    assert not list(path.rglob("*tmp*"))


def featurize_slowly_forever(path: Path) -> None:
    featurize(FeatureStore.open(path), "epoch=0")
    store = FeatureStore.open(path)
    while True:  # rewrites what is there
        for shard in range(3):
            store.write_shard("epoch=0", shard, row_values("epoch=0", list(store.rows(shard))))


@pytest.mark.parametrize("delay", [0.0, 0.013, 0.029])
def test_a_run_killed_at_any_moment_leaves_a_readable_store(tmp_path: Path, delay: float) -> None:
    path = make(tmp_path).path
    with child(featurize_slowly_forever, path) as process:
        wait_for(lambda: not FeatureStore.open(path, writer=False).missing("epoch=0"))
        process.join(delay)
        process.kill()
    assert_complete(FeatureStore.open(path), "epoch=0")


def test_adopt_enters_whole_shards_and_leaves_damaged_ones_to_be_computed(tmp_path: Path) -> None:
    path = make(tmp_path).path
    featurize(FeatureStore.open(path, writer=False), "epoch=0")
    store = FeatureStore.open(path)
    assert store.missing("epoch=0") == [0, 1, 2]
    damage(shard_files(store)[1])
    store.adopt("epoch=0")
    assert FeatureStore.open(path).missing("epoch=0") == [1]
    featurize(store, "epoch=0")
    assert_complete(FeatureStore.open(path), "epoch=0")


def test_features_left_by_other_weights_are_never_adopted(tmp_path: Path) -> None:
    store = whole(tmp_path)
    (tmp_path / "manifest.json").unlink()  # a store that was half deleted, or a run killed while it set snapshots aside
    store = make(tmp_path)
    store.adopt("epoch=0")
    assert store.missing("epoch=0") == [0, 1, 2]
    assert len(list((tmp_path / "abandoned" / "epoch=0" / "features").iterdir())) == 3


# Several processes ----------------------------------------------------------------------------------------------------


def test_only_the_writer_writes_the_manifest_and_the_others_see_it_after_reload(tmp_path: Path) -> None:
    make(tmp_path)
    writer, other = FeatureStore.open(tmp_path), FeatureStore.open(tmp_path, writer=False)
    before = (tmp_path / "manifest.json").read_bytes()
    featurize(other, "epoch=0", [1])
    assert (tmp_path / "manifest.json").read_bytes() == before
    assert other.missing("epoch=0") == [0, 2]
    assert writer.missing("epoch=0") == [0, 1, 2]
    featurize(writer, "epoch=0", [0, 2])
    writer.adopt("epoch=0")
    assert other.missing("epoch=0") == [0, 2]
    other.reload()
    assert other.manifest == writer.manifest
    assert_complete(other, "epoch=0")


def featurize_share(path: Path, rank: int) -> None:
    store = FeatureStore.open(path, writer=False)
    featurize(store, "epoch=0", store.missing("epoch=0")[rank::2])


def test_two_processes_write_different_shards_at_the_same_time(tmp_path: Path) -> None:
    path = make(tmp_path).path
    with child(featurize_share, path, 0) as one, child(featurize_share, path, 1) as two:
        one.join()
        two.join()
    assert (one.exitcode, two.exitcode) == (0, 0)
    store = FeatureStore.open(path)
    store.adopt("epoch=0")
    assert_complete(FeatureStore.open(path), "epoch=0")


# Damage and repair ----------------------------------------------------------------------------------------------------


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


DAMAGES = {"is damaged": damage, "is truncated or damaged": truncate, "is missing": Path.unlink}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_shard_is_named_with_the_remedy_and_repair_drops_it_alone(tmp_path: Path, what: str) -> None:
    store = whole(tmp_path, ("epoch=0", "epoch=1"))
    bad = shard_files(store, "epoch=1")[1]
    others = {file: file.stat().st_ino for key in ("epoch=0", "epoch=1") for file in shard_files(store, key)}
    del others[bad]
    DAMAGES[what](bad)

    store = FeatureStore.open(tmp_path)
    with pytest.raises(CorruptedStoreError, match=rf"epoch=1/features/00001\.safetensors {what}.*repair\(\)` drops it"):
        store.column("epoch=1", "loss")
    assert_complete(store, "epoch=0")

    left = [tmp_path / "snapshots" / "epoch=0" / name for name in (".tmpAb12Cd", ".weights.safetensors.1.tmp")]
    for file in left:
        file.write_bytes(b"remains of a killed run")
    assert store.repair() == [bad, *left]
    assert store.missing("epoch=0") == []
    assert FeatureStore.open(tmp_path).missing("epoch=1") == [1]
    assert {file: file.stat().st_ino for file in others} == others
    assert not bad.exists()
    assert not any(file.exists() for file in left)
    featurize(store, "epoch=1")
    assert_complete(store, "epoch=1")
    assert store.repair() == []


def test_repair_finds_what_was_damaged_after_it_was_read(tmp_path: Path) -> None:
    store = whole(tmp_path)
    assert_complete(store, "epoch=0")
    damage(shard_files(store)[0])  # in place: the mapped values change under the hands of whoever read them
    assert len(store.repair()) == 1
    featurize(store, "epoch=0")
    assert_complete(store, "epoch=0")


def test_damaged_weights_are_named_with_the_remedy(tmp_path: Path) -> None:
    store = whole(tmp_path, ("epoch=0", "epoch=1"))
    damage(tmp_path / "snapshots" / "epoch=0" / "weights.safetensors")
    with pytest.raises(
        CorruptedStoreError, match=r"weights\.safetensors is damaged.*set_aside\(\['epoch=0'\]\)` to go on"
    ):
        store.weights("epoch=0")
    store.set_aside(["epoch=0"])
    assert [s.key for s in FeatureStore.open(tmp_path).snapshots] == ["epoch=1"]


# Setting aside --------------------------------------------------------------------------------------------------------


def test_set_aside_moves_and_never_deletes_even_the_same_name_twice(tmp_path: Path) -> None:
    store = whole(tmp_path, ("epoch=0", "epoch=1"))
    files = sorted(file.name for file in (tmp_path / "snapshots" / "epoch=1").rglob("*.safetensors"))
    weights = []
    for value in (5.0, 6.0):
        weights.append(store.weights("epoch=1")["w"])
        store.set_aside(["epoch=1"])
        assert [s.key for s in FeatureStore.open(tmp_path).snapshots] == ["epoch=0"]
        store.add_snapshot("epoch=1", {"w": torch.full((2,), value)}, epoch=1, global_step=2, learning_rate=0.1)
        featurize(store, "epoch=1")
    moved = sorted((tmp_path / "abandoned").iterdir())
    assert [folder.name for folder in moved] == ["epoch=1", "epoch=1+"]
    for folder, before in zip(moved, weights, strict=True):
        assert sorted(file.name for file in folder.rglob("*.safetensors")) == files
        assert torch.equal(read(folder / "weights.safetensors"), before)
    assert_complete(FeatureStore.open(tmp_path), "epoch=0")


def read(path: Path) -> Tensor:
    return load_file(path)["w"]


def test_a_new_snapshot_of_an_old_name_never_shows_the_old_features(tmp_path: Path) -> None:
    store = whole(tmp_path)
    assert_complete(store, "epoch=0")  # verified and remembered
    store.set_aside(["epoch=0"])
    store.add_snapshot("epoch=0", {"w": torch.full((2,), 9.0)}, epoch=0, global_step=1, learning_rate=0.1)
    with pytest.raises(IncompleteFeaturesError):
        store.column("epoch=0", "loss")
    for shard in store.missing("epoch=0"):
        store.write_shard("epoch=0", shard, row_values("other", list(store.rows(shard))))
    assert_complete(store, "epoch=0", values_of="other")


def test_set_aside_of_nothing_of_unknown_and_of_lost_snapshots(tmp_path: Path) -> None:
    store = whole(tmp_path)
    store.set_aside([])
    assert not (tmp_path / "abandoned").exists()
    with pytest.raises(KeyError, match="has no snapshot 'none'"):
        store.set_aside(["epoch=0", "none"])
    assert_complete(FeatureStore.open(tmp_path), "epoch=0")
    shutil.rmtree(tmp_path / "snapshots" / "epoch=0")
    store.set_aside(["epoch=0"])
    assert FeatureStore.open(tmp_path).snapshots == ()


# Merging --------------------------------------------------------------------------------------------------------------


def test_merge_equals_its_sources_and_keeps_the_projections(tmp_path: Path) -> None:
    a, b = whole(tmp_path / "a", ("epoch=0", "epoch=1")), whole(tmp_path / "b", ("epoch=1",))
    merged = FeatureStore.merge([a, str(b.path)], tmp_path / "both")
    for store in (merged, FeatureStore.open(tmp_path / "both")):
        assert [s.key for s in store.snapshots] == ["run0/epoch=0", "run0/epoch=1", "run1/epoch=1"]
        assert [s.projection for s in store.snapshots] == ["epoch=0", "epoch=1", "epoch=1"]
        assert store.fingerprint == FINGERPRINT
        assert store.manifest.shard_rows == a.manifest.shard_rows
        for source, key, snapshot in zip((a, a, b), ("epoch=0", "epoch=1", "epoch=1"), store.snapshots, strict=True):
            assert_complete(store, snapshot.key, values_of=key)
            assert torch.equal(store.weights(snapshot.key)["w"], source.weights(key)["w"])
            original = source.snapshot(key)
            assert replace(snapshot, key=key, folder=original.folder) == original


def test_merge_links_and_a_change_of_the_ensemble_leaves_the_sources_alone(tmp_path: Path) -> None:
    a = whole(tmp_path / "a")
    merged = FeatureStore.merge([a.path], tmp_path / "both")
    linked = shard_files(merged, "run0/epoch=0")
    assert [file.stat().st_ino for file in linked] == [file.stat().st_ino for file in shard_files(a)]
    merged.write_shard("run0/epoch=0", 0, row_values("other", list(range(8))))
    merged.set_aside(["run0/epoch=0"])
    assert (tmp_path / "both" / "abandoned" / "run0" / "epoch=0").is_dir()
    assert_complete(FeatureStore.open(tmp_path / "a"), "epoch=0")


def test_merge_copies_where_the_file_system_has_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = whole(tmp_path / "a")

    def no_links(*_: object) -> None:
        raise OSError("Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    merged = FeatureStore.merge([a], tmp_path / "both")
    assert shard_files(merged, "run0/epoch=0")[0].stat().st_nlink == 1
    assert_complete(merged, "run0/epoch=0", values_of="epoch=0")


def test_merge_of_incomplete_stores_goes_on_where_they_were(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a"), make(tmp_path / "b")
    featurize(a, "epoch=0", [1])
    merged = FeatureStore.merge([a, b], tmp_path / "both")
    assert merged.missing("run0/epoch=0") == [0, 2]
    assert merged.missing("run1/epoch=0") == [0, 1, 2]


def test_a_merged_store_merges_again(tmp_path: Path) -> None:
    one = FeatureStore.merge([whole(tmp_path / "a")], tmp_path / "one")
    two = FeatureStore.merge([one, whole(tmp_path / "b")], tmp_path / "two")
    assert [s.key for s in two.snapshots] == ["run0/run0/epoch=0", "run1/epoch=0"]
    assert [s.projection for s in two.snapshots] == ["epoch=0", "epoch=0"]
    assert_complete(two, "run0/run0/epoch=0", values_of="epoch=0")


def test_merge_with_a_store_that_knows_no_projection_takes_that_of_the_other(tmp_path: Path) -> None:
    a = make(tmp_path / "a", fingerprint=replace(FINGERPRINT, projector=None))
    merged = FeatureStore.merge([a, whole(tmp_path / "b")], tmp_path / "both")
    assert merged.fingerprint.projector == {"kind": "identity"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 22}, "a training data set of 23 samples, but this one has 22"),
        ({"data": "x"}, "another training data set"),
        ({"layout": {"w": (3,)}}, r"parameter `w` has the shape \(2,\), here \(3,\)"),
        ({"projector": {"kind": "identity", "seed": 1}}, "the projection"),
    ],
)
def test_merge_refuses_another_setup(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    make(tmp_path / "a")
    make(tmp_path / "b", fingerprint=replace(FINGERPRINT, **changes))
    with pytest.raises(StoreMismatchError, match=f"/b cannot be merged with .*/a, which was .*{message}"):
        FeatureStore.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "both")
    assert not (tmp_path / "both").exists()


def test_merge_refuses_other_shards_no_stores_and_a_directory_in_use(tmp_path: Path) -> None:
    a = make(tmp_path / "a")
    FeatureStore.create(tmp_path / "b", FINGERPRINT, batch_size=5)
    with pytest.raises(StoreMismatchError, match="has 8 rows a shard, but this one has 10: featurize both"):
        FeatureStore.merge([a, tmp_path / "b"], tmp_path / "both")
    with pytest.raises(ValueError, match="Expected argument `stores` to name at least one store, but got none"):
        FeatureStore.merge([], tmp_path / "both")
    before = (tmp_path / "b" / "manifest.json").read_bytes()
    with pytest.raises(StoreMismatchError, match="/b already holds a store, or something else"):
        FeatureStore.merge([a], tmp_path / "b")
    assert (tmp_path / "b" / "manifest.json").read_bytes() == before
    with pytest.raises(CorruptedStoreError, match="holds no attribution store"):
        FeatureStore.merge([tmp_path / "none"], tmp_path / "both")


def test_the_manifest_on_disk_is_readable_by_anybody(tmp_path: Path) -> None:
    store = make(tmp_path)
    featurize(store, "epoch=0", [0, 2])
    record = json.loads((tmp_path / "manifest.json").read_text())
    assert record["shard_rows"] == 8
    assert int(record["snapshots"][0]["rows"], 16) == 0b111_1111_0000_0000_1111_1111
