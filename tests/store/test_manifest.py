"""The manifest: round trip, row bitmap, what differs from what is on record, damaged files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_attr.errors import CorruptedStoreError, StoreMismatchError
from lightning_attr.files.sealed_records import seal
from lightning_attr.store.manifest import Fingerprint, Manifest, Snapshot

FINGERPRINT = Fingerprint(
    10, "abc", {"w": (2, 3), "b": (2,), "scale": ()}, {"kind": "kronecker", "proj_dim": 8, "seed": 0}
)
SNAPSHOT = Snapshot("epoch=0", 0, 5, 0.1 + 0.2, "snapshots/epoch=0", "ff", "epoch=0", {0: "aa", 2: "bb"})
MANIFEST = Manifest(
    FINGERPRINT, 4, "cd", (SNAPSHOT, replace(SNAPSHOT, key="epoch=1", folder="snapshots/epoch=1", shards={}))
)


def rewrite(path: Path, **changes: Any) -> dict[str, Any]:
    """Write the manifest of `path` anew with other fields, as a stranger could: its checksum is right."""
    record = {**json.loads(path.read_text()), **changes}
    del record["sha256"]
    path.write_bytes(seal(record))
    return record


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


def test_an_unknown_dtype_is_damage(tmp_path: Path) -> None:
    replace(MANIFEST, feature_dtype="float16").write(tmp_path / "manifest.json")
    rewrite(tmp_path / "manifest.json", feature_dtype="float8")
    with pytest.raises(CorruptedStoreError, match=r"manifest\.json is damaged: .*`feature_dtype`.* but got 'float8'"):
        Manifest.read(tmp_path / "manifest.json")


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
    "missing": ({"layout": {"w": (2, 3), "scale": ()}}, "another model: its parameter `b` is missing here"),
    "shape": (
        {"layout": {"w": (2, 4), "b": (2,), "scale": ()}},
        r"another model: its parameter `w` has the shape \(2, 3\), here \(2, 4\)",
    ),
    "extra": (
        {"layout": {"w": (2, 3), "b": (2,), "scale": (), "head": (1,)}},
        "another model: it has no parameter `head`",
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
    ("record", "found"), [({"format": 1}, "1"), ({}, "None"), ([], "None"), ("text", "None"), ({"format": "2"}, "'2'")]
)
def test_an_unknown_format_is_named(tmp_path: Path, record: object, found: str) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(
        CorruptedStoreError, match=f"has the format {found}, but this version of lightning_attr reads 2"
    ):
        Manifest.read(tmp_path / "manifest.json")


@pytest.mark.parametrize("part", ["fingerprint", "shard_rows", "run", "snapshots"])
def test_a_record_that_lacks_a_part_is_damaged(tmp_path: Path, part: str) -> None:
    MANIFEST.write(tmp_path / "manifest.json")
    record = rewrite(tmp_path / "manifest.json")
    del record[part]
    (tmp_path / "manifest.json").write_bytes(seal(record))
    with pytest.raises(CorruptedStoreError, match=rf"manifest\.json is damaged: `{part}` of a Manifest is missing"):
        Manifest.read(tmp_path / "manifest.json")


def test_another_model_output_is_refused() -> None:
    margin, loss = (replace(Fingerprint(3, None, {"w": (2,)}, None), output=text) for text in ("a", "b"))
    with pytest.raises(StoreMismatchError, match=r"store attributes a, but here it would be b\. Use another directory"):
        margin.check(loss, "store")
    margin.check(replace(loss, output=None), "store")  # written before it was recorded


def test_a_changed_byte_anywhere_is_found(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    MANIFEST.write(path)
    content = path.read_bytes()
    for position in range(0, len(content), 3):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        with pytest.raises(CorruptedStoreError, match=r"manifest\.json (is damaged|has the format)"):
            Manifest.read(path)
    for length in range(0, len(content), 13):
        path.write_bytes(content[:length])
        with pytest.raises(CorruptedStoreError, match=r"manifest\.json (is damaged|has the format)"):
            Manifest.read(path)


def test_a_change_by_hand_is_told(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    MANIFEST.write(path)
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(CorruptedStoreError, match="does not match its checksum, so it was changed after it"):
        Manifest.read(path)


def test_the_id_is_drawn_and_kept(tmp_path: Path) -> None:
    first, second = (Manifest(FINGERPRINT, 4, None) for _ in range(2))
    assert first.id != second.id
    first.write(tmp_path / "manifest.json")
    assert Manifest.read(tmp_path / "manifest.json").id == first.id


def test_joined_tells_where_each_snapshot_was_written() -> None:
    other = replace(MANIFEST, id="other", snapshots=(SNAPSHOT, replace(SNAPSHOT, key="a", origin="before")))
    joined = Manifest.joined([(Path("a"), MANIFEST), (Path("b"), other)])
    assert [s.origin for s in joined.snapshots] == [MANIFEST.id, MANIFEST.id, "other", "before"]


def snapshots(**changes: Any) -> list[dict[str, Any]]:
    """The snapshots of a manifest, the first with other fields."""
    record = {"key": "a", "epoch": 0, "global_step": 1, "learning_rate": 0.1, "folder": "snapshots/a", "weights": "ff"}
    own = {**record, "projection": "a", "shards": {"0": "aa"}, **changes}
    return [{name: value for name, value in own.items() if value is not ...}]


FOREIGN = {
    "a folder elsewhere": (
        {"snapshots": snapshots(folder="../../etc")},
        "the folder of snapshot 'a' is '../../etc'",
    ),
    "another's folder": ({"snapshots": snapshots(folder="snapshots/b")}, "the folder of snapshot 'a' is 'snapshots/b'"),
    "a name that leads up": ({"snapshots": snapshots(key="../a")}, "Expected the name of a snapshot .* got '../a'"),
    "an absolute name": ({"snapshots": snapshots(key="/etc")}, "Expected the name of a snapshot .* got '/etc'"),
    "a hidden name": ({"snapshots": snapshots(key=".ssh")}, "Expected the name of a snapshot .* got '.ssh'"),
    "a device": ({"snapshots": snapshots(key="con")}, "Expected the name of a snapshot .* got 'con'"),
    "a null byte": ({"snapshots": snapshots(key="a\0b")}, "Expected the name of a snapshot"),
    "a long name": ({"snapshots": snapshots(key="a" * 10**5)}, r"Expected the name of a snapshot .*\.\.\."),
    "no name": ({"snapshots": snapshots(key=3)}, "Expected the name of a snapshot .* got 3"),
    "a name twice": ({"snapshots": snapshots() * 2}, "a snapshot 'a' is there twice, or holds another one"),
    "one in another": (
        {"snapshots": snapshots() + snapshots(key="A/features", folder="snapshots/A/features")},
        "a snapshot 'a' is there twice, or holds another one",
    ),
    "NaN": ({"snapshots": snapshots(learning_rate=float("nan"))}, "`learning_rate` is nan, where a finite number"),
    "infinity": ({"snapshots": snapshots(learning_rate=float("inf"))}, "`learning_rate` is inf, where a finite number"),
    "a negative rate": ({"snapshots": snapshots(learning_rate=-1)}, "`learning_rate` is -1, where a finite number"),
    "a huge step": ({"snapshots": snapshots(global_step=10**100)}, "`global_step` is a huge number, where an integer"),
    "a text for a number": ({"snapshots": snapshots(epoch="0")}, "`epoch` is '0', where an integer from -1"),
    "a truth for a number": ({"snapshots": snapshots(epoch=True)}, "`epoch` is True, where an integer from -1"),
    "a list for a text": ({"snapshots": snapshots(projection=[])}, r"`projection` is \[\], where a text"),
    "no hash": ({"snapshots": snapshots(weights="../x")}, "`weights` is '../x', where a hash"),
    "a shard too many": ({"snapshots": snapshots(shards={"3": "aa"})}, "snapshot 'a' has rows of more than 10 samples"),
    "a negative shard": ({"snapshots": snapshots(shards={"-1": "aa"})}, "`shards` is -1, where an integer"),
    "no shard": ({"snapshots": snapshots(shards={"x": "aa"})}, "`shards`: invalid literal"),
    "a field too many": ({"snapshots": snapshots(command="rm")}, "'command' is no field of a Snapshot"),
    "a field too few": ({"snapshots": snapshots(weights=...)}, "`weights` of a Snapshot is missing"),
    "no snapshots": ({"snapshots": {}}, r"`snapshots` is {}, where a list"),
    "no snapshot": ({"snapshots": [3]}, "3 is there, where the fields of a Snapshot are expected"),
    "no rows": ({"shard_rows": 0}, "`shard_rows` is 0, where an integer from 1"),
    "endless shards": (
        {"fingerprint": {"length": 2**50, "data": None, "layout": {}, "projector": None}},
        f"`shard_rows` is 4, where an integer from {2**30}",
    ),
    "a shape of texts": (
        {"fingerprint": {"length": 1, "data": None, "layout": {"w": ["2"]}, "projector": None}},
        "`w` is '2', where an integer from 0",
    ),
    "a deep projection": (
        {"fingerprint": {"length": 1, "data": None, "layout": {}, "projector": {"a": json.loads("[" * 50 + "]" * 50)}}},
        "`projector`: `a` .*, where a plain value, .* is expected",
    ),
    "no projection": (
        {"fingerprint": {"length": 1, "data": None, "layout": {}, "projector": 0.5}},
        "`projector` is 0.5, where a mapping",
    ),
    "an id of another kind": ({"id": ["a"]}, r"`id` is \['a'\], where a text"),
    "a field of no manifest": ({"run_on_load": "rm"}, "'run_on_load' is no field of a Manifest"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_what_a_stranger_may_write_is_refused_by_name(tmp_path: Path, what: str) -> None:
    changes, message = FOREIGN[what]
    MANIFEST.write(tmp_path / "manifest.json")
    rewrite(tmp_path / "manifest.json", **changes)
    with pytest.raises(CorruptedStoreError, match=rf"manifest\.json is damaged: .*{message}"):
        Manifest.read(tmp_path / "manifest.json")


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, "9" * 10_000, "NaN", "\ud800", '{"format": 2'])
def test_json_that_would_break_a_parser_is_damage(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(CorruptedStoreError, match=r"manifest\.json (is damaged|has the format None)"):
        Manifest.read(tmp_path / "manifest.json")
