"""The table of texts."""

from __future__ import annotations

import pytest

from lightning_attr.results.text_table import text_table

ROWS = [
    ("#1", "A target\n  of two lines", [(12.0, "#10: “3”", "short"), (-0.00123, "#2", "word " * 40)]),
    ("#200", "x" * 300, [(1e-7, "#3", "")]),
]


def test_columns_are_aligned_and_lines_cut() -> None:
    lines = text_table(ROWS, width=60).splitlines()
    assert lines[0] == "target #1  A target of two lines"
    assert lines[1] == "      +12.0   #10: “3”  short"
    assert lines[2].startswith("   -0.00123   #2        word word")
    assert lines[2].endswith("…")
    assert not lines[3]
    assert lines[4] == "target #200  " + "x" * 46 + "…"
    assert lines[5] == "  +1.00e-07   #3"
    assert max(map(len, lines)) == 60


def test_a_text_that_fits_is_whole() -> None:
    assert text_table([("#1", "x" * 49, [])], width=60).endswith("x" * 49)
    assert text_table([("#1", "x" * 50, [])], width=60).endswith("x" * 48 + "…")


def test_no_rows() -> None:
    assert text_table([]) == ""


def test_room_for_texts() -> None:
    with pytest.raises(ValueError, match="`width` to be at least 32 characters, but got 31"):
        text_table(ROWS, width=31)
    text_table(ROWS, width=32)
