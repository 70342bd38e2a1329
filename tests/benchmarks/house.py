"""How the package is laid out, in figures: modules, imports between rooms, circles, lines, names, classes.

Run: python tests/benchmarks/house.py     (a few seconds; nothing of the package is imported)
"""

from __future__ import annotations

import ast
import importlib.util
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOMES = (("", ROOT / "lightning_attr"), ("callbacks.", ROOT / "callbacks"))
FACES = {"__init__", "__main__"}


def sources() -> dict[str, ast.Module]:
    """Every module of the package by its name below `lightning_attr`, parsed; a face ends in `__init__`."""
    files = ((prefix, home, file) for prefix, home in HOMES for file in sorted(home.rglob("*.py")))
    return {
        prefix + ".".join(file.relative_to(home).with_suffix("").parts): ast.parse(file.read_text("utf-8"))
        for prefix, home, file in files
    }


def room_of(module: str) -> str:
    return module.split(".")[0]


def imports(trees: Mapping[str, ast.Module]) -> dict[str, set[str]]:
    """The modules of the package that each of them imports, also for types and inside functions."""

    def module(name: str) -> str | None:
        return name if name in trees else f"{name}.__init__".strip(".") if f"{name}.__init__" in trees else None

    found: dict[str, set[str]] = {}
    for importer, tree in trees.items():
        names: set[str | None] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lightning_attr":
                origin = (node.module or "").partition(".")[2]
                names |= {module(f"{origin}.{alias.name}".strip(".")) or module(origin) for alias in node.names}
        found[importer] = {name for name in names if name is not None} - {importer}
    return found


def circles(edges: Mapping[str, Iterable[str]]) -> int:
    """How many sets of names reach each other in a circle."""
    reached: dict[str, set[str]] = {}
    for start in edges:
        seen: set[str] = set()
        ahead = list(edges[start])
        while ahead:
            if (name := ahead.pop()) not in seen:
                seen.add(name)
                ahead += edges.get(name, ())
        reached[start] = seen
    together = (frozenset(b for b in seen if a in reached.get(b, ())) for a, seen in reached.items() if a in seen)
    return len(set(together))


def lines(trees: Mapping[str, ast.Module]) -> Counter[str]:
    """Lines of all files, and how many of them are docstrings, comments alone, and blank."""
    count: Counter[str] = Counter()
    for _, home in HOMES:
        for file in home.rglob("*.py"):
            text = file.read_text("utf-8").splitlines()
            count["lines"] += len(text)
            count["comments"] += sum(line.lstrip().startswith("#") for line in text)
    for tree in trees.values():
        for node in ast.walk(tree):
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            if isinstance(node, kinds) and ast.get_docstring(node) is not None:
                written = node.body[0]
                count["docstrings"] += (written.end_lineno or 0) - written.lineno + 1
    return count


def exported(tree: ast.Module) -> int:
    """Names in the `__all__` of a module."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return len(getattr(node.value, "elts", ()))
    return 0


def private_imports(trees: Mapping[str, ast.Module]) -> int:
    """Imports of a `_private` name of another file."""
    return sum(
        alias.name.startswith("_") and not alias.name.startswith("__")
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_attr")
        for alias in node.names
    )


def classes(trees: Mapping[str, ast.Module]) -> list[tuple[int, int, str]]:
    """Lines, methods and name of each class, the longest first."""
    found = [
        ((node.end_lineno or 0) - node.lineno + 1, sum(isinstance(n, ast.FunctionDef) for n in node.body), node.name)
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    ]
    return sorted(found, reverse=True)


def levels() -> str:
    """How many levels the import rule has, and what they are called, where they have names."""
    place = ROOT / "tests" / "test_import_rules.py"
    spec = importlib.util.spec_from_file_location("test_import_rules", place)
    assert spec is not None
    assert spec.loader is not None
    rules = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rules)
    named = f" ({', '.join(rules.LEVELS)})" if isinstance(rules.LEVELS, dict) else ", without names"
    return f"{len(rules.LEVELS)}{named}"


def main() -> None:
    trees = sources()
    edges = imports(trees)
    rooms: dict[str, set[str]] = {}
    for importer, imported in edges.items():
        rooms.setdefault(room_of(importer), set()).update(map(room_of, imported))
    pairs = sum(len(found - {room}) for room, found in rooms.items())
    ground = {"errors", "arguments"}
    above = sum(len(found - {room} - ground) for room, found in rooms.items())
    count, largest = lines(trees), classes(trees)
    root = [name for name in trees if "." not in name and name not in FACES]
    print(f"modules                               {len(trees)}")
    print(f"modules in the package root           {len(root)}: {', '.join(sorted(root)[:8])}")
    print(f"rooms                                 {len(rooms)}")
    print(f"imports between rooms                 {pairs}; {above} without those of {' and '.join(sorted(ground))}")
    between = {room: found - {room} for room, found in rooms.items()}
    print(f"circles between rooms, between files  {circles(between)}, {circles(edges)}")
    print(f"levels                                {levels()}")
    print(f"lines; docstrings; comments           {count['lines']}; {count['docstrings']}; {count['comments']}")
    print(f"names in __all__                      {sum(map(exported, trees.values()))}")
    print(f"private names imported across files   {private_imports(trees)}")
    for length, methods, name in largest[:3]:
        print(f"largest classes, lines and methods    {name}: {length}, {methods}")


if __name__ == "__main__":
    main()
