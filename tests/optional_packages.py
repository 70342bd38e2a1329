"""Which packages a test may do without: where one is not installed, what needs it is skipped and says so."""

from __future__ import annotations

import importlib.util
import traceback
from collections.abc import Iterator
from pathlib import Path

import lightning_attr
import lightning_attr.callbacks
from lightning_attr.errors import MissingDependencyError

# By the names they are imported under: what the extras of pyproject.toml bring, and what some tests use beyond these.
OPTIONAL = frozenset({
    "captum",
    "dattri",
    "diffusers",
    "docstring_parser",
    "fast_jl",
    "jsonargparse",
    "matplotlib",
    "pandas",
    "peft",
    "rich",
    "scipy",
    "sklearn",
    "tensorboard",
    "transformers",
})
_OURS = tuple(Path(package.__path__[0]) for package in (lightning_attr, lightning_attr.callbacks))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it came from, the first cause last."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _imported_by_us(error: BaseException) -> bool:
    """Whether the import that failed is one of the package's own."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and any(Path(frames[-1].filename).is_relative_to(folder) for folder in _OURS)


def missing_package(error: BaseException) -> str | None:
    """The optional package that is not installed, where the error comes from that; the package's own must name it."""
    chain = list(_chain(error))
    named = any(isinstance(link, MissingDependencyError) for link in chain)
    for link in chain:
        package = (link.name or "").split(".")[0] if isinstance(link, ModuleNotFoundError) else ""
        if package in OPTIONAL and importlib.util.find_spec(package) is None:
            return package if named or not _imported_by_us(link) else None
    return None
