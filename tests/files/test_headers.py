"""The header of a tensor file: what a reader has checked once is checked again where anything differs."""

from __future__ import annotations

import pytest

from lightning_attr.errors import CorruptedStoreError
from lightning_attr.files.headers import check_header, header_of


def test_a_header_read_again_is_checked_against_every_place() -> None:
    header, place = header_of({"kind": "weights", "store": "a"}, "ab"), {"kind": "weights", "store": "a"}
    assert check_header(header, place) == check_header(header, place) == {**place, "sha256": "ab"}
    for name, other in (("store", "b"), ("kind", "features")):
        with pytest.raises(CorruptedStoreError, match=f"it is of {name} {place[name]}, not {other}"):
            check_header(header, {**place, name: other})


def test_a_header_that_changed_after_it_was_read_is_found() -> None:
    header = header_of({"kind": "weights", "store": "a"}, "ab")
    check_header(header, {})
    for old, new in (('"a"', '"b"'), ("weights", "weightz"), ('"ab"', '"cd"'), ("store", "stora")):
        changed = {name: entry.replace(old, new) for name, entry in header.items()}
        assert changed != header
        with pytest.raises(CorruptedStoreError, match="its header does not match its checksum"):
            check_header(changed, {})


def test_what_was_read_can_not_be_changed_for_the_next_reader() -> None:
    header = header_of({"store": "a"}, "ab")
    with pytest.raises(TypeError):
        check_header(header, {})["store"] = "b"  # type: ignore[index]
    assert check_header(header, {"store": "a"})["store"] == "a"
