"""Sphinx builds the site of these guides and of the docstrings: `make docs`, into build/docs/."""

from __future__ import annotations

import os
import re
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import latex2mathml.converter
from docutils.nodes import SkipNode
from sphinx.util.logging import getLogger

project = "lightning_attr"
author = "The lightning_attr authors"
copyright = author
version = release = installed("lightning_attr")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
html_theme = "furo"
html_math_renderer = "mathml"  # which browsers show by themselves, without a network
html_title = f"lightning_attr {version}"
myst_heading_anchors = 3
autodoc_default_options = {"members": True, "show-inheritance": True, "member-order": "bysource"}
autodoc_typehints = "description"  # signatures with all types take several lines
autodoc_typehints_description_target = "documented"
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_ivar = True  # else attributes appear twice, with their type and from the docstring
linkcheck_ignore = [r"https?://"]  # what is here is checked; the network is not there everywhere

GUIDES = Path(__file__).resolve().parent
REPOSITORY = GUIDES.parents[1]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "LICENSE": None,
    "examples/README.md": "examples.md",
    "examples/one_run.md": "one_run.md",
    "examples/benchmarks/README.md": "benchmarks.md",
    "tests/benchmarks/RESULTS.md": "results.md",
    ".github/CONTRIBUTING.md": "contributing.md",
}
"""Files outside this folder -> the pages that include them; None where a link to one becomes text."""


def site_links(text: str, file: Path) -> str:
    """Let the links of a file lead to pages of the site; those to files that are none become text."""

    def led(match: re.Match[str]) -> str:
        label, target, anchor = match[1], match[2], match[3] or ""
        place = (file.parent / target).resolve()
        known = place.relative_to(REPOSITORY).as_posix() if place.is_relative_to(REPOSITORY) else ""
        page = PAGES.get(known, os.path.relpath(place, GUIDES) if place.exists() else target)
        inside = page is not None and (place.is_relative_to(GUIDES) or known in PAGES or label.startswith("!"))
        return f"{label}({page}{anchor})" if inside else label[1:-1]

    return re.sub(r"(!?\[[^\]]*\])\((?!https?:|#)([^)#\s]+)(#[^)]*)?\)", led, text)


def read(app: Any, page: str, source: list[str]) -> None:
    """Put included files in, and set the links of a page right."""
    file = GUIDES / f"{page}.md"

    def included(match: re.Match[str]) -> str:
        other = (file.parent / match[1]).resolve()
        return site_links(other.read_text("utf-8"), other)

    if file.parent == GUIDES:
        text = re.sub(r"```\{include\} (\S+)\n```\n", included, source[0])
        source[0] = text if text != source[0] else site_links(text, file)


def mathml(formula: str, display: str) -> str:
    """Turn TeX into what browsers show; a command that is not known is an error of the build."""
    found: str = latex2mathml.converter.convert(formula.replace(r"\arg", r"\operatorname{arg}"), display=display)
    if "<mi>\\" in found:
        getLogger(__name__).warning("latex2mathml does not know a command in %s", formula)
    return found


def inline_formula(translator: Any, node: Any) -> None:
    """Write a formula in a line."""
    translator.body.append(mathml(node.astext(), "inline"))
    raise SkipNode


def formula(translator: Any, node: Any) -> None:
    """Write a formula on lines of its own."""
    parts = node.astext().split("\n\n")
    translator.body.append("".join(mathml(part, "block") for part in parts if part.strip()))
    raise SkipNode


def skipped(app: Any, what: str, name: str, value: Any, skip: bool, options: Any) -> bool | None:
    """Leave out what is Lightning's own."""
    return True if str(getattr(value, "__module__", "")).startswith("lightning.") else None


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-skip-member", skipped)
    app.add_html_math_renderer("mathml", (inline_formula, None), (formula, None))
    app.connect("source-read", read)
