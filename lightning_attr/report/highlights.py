"""Texts with the tokens marked that their scores come from, for a terminal and for a browser."""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import isfinite
from pathlib import Path

from torch import Tensor

from lightning_attr.arguments.checks import check_float, check_instance, check_int, check_numbers
from lightning_attr.arguments.listed import check_words

STEPS = 4  # strengths of colour; with more, neighbours look the same
STRONG = 0.5  # of the largest contribution; what is marked where there is no colour
BACKGROUNDS = {1: (195, 153, 111, 75), -1: (223, 216, 209, 208)}  # of the 256 colours: blues and oranges
RGB = {1: "0,114,178", -1: "213,94,0"}  # blue and vermilion, which colour-blind readers tell apart

_STYLE = """\
body { font: 16px/1.7 system-ui, sans-serif; color: #111; background: #fff; max-width: 60rem; margin: 2rem auto; }
section { margin: 0 0 2rem; } p { margin: 0.2rem 0 0.2rem 1rem; } p.target { margin-left: 0; font-weight: 600; }
span { white-space: pre-wrap; border-radius: 3px; } b { font: 13px monospace; color: #444; margin-right: 0.8em; }"""


@dataclass(frozen=True)
class HighlightedText:
    """A text in tokens, and what each of them contributes.

    Args:
        tokens: strings; they are shown as they come, so that those of a tokenizer have their blanks.
        contributions: ``(tokens,)``, finite, any unit; positive is for the target, negative against it.
        caption: shown before the text, "#12" for instance.
        score: of the text, if it has one.

    Raises:
        TypeError: if an argument is of another kind.
        ValueError: if there are not as many contributions as tokens, or one is NaN or infinite.

    Example:
        >>> HighlightedText(["He", " was", " born"], [0.0, 0.5, -2.0]).shares
        [0.0, 0.25, -1.0]
    """

    tokens: Sequence[str]
    contributions: Sequence[float] | Tensor
    caption: str = ""
    score: float | None = None

    def __post_init__(self) -> None:
        check_words(self, "tokens", self.tokens, "a list of strings")
        check_instance(self, "caption", self.caption, str, "a text")
        if self.score is not None:
            check_float(self, "score", self.score, also="None")
        check_numbers(self, "contributions", self.contributions, "one number for each token")
        if len(self.tokens) != len(self.contributions):
            raise ValueError(
                f"Expected argument `contributions` to have one number for each of the {len(self.tokens)} tokens, but "
                f"got {len(self.contributions)}."
            )
        wrong = [i for i, value in enumerate(self.contributions) if not isfinite(value)]
        if wrong:
            raise ValueError(
                f"Expected argument `contributions` to be finite, but number {wrong[0]} is "
                f"{float(self.contributions[wrong[0]])}."
            )

    @property
    def shares(self) -> list[float]:
        """Contributions over the largest of this text, from -1 to 1; zeros if all are zero."""
        values = [float(value) for value in self.contributions]
        largest = max(map(abs, values), default=0.0)
        return [value / largest if largest else 0.0 for value in values]

    def html(self) -> str:
        """Write the tokens for a browser.

        Returns:
            HTML: a ``<span>`` a token, coloured by its share, with its contribution as tooltip; tokens are text in it.
        """
        return "".join(map(_span, self.tokens, self.contributions, self.shares))

    @property
    def heading(self) -> str:
        """Score and caption."""
        score = [] if self.score is None else [f"{self.score:+#.3g}"]
        return "  ".join([*score, *([self.caption] if self.caption else [])])


