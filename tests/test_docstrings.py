"""What a docstring owes: to users each argument, result and error; elsewhere what and why in a few lines."""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docstring_parser
import pytest

import lightning_attr

ROOT = Path(lightning_attr.__file__).parent
LONGEST = 12
"""Lines of an internal function's docstring, without its example."""


def modules() -> Iterator[tuple[str, Path]]:
    """Every module by name, and its file."""
    for file in sorted(ROOT.rglob("*.py")):
        parts = ("lightning_attr", *file.relative_to(ROOT).with_suffix("").parts)
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), file


def faces() -> Iterator[Any]:
    """What the packages and the modules of the root export."""
    for name, file in modules():
        if file.name == "__init__.py" or file.parent == ROOT:
            module = importlib.import_module(name)
            yield from (getattr(module, exported) for exported in getattr(module, "__all__", []))


def ours(thing: Any) -> bool:
    return str(getattr(thing, "__module__", "")).startswith("lightning_attr")


def met() -> dict[str, tuple[Callable[..., Any], bool]]:
    """Functions and methods that users call, inherited ones among them, by name; and whether each is a property."""
    found = {}
    for face in faces():
        if inspect.isclass(face):
            for base in filter(ours, face.__mro__):
                for name, member in vars(base).items():
                    function = getattr(member, "__func__", getattr(member, "fget", member))
                    if not name.startswith("_") and inspect.isfunction(function) and ours(function):
                        found[f"{function.__module__}.{function.__qualname__}"] = function, isinstance(member, property)
        elif inspect.isfunction(face) and ours(face):
            found[f"{face.__module__}.{face.__qualname__}"] = face, False
    return found


MET = met()


def owed(function: Callable[..., Any], is_property: bool) -> Iterator[str]:
    """What the docstring of a function leaves out."""
    text = inspect.getdoc(function) or ""
    documented = docstring_parser.parse(text, docstring_parser.DocstringStyle.GOOGLE)
    if not (documented.params or documented.many_returns or documented.raises):
        return  # a line says it all, for a property or an override of what is documented
    named = {name.strip("* ") for param in documented.params for name in param.arg_name.split(",")}
    signature = inspect.signature(function)
    yield from (f"argument {name}" for name in signature.parameters if name not in {"self", "cls", *named})
    said = is_property or text.startswith("Return ") or documented.returns
    if not said and str(signature.return_annotation) not in {"None", "NoReturn", "Never"}:
        yield "what it returns"
    body = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    raised = {name for child in ast.iter_child_nodes(body) for name in errors(child)}
    yield from (f"error {name}" for name in raised - {str(error.type_name) for error in documented.raises})


def errors(node: ast.AST) -> Iterator[str]:
    """The classes that a statement raises, where they are written there; what a function in it raises is its own."""
    match node:
        case ast.FunctionDef():
            return
        case ast.Raise(exc=ast.Call(func=ast.Name(id=name))) if name.endswith("Error"):
            yield name
    for child in ast.iter_child_nodes(node):
        yield from errors(child)


@pytest.mark.parametrize("name", sorted(MET))
def test_what_users_call_is_documented(name: str) -> None:
    assert list(owed(*MET[name])) == []


def test_many_functions_are_met() -> None:
    assert len(MET) > 150


def internals(node: ast.AST, path: str, public: set[str]) -> Iterator[tuple[str, str]]:
    """Docstrings of functions that users do not meet."""
    for child in ast.iter_child_nodes(node):
        name = f"{path}.{getattr(child, 'name', '')}".rstrip(".")
        if isinstance(child, ast.FunctionDef) and name not in public:
            yield name, ast.get_docstring(child) or ""
        yield from internals(child, name, public)


@pytest.mark.parametrize(("name", "file"), list(modules()), ids=str)
def test_internal_docstrings_are_short(name: str, file: Path) -> None:
    for path, text in internals(ast.parse(file.read_text()), name, set(MET)):
        words, _, _ = text.partition("Example:\n")
        assert "Args:\n" not in words, f"{path}: arguments of an internal function speak by their names and types"
        assert words.count("\n") < LONGEST, f"{path}: what and why, in a few lines"
