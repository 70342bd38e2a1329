"""Names and places: what leads out of a directory, or is no file, is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lightning_attr.errors import CorruptedStoreError
from lightning_attr.files.paths import check_key, check_regular, inside, is_there, names_in, read_regular, regular_files


@pytest.mark.parametrize("key", ["epoch=0003-step=000092", "start", "run0/run12/epoch=0", "a.b", "x" * 100, "_"])
def test_names_of_snapshots(key: str) -> None:
    assert check_key(key) == key


@pytest.mark.parametrize(
    "key",
    [
        *(
            "",
            "/",
            "a/",
            "/a",
            "a//b",
            "..",
            "a/../b",
            ".",
            ".hidden",
            "a b",
            "a\\b",
            "a:b",
            "a\n",
            "a\0",
            "é",
            "x" * 101,
        ),
        *("con", "NUL.txt", "a/COM1", "end.", "/".join("abcdefghijk"), None, 3, ["a"]),
    ],
)
def test_what_is_no_name(key: object) -> None:
    with pytest.raises(ValueError, match="Expected the name of a snapshot to be letters, digits and"):
        check_key(key)


def test_a_directory_may_be_reached_by_a_link_but_nothing_in_it_leads_out(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "own", outside):
        folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(root)
    (root / "within").symlink_to(root / "own")
    (root / "out").symlink_to(outside)
    (root / "gone").symlink_to(tmp_path / "nowhere")
    (root / "loop").symlink_to(root / "loop")
    for top in (root, tmp_path / "link"):
        for parts in (("own", "file"), ("own/deep/file",), ("within", "file"), ()):
            assert inside(top, *parts) == top.joinpath(*parts)
        for parts in (
            ("out", "file"),
            ("..", "outside"),
            ("gone",),
            (str(outside),),
            ("within", "..", "..", "outside"),
        ):
            with pytest.raises(
                CorruptedStoreError, match=r"leads out of its directory, to .*\. Put the files themselves"
            ):
                inside(top, *parts)
        with pytest.raises(CorruptedStoreError, match="leads to itself, by a link"):
            inside(top, "loop", "file")
    neighbour = tmp_path / "root-2"  # begins with the same letters
    neighbour.mkdir()
    with pytest.raises(CorruptedStoreError, match="leads out"):
        inside(root, "..", "root-2")


def test_only_regular_files_of_a_sensible_size_are_read(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"12345")
    os.mkfifo(tmp_path / "pipe")
    assert read_regular(file, 5) == b"12345"
    assert check_regular(file) == 5
    with pytest.raises(ValueError, match="it has 5 bytes, where 4 are the most"):
        read_regular(file, 4)
    for other in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ValueError, match="it is no regular file"):
            read_regular(other, 5)


@pytest.mark.parametrize("kind", ["link", "linked folder", "pipe"])
def test_a_folder_with_anything_but_files_is_not_listed(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a" / "deep").mkdir(parents=True)
    (tmp_path / "a" / "deep" / "file").touch()
    assert regular_files(tmp_path, "a") == [tmp_path / "a" / "deep" / "file"]
    assert regular_files(tmp_path, "none") == []
    place = tmp_path / "a" / "deep" / "other"
    if kind == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to(tmp_path if kind == "linked folder" else tmp_path / "a" / "deep" / "file")
    with pytest.raises(CorruptedStoreError, match="other is a link or no regular file, which is not copied"):
        regular_files(tmp_path, "a")


def test_what_is_there_is_told_from_what_can_not_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    assert is_there(tmp_path / "file")
    assert not any(map(is_there, (tmp_path / "none", tmp_path / "file" / "below", tmp_path / "gone")))
    assert names_in(tmp_path) == ["file", "gone"]
    assert names_in(tmp_path / "none") == []
    with pytest.raises(CorruptedStoreError, match=r"file cannot be listed: .*See that it is a folder"):
        names_in(tmp_path / "file")

    def denied(self: Path) -> None:
        raise PermissionError(f"denied: {self}")

    for name in ("stat", "iterdir"):  # permissions do not bind root
        monkeypatch.setattr(Path, name, denied)
    with pytest.raises(CorruptedStoreError, match=r"file cannot be looked at: denied.*See to the permissions"):
        is_there(tmp_path / "file")
    with pytest.raises(CorruptedStoreError, match="cannot be listed: denied"):
        names_in(tmp_path)