@dataclass(frozen=True)
class TextHighlights:
    """Targets with their proponents and opponents, in each of them the tokens marked that count.

    Blue tokens speak for the target, orange ones against it, the more saturated the stronger, on a scale of each text's
    own. ``print`` gives colours if the output is a terminal and the environment variable ``NO_COLOR`` is not set; else
    tokens of at least half of the largest contribution stand in brackets. Notebooks show the HTML.

    Args:
        blocks: a target each, with its proponents and opponents in the order in which they are to be shown.
        width: columns per line in the terminal.

    Raises:
        ValueError: if the width is below 20.

    Example:
        >>> target = HighlightedText(["It", " pours"], [0.0, 1.0], caption="target #0")
        >>> proponent = HighlightedText(["It", " rains", " cats"], [0.1, 0.9, -0.6], caption="#7", score=2.5)
        >>> highlights = TextHighlights([(target, [proponent])])
        >>> print(highlights.render(color=False))
        target #0
            It[ pours]
          +2.50  #7
              It[ rains][ cats]
        >>> '<span title="+0.9" style="background:rgba(0,114,178,0.60)"> rains</span>' in highlights.html()
        True
    """

    blocks: Sequence[tuple[HighlightedText, Sequence[HighlightedText]]]
    width: int = 100

    def __post_init__(self) -> None:
        if check_int(self, "width", self.width) < 20:
            raise ValueError(f"Expected argument `width` to be at least 20 columns, but got {self.width}.")

    def render(self, color: bool) -> str:
        """Write all texts for a terminal.

        Args:
            color: whether with ANSI colours, else with brackets.

        Returns:
            Lines of at most ``width`` columns, unless a token is wider; an empty line between targets.
        """
        blocks = []
        for target, texts in self.blocks:
            lines = _lines(target, "", self.width, color)
            for text in texts:
                lines += _lines(text, "  ", self.width, color)
            blocks.append("\n".join(lines))
        return "\n\n".join(blocks)

    def __str__(self) -> str:
        return self.render(color=sys.stdout.isatty() and not os.environ.get("NO_COLOR"))

    def html(self, title: str = "Proponents") -> str:
        """Write a page that needs no other file.

        Args:
            title: of the page.

        Returns:
            HTML; whatever captions and tokens hold is text in it, and the number behind each token its tooltip.
        """
        return (
            f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{_escaped(title)}</title>\n'
            f"<style>\n{_STYLE}\n</style></head>\n<body>\n{self._sections()}\n</body></html>\n"
        )

    def save(self, path: str | Path, title: str = "Proponents") -> None:
        """Write :meth:`html` to a file.

        Args:
            path: the file; it is replaced.
            title: of the page.
        """
        Path(path).write_text(self.html(title), "utf-8")

    def _repr_html_(self) -> str:
        return self._sections()

    def _sections(self) -> str:
        sections = []
        for target, texts in self.blocks:
            lines = [_paragraph(target, ' class="target"'), *(_paragraph(text, "") for text in texts)]
            sections.append("\n".join(["<section>", *lines, "</section>"]))
        return "\n".join(sections)


def _lines(text: HighlightedText, indent: str, width: int, color: bool) -> list[str]:
    """The heading, and the tokens below it, broken between tokens."""
    inner = indent + "    "
    lines = [indent + _printable(text.heading)] if text.heading else []
    line, used = "", len(inner)
    for token, share in zip(text.tokens, text.shares, strict=True):
        shown = _printable(token)
        marked = _colored(shown, share) if color else f"[{shown}]" if abs(share) >= STRONG else shown
        columns = _columns(shown if color else marked)
        if line and used + columns > width:
            lines.append(inner + line)
            line, used = "", len(inner)
        line, used = line + marked, used + columns
    return [*lines, inner + line] if line else lines


def _colored(token: str, share: float) -> str:
    step = _step(share)
    if not step:
        return token
    background = BACKGROUNDS[1 if share > 0 else -1][step - 1]
    return f"\033[30;48;5;{background}m{token}\033[0m"


def _step(share: float) -> int:
    """0 for next to nothing, else 1 to STEPS."""
    return min(STEPS, int(abs(share) * (STEPS + 1)))


def _paragraph(text: HighlightedText, attributes: str) -> str:
    heading = f"<b>{_escaped(text.heading)}</b>" if text.heading else ""
    return f"<p{attributes}>{heading}{text.html()}</p>"


def _span(token: str, contribution: float, share: float) -> str:
    # Black text stays readable on 60 % of either colour.
    style = f' style="background:rgba({RGB[1 if share > 0 else -1]},{0.6 * abs(share):.2f})"' if _step(share) else ""
    return f'<span title="{float(contribution):+.3g}"{style}>{_escaped(token)}</span>'


def _escaped(text: str) -> str:
    return escape(_printable(text), quote=True)


def _printable(text: str) -> str:
    """Without line breaks, and without what would control a terminal."""
    return "".join(character if character.isprintable() else " " for character in text)


def _columns(text: str) -> int:
    """Columns that a text takes in a terminal: wide characters take two, combining ones none."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(bool(unicodedata.combining(character)) for character in text)
