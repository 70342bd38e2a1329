"""Texts with their tokens marked, in a terminal and in a browser."""

from __future__ import annotations

import io
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from lightning_attr.report.highlights import HighlightedText, TextHighlights

TARGET = HighlightedText(["It", " pours"], [0.0, 2.0], caption="target #0")
PROPONENT = HighlightedText(["It", " rains", " a", " lot"], [0.1, 1.0, -0.3, -0.9], caption="#7", score=2.5)
COLOR = re.compile(r"\033\[30;48;5;(\d+)m(.*?)\033\[0m")


class Page(HTMLParser):
    """Text, tags and styles of a page, as a browser reads them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.open, self.spans = "", [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag != "meta":
            self.open.append(tag)
        if tag == "span":
            self.spans.append([dict(attributes), ""])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "span":
            self.spans[-1][1] += data
        if self.open and self.open[-1] != "style":
            self.text += data


def of(*tokens: str, contributions: list[float] | None = None) -> TextHighlights:
    text = HighlightedText(tokens, contributions or [1.0] * len(tokens))
    return TextHighlights([(text, [])])


def test_strong_tokens_have_stronger_colours_and_weak_ones_none() -> None:
    lines = TextHighlights([(TARGET, [PROPONENT])]).render(color=True).splitlines()
    assert [COLOR.sub(r"\2", line) for line in lines] == [
        "target #0",
        "    It pours",
        "  +2.50  #7",
        "      It rains a lot",
    ]
    assert COLOR.findall(lines[1]) == [("75", " pours")]
    assert COLOR.findall(lines[3]) == [("75", " rains"), ("223", " a"), ("208", " lot")]
    assert COLOR.sub("", lines[3]) == "      It"


def test_brackets_take_the_place_of_colours() -> None:
    found = TextHighlights([(TARGET, [PROPONENT]), (TARGET, [])]).render(color=False)
    assert found == "target #0\n    It[ pours]\n  +2.50  #7\n      It[ rains] a[ lot]\n\ntarget #0\n    It[ pours]"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("no_color", "colored"), [(None, True), ("", True), ("1", False)])
def test_a_terminal_has_colours_unless_its_owner_wants_none(
    no_color: str | None, colored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color is not None:
        monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert ("\033" in str(of("word"))) == colored
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert str(of("word")) == "    [word]"


def test_lines_are_broken_between_tokens() -> None:
    highlights = TextHighlights([(HighlightedText([" word"] * 7, [1.0] * 7), [])], width=20)
    for color in (True, False):
        lines = [COLOR.sub(r"\2", line) for line in highlights.render(color).splitlines()]
        assert "".join(line[4:] for line in lines).count("word") == 7
        assert all(len(line) <= 20 for line in lines)
        assert len(lines) == (3 if color else 4)
    assert TextHighlights([(HighlightedText(["x" * 50], [1.0]), [])], width=20).render(color=False).count("\n") == 0


def test_wide_characters_take_two_columns_and_accents_none() -> None:
    wide = TextHighlights([(HighlightedText(["京都"] * 8, [0.0] * 8), [])], width=20)
    assert wide.render(color=True).splitlines() == ["    " + "京都" * 4] * 2
    accents = TextHighlights([(HighlightedText(["e\u0301"] * 16, [0.0] * 16), [])], width=20)
    assert accents.render(color=True) == "    " + "e\u0301" * 16


@pytest.mark.parametrize("contributions", [[0.0, 0.0], [5e-324, -5e-324], [1.7e308, -1.7e308]])
def test_shares_are_of_the_largest_contribution(contributions: list[float]) -> None:
    text = HighlightedText(["a", "b"], contributions)
    assert text.shares == ([1.0, -1.0] if any(contributions) else [0.0, 0.0])


def test_nothing_is_marked_where_all_contributions_are_zero() -> None:
    highlights = of("a", "b", contributions=[0.0, 0.0])
    assert highlights.render(color=True) == highlights.render(color=False) == "    ab"
    assert "background:rgba" not in highlights.html()


def test_nothing_to_show() -> None:
    assert TextHighlights([]).render(color=True) == ""
    empty = TextHighlights([(HighlightedText([], [], caption="target #0"), [HighlightedText([], [])])])
    assert empty.render(color=False) == "target #0"
    assert Page(empty.html()).text.split() == ["Proponents", "target", "#0"]


def test_the_page_says_what_the_terminal_says() -> None:
    page = Page(TextHighlights([(TARGET, [PROPONENT])]).html("Why?"))
    assert page.text.split() == ["Why?", "target", "#0It", "pours", "+2.50", "#7It", "rains", "a", "lot"]
    styles = [(attributes.get("style"), attributes["title"]) for attributes, _ in page.spans]
    assert styles == [
        (None, "+0"),
        ("background:rgba(0,114,178,0.60)", "+2"),
        (None, "+0.1"),
        ("background:rgba(0,114,178,0.60)", "+1"),
        ("background:rgba(213,94,0,0.18)", "-0.3"),
        ("background:rgba(213,94,0,0.54)", "-0.9"),
    ]


NASTY = ["<script>alert(1)</script>", "\"' onmouseover='x", "&lt;", "</span></p>", "\u202eevil", "\x1b[2J", "\ud800"]


@pytest.mark.parametrize("token", NASTY)
def test_tokens_are_text_and_nothing_else(token: str, tmp_path: Path) -> None:
    shown = "".join(character if character.isprintable() else " " for character in token)
    text = HighlightedText([token], [1.0], caption=token)
    highlights = TextHighlights([(text, [text])])
    highlights.save(tmp_path / "page.html", title=token)
    page = Page((tmp_path / "page.html").read_text("utf-8"))
    assert [found for _, found in page.spans] == [shown, shown]
    assert all(set(attributes) == {"title", "style"} for attributes, _ in page.spans)
    assert page.text.count(shown) == 5
    assert "\x1b[2J" not in highlights.render(color=True)
    assert all(character.isprintable() for character in highlights.render(color=False).replace("\n", ""))


def test_the_page_needs_no_other_file() -> None:
    page = of("word").html()
    assert not re.search(r"https?:|src=|href=|@import|url\(", page)
    assert '<meta charset="utf-8">' in page
    assert of("word")._repr_html_() in page


def test_contributions_may_be_a_tensor() -> None:
    text = HighlightedText(["a", "b"], torch.tensor([0.5, -1.0]))
    assert text.shares == [0.5, -1.0]
    assert 'title="+0.5"' in TextHighlights([(text, [])]).html()


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_contributions_are_finite_numbers_one_a_token(wrong: float) -> None:
    with pytest.raises(ValueError, match=r"`contributions` to be finite, but number 1 is (nan|inf)"):
        HighlightedText(["a", "b"], [0.0, wrong])
    with pytest.raises(ValueError, match="one number for each of the 2 tokens, but got 3"):
        HighlightedText(["a", "b"], [0.0] * 3)


def test_room_for_tokens() -> None:
    with pytest.raises(ValueError, match="`width` to be at least 20 columns, but got 19"):
        TextHighlights([], width=19)
