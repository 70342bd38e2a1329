"""Files are whole or absent: killed writers, full disks, damaged bytes."""

from __future__ import annotations

import errno
import json
import os
import signal
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from cases import child, wait_for
from lightning_attr.errors import AttributionError, CorruptedStoreError
from lightning_attr.files import io as files
from lightning_attr.files.headers import header_of
from lightning_attr.files.io import digest, read_tensors, remains, write_bytes, write_tensors

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")  # newer Pythons, of `child`


def flip(path: Path, position: int) -> None:
    """Damage one byte, counted from the end if negative."""
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)


TENSORS = {
    "matrix": torch.arange(6.0).view(2, 3),
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "empty": torch.zeros(0, 4),
    "bf16": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "half": torch.tensor([1.5], dtype=torch.float16),
    "bool": torch.tensor([True, False, True]),
    "int8": torch.tensor([-3, 4], dtype=torch.int8),
    "int64": torch.tensor([2**40, -1]),
}


def test_round_trip_is_bit_exact_for_every_kind_of_tensor(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "folder" / "a.safetensors"
    content = write_tensors(path, TENSORS)
    found = read_tensors(path, content)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor)
    assert digest(found) == digest(TENSORS) == content


def test_nan_and_negative_zero_keep_their_bits(tmp_path: Path) -> None:
    special = torch.tensor([float("nan"), -0.0, float("inf")])
    write_tensors(tmp_path / "a", {"x": special})
    assert read_tensors(tmp_path / "a")["x"].view(torch.int32).tolist() == special.view(torch.int32).tolist()


