"""Runs every docstring's example, and asks one of every public name.

`pytest --doctest-modules callbacks` would import the files of `callbacks/` a second time, under a second name.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
from types import ModuleType

import pytest

import lightning_attr
import lightning_attr.callbacks

# What users import from: each name in the `__all__` of these needs an example.
PUBLIC = {
    "lightning_attr",
    "lightning_attr.callbacks",
    "lightning_attr.evaluation",
    "lightning_attr.func",
    "lightning_attr.gradients",
    "lightning_attr.interop",
    "lightning_attr.methods",
    "lightning_attr.methods.solvers",
    "lightning_attr.metrics",
    "lightning_attr.modalities",
    "lightning_attr.outputs",
    "lightning_attr.projectors",
    "lightning_attr.randomness",
    "lightning_attr.results",
    "lightning_attr.store",
    "lightning_attr.testing",
}
OPTIONAL = {"fast_jl"}  # a module that needs one of these is skipped where it is not installed
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class Finder(doctest.DocTestFinder):
    """Finds the examples of decorated functions too; doctest passes them by, for they carry the decorator's globals."""

    def _from_module(self, module: ModuleType | None, object: object) -> bool:
        return super()._from_module(module, inspect.unwrap(object) if callable(object) else object)


def module_names() -> list[str]:
    """All modules of both packages; an editable install finds `callbacks` only under its own path."""
    names = set()
    for package in (lightning_attr, lightning_attr.callbacks):
        prefix = f"{package.__name__}."
        names |= {package.__name__, *(found.name for found in pkgutil.walk_packages(package.__path__, prefix))}
    return sorted(names)


def load(name: str) -> ModuleType:
    """Imports a module, or skips the test when only an optional dependency is missing."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name in OPTIONAL:
            pytest.skip(f"needs {error.name}")
        raise


def public_names() -> list[tuple[str, str]]:
    """Each class and function in the `__all__` of the `PUBLIC` modules that exist, once, as (module, name)."""
    found: dict[object, tuple[str, str]] = {}
    for module in map(importlib.import_module, sorted(PUBLIC.intersection(module_names()))):
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name, f"{module.__name__}.{name}")  # `missing_example` reports it if it is missing
            if not hasattr(module, name) or inspect.isclass(value) or inspect.isroutine(value):
                found.setdefault(value, (module.__name__, name))
    return list(found.values())


def failed_examples(module: ModuleType) -> str:
    """Runs the examples of a module, and returns the report of those that failed."""
    runner = doctest.DocTestRunner(optionflags=OPTIONS, verbose=False)
    report: list[str] = []
    for test in Finder().find(module):
        runner.run(test, out=report.append)
    return "".join(report)


def missing_example(module: ModuleType, name: str) -> str | None:
    """What the docstring of a public name lacks, if anything; an exception needs no example."""
    value = getattr(module, name, None)
    if value is None:
        return f"{module.__name__}.__all__ names `{name}`, which the module does not have"
    docstring = value.__doc__ or ""
    if not docstring.strip():
        return f"{module.__name__}.{name} has no docstring"
    is_exception = inspect.isclass(value) and issubclass(value, BaseException)
    if not is_exception and not doctest.DocTestParser().get_examples(docstring):
        return f"{module.__name__}.{name} has a docstring without an example (`>>>`)"
    return None


@pytest.mark.parametrize("name", module_names())
def test_examples_run(name: str) -> None:
    report = failed_examples(load(name))
    assert not report, report


@pytest.mark.parametrize(("module", "name"), public_names())
def test_public_names_have_an_example(module: str, name: str) -> None:
    problem = missing_example(importlib.import_module(module), name)
    assert problem is None, problem


def test_the_walk_reaches_both_packages() -> None:
    assert {"lightning_attr", "lightning_attr.callbacks", "lightning_attr.methods"} <= set(module_names())


def planted_doctest() -> ModuleType:
    """A module with a wrong example under a decorator, and names in `__all__` that lack something."""
    module = ModuleType("planted_doctest")
    source = '''
import torch
__all__ = ["wrong", "silent", "told", "Shown", "Failure", "gone"]

@torch.no_grad()
def wrong():
    """Counts.

    >>> 1 + 1
    3
    """

def silent(): pass

def told():
    """Has no example."""

class Shown:
    """Counts.

    >>> 1 + 1
    2
    """

class Failure(Exception):
    """Is raised."""
'''
    exec(source, vars(module))
    return module


def test_a_wrong_example_is_found_under_a_decorator() -> None:
    report = failed_examples(planted_doctest())
    assert "planted_doctest.wrong" in report
    assert "Expected:\n    3\nGot:\n    2" in report
    assert "Shown" not in report


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("wrong", None),
        ("silent", "planted_doctest.silent has no docstring"),
        ("told", "planted_doctest.told has a docstring without an example (`>>>`)"),
        ("Shown", None),
        ("Failure", None),
        ("gone", "planted_doctest.__all__ names `gone`, which the module does not have"),
    ],
)
def test_a_missing_example_is_found(name: str, problem: str | None) -> None:
    assert missing_example(planted_doctest(), name) == problem
