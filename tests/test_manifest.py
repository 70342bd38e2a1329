"""The manifest: round trip, row bitmap, what differs from what is on record, damaged files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_attr.errors import CorruptedStoreError, StoreMismatchError
from lightning_attr.manifest import Fingerprint, Manifest, Snapshot

FINGERPRINT = Fingerprint(
    10, "abc", {"w": (2, 3), "b": (2,), "scale": ()}, {"kind": "kronecker", "proj_dim": 8, "seed": 0}
)
SNAPSHOT = Snapshot("epoch=0", 0, 5, 0.1 + 0.2, "snapshots/epoch=0", "ff", "epoch=0", {0: "aa", 2: "bb"})
MANIFEST = Manifest(FINGERPRINT, 4, "cd", (SNAPSHOT, replace(SNAPSHOT, key="epoch=1", shards={})))


def test_round_trip(tmp_path: Path) -> None:
    MANIFEST.write(tmp_path / "manifest.json")
    found = Manifest.read(tmp_path / "manifest.json")
    assert found == MANIFEST
    assert list(found.fingerprint.layout) == ["w", "b", "scale"]


def test_round_trip_of_what_is_not_known_yet(tmp_path: Path) -> None:
    empty = Manifest(Fingerprint(1, None, {"w": (1,)}, None), 512, None)
    empty.write(tmp_path / "manifest.json")
    assert Manifest.read(tmp_path / "manifest.json") == empty


@pytest.mark.parametrize("feature_dtype", ["float16", "bfloat16", "float32"])
def test_the_dtype_of_features_is_on_record(tmp_path: Path, feature_dtype: str) -> None:
    replace(MANIFEST, feature_dtype=feature_dtype).write(tmp_path / "manifest.json")
    assert Manifest.read(tmp_path / "manifest.json").feature_dtype == feature_dtype


def test_without_a_dtype_on_record_features_are_float32_and_an_unknown_one_is_damage(tmp_path: Path) -> None:
    replace(MANIFEST, feature_dtype="float16").write(tmp_path / "manifest.json")
    record = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**record, "feature_dtype": "float8"}))
    with pytest.raises(CorruptedStoreError, match=r"manifest\.json is damaged: .*`feature_dtype`.* but got 'float8'"):
        Manifest.read(tmp_path / "manifest.json")
    del record["feature_dtype"]
    (tmp_path / "manifest.json").write_text(json.dumps(record))
    assert Manifest.read(tmp_path / "manifest.json") == replace(MANIFEST, feature_dtype="float32")


def test_joined_takes_the_dtype_of_the_first(tmp_path: Path) -> None:
    half = replace(MANIFEST, feature_dtype="float16")
    assert Manifest.joined([(Path("a"), half), (Path("b"), MANIFEST)]).feature_dtype == "float16"
    assert Manifest.joined([(Path("a"), MANIFEST), (Path("b"), half)]).feature_dtype == "float32"


@pytest.mark.parametrize("shards", [[], [0], [1], [2], [0, 2], [2, 1], [0, 1, 2]])
def test_the_bitmap_has_a_bit_for_each_row_with_features(tmp_path: Path, shards: list[int]) -> None:
    snapshot = replace(SNAPSHOT, shards=dict.fromkeys(shards, "aa"))
    replace(MANIFEST, snapshots=(snapshot,)).write(tmp_path / "manifest.json")
    (record,) = json.loads((tmp_path / "manifest.json").read_text())["snapshots"]
    rows = [row for row in range(64) if int(record["rows"], 16) >> row & 1]
    assert rows == [row for row in range(10) if row // 4 in shards]


@pytest.mark.parametrize(("length", "shards"), [(1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_num_shards_covers_all_rows(length: int, shards: int) -> None:
    assert Manifest(replace(FINGERPRINT, length=length), 4, None).num_shards == shards


DIFFERENCES = {
    "length": ({"length": 11}, "training data set of 10 samples, but this one has 11"),
    "samples": ({"data": "xyz"}, "another training data set: it is as long, but its samples differ"),
    "missing": ({"layout": {"w": (2, 3), "scale": ()}}, "another model: its parameter `b` is missing here, or frozen"),
    "shape": (
        {"layout": {"w": (2, 4), "b": (2,), "scale": ()}},
        r"another model: its parameter `w` has the shape \(2, 3\), here \(2, 4\)",
    ),
    "extra": (
        {"layout": {"w": (2, 3), "b": (2,), "scale": (), "head": (1,)}},
        "another model: it has no trainable parameter `head`",
    ),
    "order": (
        {"layout": {"b": (2,), "w": (2, 3), "scale": ()}},
        "another model: the order of the parameters differs",
    ),
    "projection": (
        {"projector": {"kind": "kronecker", "proj_dim": 8, "seed": 1}},
        "featurized with the projection {.*'seed': 0}, but here it is {.*'seed': 1}: give the method the store's",
    ),
}


@pytest.mark.parametrize("what", DIFFERENCES)
def test_every_difference_has_its_message(what: str) -> None:
    changes, message = DIFFERENCES[what]
    with pytest.raises(StoreMismatchError, match=f"^out/store was .*{message}.*Use another directory"):
        FINGERPRINT.check(replace(FINGERPRINT, **changes), "out/store")


def test_long_data_sets_are_named_with_separators() -> None:
    with pytest.raises(StoreMismatchError, match="of 10 samples, but this one has 1,000,000"):
        FINGERPRINT.check(replace(FINGERPRINT, length=1_000_000), "store")


@pytest.mark.parametrize("changes", [{}, {"data": None}, {"projector": None}])
def test_what_one_side_does_not_know_is_no_difference(changes: dict[str, None]) -> None:
    other = replace(FINGERPRINT, **changes)
    FINGERPRINT.check(other, "store")
    other.check(FINGERPRINT, "store")
    assert FINGERPRINT.difference(other) is None


def test_joined_names_and_keeps_everything_that_matters() -> None:
    other = replace(MANIFEST, run="other", snapshots=(SNAPSHOT,))
    joined = Manifest.joined([(Path("a"), MANIFEST), (Path("b"), other)])
    assert [s.key for s in joined.snapshots] == ["run0/epoch=0", "run0/epoch=1", "run1/epoch=0"]
    assert joined.snapshots[2].folder == "snapshots/run1/epoch=0"
    assert joined.snapshots[2].projection == "epoch=0"
    assert joined.snapshots[2].shards == SNAPSHOT.shards
    assert (joined.fingerprint, joined.shard_rows, joined.run) == (FINGERPRINT, 4, None)


def test_joined_keeps_what_only_a_later_store_knows() -> None:
    vague = replace(MANIFEST, fingerprint=replace(FINGERPRINT, data=None, projector=None))
    assert Manifest.joined([(Path("a"), vague), (Path("b"), MANIFEST)]).fingerprint == FINGERPRINT
    other = replace(MANIFEST, fingerprint=replace(FINGERPRINT, projector={"kind": "identity"}))
    with pytest.raises(
        StoreMismatchError, match=r"c cannot be merged with a, which was featurized with the projection"
    ):
        Manifest.joined([(Path("a"), vague), (Path("b"), MANIFEST), (Path("c"), other)])


@pytest.mark.parametrize("what", DIFFERENCES)
def test_joined_refuses_every_difference(what: str) -> None:
    changes, message = DIFFERENCES[what]
    other = replace(MANIFEST, fingerprint=replace(FINGERPRINT, **changes))
    with pytest.raises(StoreMismatchError, match=f"^b cannot be merged with a, which was .*{message}"):
        Manifest.joined([(Path("a"), MANIFEST), (Path("b"), other)])


def test_joined_refuses_other_shards() -> None:
    with pytest.raises(
        StoreMismatchError, match=r"has 4 rows a shard, but this one has 5: featurize both with the same"
    ):
        Manifest.joined([(Path("a"), MANIFEST), (Path("b"), replace(MANIFEST, shard_rows=5))])


def test_a_folder_without_a_manifest_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(CorruptedStoreError, match=r"holds no attribution store: manifest\.json is missing"):
        Manifest.read(tmp_path / "manifest.json")


@pytest.mark.parametrize("content", ["{", "", '{"format": 1, "finger', "\x00\x01", b"\xff\xfe\xff".decode("latin1")])
def test_damaged_json_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content, "latin1")
    with pytest.raises(CorruptedStoreError, match=r"manifest\.json is damaged: .* start afresh in another directory"):
        Manifest.read(tmp_path / "manifest.json")


@pytest.mark.parametrize(
    ("record", "found"), [({"format": 2}, "2"), ({}, "None"), ([], "None"), ("text", "None"), ({"format": "1"}, "'1'")]
)
def test_an_unknown_format_is_named(tmp_path: Path, record: object, found: str) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(
        CorruptedStoreError, match=f"has the format {found}, but this version of lightning_attr reads 1"
    ):
        Manifest.read(tmp_path / "manifest.json")


@pytest.mark.parametrize("part", ["fingerprint", "shard_rows", "run", "snapshots"])
def test_a_record_that_lacks_a_part_is_damaged(tmp_path: Path, part: str) -> None:
    MANIFEST.write(tmp_path / "manifest.json")
    record = json.loads((tmp_path / "manifest.json").read_text())
    del record[part]
    (tmp_path / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(CorruptedStoreError, match=r"manifest\.json is damaged"):
        Manifest.read(tmp_path / "manifest.json")


def test_another_model_output_is_refused() -> None:
    margin, loss = (replace(Fingerprint(3, None, {"w": (2,)}, None), output=text) for text in ("a", "b"))
    with pytest.raises(StoreMismatchError, match=r"store attributes a, but here it would be b\. Use another directory"):
        margin.check(loss, "store")
    margin.check(replace(loss, output=None), "store")  # written before it was recorded