def test_tensors_that_share_memory_or_are_views_are_written_apart(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    tensors = {"base": base, "same": base, "row": base[1], "column": base[:, 1], "transposed": base.T}
    write_tensors(tmp_path / "a", tensors)
    found = read_tensors(tmp_path / "a")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_parameters_are_written_without_their_graph(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    write_tensors(tmp_path / "a", {"w": weight * 2})
    assert torch.equal(read_tensors(tmp_path / "a")["w"], torch.full((2,), 2.0))


def test_files_are_plain_safetensors_with_the_digest_and_the_metadata_in_the_header(tmp_path: Path) -> None:
    content = write_tensors(tmp_path / "a.safetensors", {"x": torch.ones(2)}, {"kind": "test"})
    with safetensors.safe_open(tmp_path / "a.safetensors", framework="np") as file:
        assert file.metadata() == header_of({"kind": "test"}, content)
        own = json.loads(file.metadata()["lightning_attr"])
        assert (own["kind"], own["sha256"]) == ("test", content)
        np.testing.assert_array_equal(file.get_tensor("x"), np.ones(2, dtype=np.float32))


def test_the_digest_tells_names_shapes_dtypes_and_values_apart_but_not_the_order() -> None:
    x, y = torch.zeros(4), torch.ones(2)
    different = [
        {"x": x, "y": y},
        {"x": y, "y": x},
        {"z": x, "y": y},
        {"x": x.view(2, 2), "y": y},
        {"x": x.int(), "y": y},
        {"x": x},
        {},
    ]
    assert len({digest(tensors) for tensors in different}) == len(different)
    assert digest({"y": y, "x": x}) == digest({"x": x, "y": y})
    strided = torch.stack([x, x], 1)[:, 0]
    assert digest({"x": strided}) == digest({"x": x})


def test_a_written_file_replaces_the_one_before_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for data in (b"first", b"second, longer", b"3"):
        write_bytes(path, data)
        assert path.read_bytes() == data
    assert list(tmp_path.iterdir()) == [path]


def test_mapped_tensors_survive_the_replacement_of_their_file(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a", {"x": torch.zeros(1000)})
    before = read_tensors(tmp_path / "a")["x"]
    write_tensors(tmp_path / "a", {"x": torch.ones(1000)})
    assert before.sum() == 0
    assert read_tensors(tmp_path / "a")["x"].sum() == 1000


# Killed writers -------------------------------------------------------------------------------------------------------


def write_forever(path: Path) -> None:
    value = 0
    while True:
        write_tensors(path, {"x": torch.full((200_000,), float(value)), "y": torch.full((3,), float(value))})
        write_bytes(path.with_name("b"), f"{value} ".encode() * 100_000)
        value += 1


@pytest.mark.parametrize("moment", [0.0, 0.011, 0.023, 0.034, 0.047])
def test_a_writer_that_is_killed_at_any_moment_leaves_a_whole_file(tmp_path: Path, moment: float) -> None:
    path, other = tmp_path / "a", tmp_path / "b"
    with child(write_forever, path) as process:
        wait_for(other.exists)
        for _ in range(5):  # a reader beside the writer
            assert len(set(other.read_bytes().split())) == 1
        time.sleep(moment)
        process.kill()
    tensors = read_tensors(path)
    assert tensors["x"].unique().tolist() == tensors["y"].unique().tolist()
    text = other.read_bytes().split()
    assert (len(text), len(set(text))) == (100_000, 1)
    assert sorted(tmp_path.iterdir()) == sorted([path, other, *remains(tmp_path)])
    write_tensors(path, {"x": torch.zeros(1)})  # and the next writer is not in its way
    assert torch.equal(read_tensors(path)["x"], torch.zeros(1))


def test_remains_are_found_below_a_folder_and_nothing_else_is(tmp_path: Path) -> None:
    kept = ["a.safetensors", ".hidden", "tmp", "a.tmp", ".tmp", "below/.tmpdir/file"]
    left = [".a.safetensors.17.tmp", ".tmpAb12Cd", "below/.manifest.json.5.tmp"]
    for name in kept + left:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert remains(tmp_path) == sorted(tmp_path / name for name in left)


def write_and_die(path: Path, step: str) -> None:
    def write_part(self: Path, data: bytes) -> None:
        with self.open("wb") as file:
            file.write(data[:3])
        os.kill(os.getpid(), signal.SIGKILL)

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    where, name = {"write": (Path, "write_bytes"), "fsync": (os, "fsync"), "rename": (Path, "replace")}[step]
    setattr(where, name, write_part if step == "write" else die)
    write_bytes(path, b"after")


@pytest.mark.parametrize("step", ["write", "fsync", "rename"])
def test_killed_between_any_two_steps_the_file_before_is_whole(tmp_path: Path, step: str) -> None:
    path = tmp_path / "a"
    write_bytes(path, b"before")
    with child(write_and_die, path, step) as process:
        process.join()
    assert process.exitcode == -signal.SIGKILL
    assert path.read_bytes() == b"before"
    (rest,) = [file for file in tmp_path.iterdir() if file != path]
    assert rest.match(".a.*.tmp")
    assert remains(tmp_path) == [rest]


# Full disks -----------------------------------------------------------------------------------------------------------


def write_without_room(plain: Path, tensors: Path, messages: Path) -> None:
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    with pytest.raises(AttributionError) as first:
        write_bytes(plain, bytes(100_000))
    with pytest.raises(AttributionError) as second:
        write_tensors(tensors, {"x": torch.ones(100_000)})
    messages.write_text(f"{first.value}\n{second.value}\n")


def test_a_real_write_that_finds_no_room_names_path_and_free_bytes_and_loses_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "full"
    plain, tensors, messages = folder / "a.json", folder / "b.safetensors", tmp_path / "messages"
    write_bytes(plain, b"before")
    content = write_tensors(tensors, {"x": torch.zeros(2)})
    with child(write_without_room, plain, tensors, messages) as process:
        process.join()
    first, second = messages.read_text().splitlines()
    for message, path in ((first, plain), (second, tensors)):
        assert f"Could not write {path}" in message
        assert "bytes are free there" in message
        assert "What was stored before is intact" in message
    assert plain.read_bytes() == b"before"
    assert torch.equal(read_tensors(tensors, content)["x"], torch.zeros(2))
    assert sorted(folder.iterdir()) == [plain, tensors]


@pytest.mark.parametrize("where", ["write", "fsync", "rename"])
def test_a_disk_that_is_full_at_any_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    path = tmp_path / "a"
    write_bytes(path, b"before")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    target = {"write": (Path, "write_bytes"), "fsync": (os, "fsync"), "rename": (Path, "replace")}[where]
    with monkeypatch.context() as patch:
        patch.setattr(*target, full)
        with pytest.raises(
            AttributionError, match=r"Could not write .*a: .*No space left.*[\d,]+ bytes are free there"
        ):
            write_bytes(path, b"after")
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_path_that_cannot_be_says_so_itself(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(AttributionError, match=r"Could not write .*file/below/a"):
        write_bytes(tmp_path / "file" / "below" / "a", b"")


# Damage ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [-1, -500, 0, 12])
def test_one_flipped_byte_anywhere_is_found(tmp_path: Path, position: int) -> None:
    path = tmp_path / "a.safetensors"
    content = write_tensors(path, {"x": torch.randn(100, 3)})
    flip(path, position)
    for expected in (content, None):
        with pytest.raises(CorruptedStoreError, match=r"a\.safetensors is .*damaged"):
            read_tensors(path, expected)


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_a_truncated_file_is_found(tmp_path: Path, length: int) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"x": torch.randn(100, 3)})
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CorruptedStoreError, match=r"a\.safetensors is truncated or damaged"):
        read_tensors(path)


def test_a_missing_file_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(CorruptedStoreError, match=r"gone\.safetensors is missing\. Do that\.$"):
        read_tensors(tmp_path / "gone.safetensors", remedy="Do that.")


def test_a_whole_file_of_other_content_than_recorded_is_found(tmp_path: Path) -> None:
    content = write_tensors(tmp_path / "a", {"x": torch.zeros(2)})
    write_tensors(tmp_path / "a", {"x": torch.ones(2)})
    with pytest.raises(CorruptedStoreError, match="does not match its checksum"):
        read_tensors(tmp_path / "a", content)


@pytest.mark.parametrize("metadata", [None, {"sha256": digest({"x": torch.zeros(2)})}])
def test_a_file_without_checksums_is_not_trusted(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    safetensors.torch.save_file({"x": torch.zeros(2)}, tmp_path / "a", metadata)
    with pytest.raises(CorruptedStoreError, match="its header does not match its checksum, or was not written by this"):
        read_tensors(tmp_path / "a")


PLACE = {"kind": "features", "store": "a", "rows": "0-7"}


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (
            {**PLACE, "rows": "8-15"},
            r"a\.safetensors is not the file .* it is of rows 0-7, not 8-15\. Do",
        ),
        ({**PLACE, "store": "b"}, "it is of store a, not b"),
        ({**PLACE, "kind": "weights"}, "it is of kind features, not weights"),
    ],
)
def test_a_whole_file_in_another_place_is_found(tmp_path: Path, place: dict[str, str], message: str) -> None:
    content = write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(2)}, PLACE)
    for known in (PLACE, {**PLACE, "data": "what the writer did not know"}, {}):
        assert read_tensors(tmp_path / "a.safetensors", content, place=known)["x"].tolist() == [0, 0]
    with pytest.raises(CorruptedStoreError, match=message):
        read_tensors(tmp_path / "a.safetensors", content, "Do that.", place=place)
    write_tensors(tmp_path / "b.safetensors", {"x": torch.zeros(2)})
    with pytest.raises(CorruptedStoreError, match="it does not say to be features"):
        read_tensors(tmp_path / "b.safetensors", place=PLACE)


def test_every_byte_of_a_file_counts(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    content = write_tensors(path, {"x": torch.randn(3), "y": torch.ones(2, 2, dtype=torch.int64)}, PLACE)
    before = path.read_bytes()
    for position in range(0, len(before), 3):
        flip(path, position)
        for expected in (content, None):
            with pytest.raises(CorruptedStoreError, match=r"a\.safetensors is "):
                read_tensors(path, expected)
        path.write_bytes(before)


@pytest.mark.parametrize("kind", ["folder", "pipe", "loop", "dangling"])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.safetensors"
    make = {
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "loop": lambda: path.symlink_to(path),
        "dangling": lambda: path.symlink_to(tmp_path / "none"),
    }
    make[kind]()
    with pytest.raises(CorruptedStoreError, match=r"a\.safetensors is (truncated or damaged|missing)"):
        read_tensors(path)


def header(text: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + data


CRAFTED = {
    "a length beyond the file": struct.pack("<Q", 2**63) + b"{}",
    "no JSON": header(b"{"),
    "no UTF-8": header(b'{"\xff": 1}'),
    "a dtype of the future": header(b'{"x": {"dtype": "F1024", "shape": [1], "data_offsets": [0, 1]}}', b"a"),
    "offsets beyond the file": header(b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'),
    "negative shapes": header(b'{"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', b"abcd"),
    "shapes without end": header(
        b'{"x": {"dtype": "F32", "shape": [9223372036854775807, 9223372036854775807], "data_offsets": [0, 0]}}'
    ),
    "a tensor without values": header(
        b'{"x": {"dtype": "F32", "shape": [0, 9223372036854775807], "data_offsets": [0, 0]}}'
    ),
    "metadata of other types": header(b'{"__metadata__": {"sha256": 3}}'),
}


@pytest.mark.parametrize("what", CRAFTED)
def test_a_crafted_header_is_refused_by_name(tmp_path: Path, what: str) -> None:
    (tmp_path / "a.safetensors").write_bytes(CRAFTED[what])
    with pytest.raises(CorruptedStoreError, match=r"a\.safetensors is (truncated or )?damaged"):
        read_tensors(tmp_path / "a.safetensors")


def test_files_have_the_rights_that_the_umask_gives(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a", b"text")
    write_tensors(tmp_path / "b", {"x": torch.ones(2)})
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_a_file_that_cannot_be_opened_is_not_said_to_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tensors(tmp_path / "a", {"x": torch.ones(2)})

    def refused(*args: Any, **kwargs: Any) -> Any:  # as safetensors does where a file may not be read
        raise FileNotFoundError("No such file or directory")

    monkeypatch.setattr(files, "safe_open", refused)
    with pytest.raises(CorruptedStoreError, match=r"a cannot be opened\. See to its permissions"):
        read_tensors(tmp_path / "a")
