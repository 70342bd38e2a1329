"""Who may import whom: an ast walk over the tables below."""

from __future__ import annotations

import ast
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

# The rooms of the package by level, lowest first: each imports only from lower levels, and from itself.
LEVELS: dict[str, tuple[str, ...]] = {
    "ground": ("errors", "arguments", "batches", "randomness"),
    "tools": ("files", "metrics", "parameters", "user_code"),
    "records": ("journal",),
    "sources": ("data", "gradients", "outputs", "report", "store"),
    "objectives": ("objectives", "projectors", "results"),
    "runs": ("replay",),
    "features": ("curvature", "features"),
    "methods": ("func", "methods", "modalities", "verification"),
    "evaluation": ("evaluation", "interop"),
    "pilots": ("pilots",),
    "attribution": ("attribution",),
    "faces": ("callbacks", "cli", "testing", "__init__", "__main__"),
}

# The modules that alone may import a distribution.
LIGHTNING_MODULES = {
    "callbacks": ("*",),
    "lightning_attr/attribution": (
        "arguments",
        "borrow",
        "checkpoint_files",
        "checkpoint_snapshots",
        "checkpoint_store",
        "division",
        "strategies",
        "predict_step",
        "rehearsal",
        "request",
        "run",
        "restorer",
        "trainer",
    ),
    "lightning_attr": ("cli",),
    "lightning_attr/data": ("sources",),
    "lightning_attr/evaluation": ("factories", "retrain", "targets", "train_one"),
    "lightning_attr/evaluation/vectorised": ("reference_run", "stacked_models"),
    "lightning_attr/features": ("transfer",),
    "lightning_attr/pilots": ("*",),
    "lightning_attr/user_code": ("lightning_names", "start_hooks", "step_world", "training_step"),
    "lightning_attr/verification": ("gradient_paths", "probe", "row_batches"),
}
LIGHTNING = tuple(f"{folder}/{module}.py" for folder, modules in LIGHTNING_MODULES.items() for module in modules)
ONLY_IN: dict[str, tuple[str, ...]] = {
    "lightning": LIGHTNING,
    "lightning_utilities": (
        "lightning_attr/batches/nested.py",
    ),  # comes with lightning and torchmetrics, which both require it
    "pytorch_lightning": (),  # `lightning` is the name we use; lightning_names.py looks the other one up
    "fsspec": (
        "lightning_attr/attribution/checkpoint_files.py",
    ),  # comes with lightning and torch, which both require it
    "fast_jl": ("lightning_attr/projectors/fast_jl.py",),
    "matplotlib": ("lightning_attr/metrics/figures.py",),
    "PIL": ("lightning_attr/report/renderers.py",),
    "jinja2": ("lightning_attr/report/page.py",),
    "pandas": ("lightning_attr/results/frames.py",),
    "dattri": ("lightning_attr/interop.py",),
}
# Optional distributions: imported only inside functions, and for their types anywhere.
OPTIONAL = {"PIL", "matplotlib", "pandas", "dattri"}

PRIVATE = re.compile("_[^_].*")
FOLDERS = ("lightning_attr", "callbacks", "tests", "examples")


def imports(tree: ast.AST, place: str = "module") -> list[tuple[str, int, str]]:
    """Every imported name (dotted, `.` in front when relative), its line, and its place: module, function or types."""
    found = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno, place) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = "." * node.level + (node.module or "")
            found += [(f"{origin}.{alias.name}", node.lineno, place) for alias in node.names]
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found += imports(node, "function")
        elif isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            found += imports(ast.Module(node.body, []), "types") + imports(ast.Module(node.orelse, []), place)
        else:
            found += imports(node, place)
    return found


def home(file: str) -> str:
    """The room of `LEVELS` that a file of the package belongs to."""
    parts = Path(file).with_suffix("").parts
    return "callbacks" if parts[0] == "callbacks" else parts[1]


def layer_violation(importer: str, imported: str) -> str | None:
    """What is wrong with the module `importer` of the package importing its module `imported`, if anything."""
    level = {room: number for number, rooms in enumerate(LEVELS.values()) for room in rooms}
    name = {room: level for level, rooms in LEVELS.items() for room in rooms}
    if importer not in level:
        return f"`{importer}` has no level yet: add it to LEVELS"
    if imported == "callbacks" and importer != "callbacks":
        return "nothing in lightning_attr/ imports lightning_attr.callbacks"
    if imported not in level or imported == "__init__":
        return f"`{imported}` is not in LEVELS: add the room, or import the name from the module that defines it"
    if imported == importer or level[imported] < level[importer]:
        return None
    return f"`{importer}` (level {name[importer]}) imports `{imported}` (level {name[imported]})"


def violations(file: str, source: str) -> list[str]:
    """What the imports of `file` (its path from the repository's root) break, one line each."""
    in_package = file.startswith(("lightning_attr/", "callbacks/"))
    found = []
    for name, line, place in imports(ast.parse(source)):
        top, _, rest = name.partition(".")
        problem = None
        if name.startswith("."):
            problem = "relative import"
        elif top == "callbacks":
            problem = "import lightning_attr.callbacks: callbacks/ is only its home in the repository"
        elif in_package and top == "lightning_attr" and PRIVATE.fullmatch(rest.rpartition(".")[2]):
            problem = "private to its file: give it a name without `_`, or take what is public there"
        elif in_package and top == "lightning_attr":
            problem = layer_violation(home(file), rest.split(".")[0] or "__init__")
        elif in_package and top in ONLY_IN and not (top in OPTIONAL and place == "types"):
            if not any(fnmatch(file, pattern) for pattern in ONLY_IN[top]):
                problem = f"only {', '.join(ONLY_IN[top]) or 'nobody'} may import {top}"
            elif top in OPTIONAL and place == "module":
                problem = f"{top} is optional: import it inside a function"
        if problem:
            found.append(f"{file}:{line}: {name}: {problem}")
    return found


def walk(root: Path) -> list[str]:
    """What all Python files under `root` break."""
    files = sorted(file for folder in FOLDERS for file in (root / folder).rglob("*.py"))
    named = ((file.relative_to(root).as_posix(), file.read_text("utf-8")) for file in files)
    return [violation for file, source in named for violation in violations(file, source)]


def test_imports_keep_the_rules(repository: Path) -> None:
    assert walk(repository) == []


def test_every_room_has_a_level(repository: Path) -> None:
    rooms = {home(file.relative_to(repository).as_posix()) for file in (repository / "lightning_attr").rglob("*.py")}
    assert {*rooms, "callbacks"} == {room for rooms in LEVELS.values() for room in rooms}


def test_the_root_holds_what_users_import_by_name(repository: Path) -> None:
    modules = {file.stem for file in (repository / "lightning_attr").glob("*.py")}
    assert modules == {"__init__", "__main__", "cli", "errors", "interop", "testing"}


@pytest.mark.parametrize(
    ("file", "source", "problem"),
    [
        ("lightning_attr/store/feature_store.py", "import lightning as L", "may import lightning"),
        ("lightning_attr/store/feature_store.py", "from lightning.pytorch import Trainer", "may import lightning"),
        (
            "lightning_attr/methods/trak.py",
            "def f():\n    import lightning_utilities",
            "may import lightning_utilities",
        ),
        ("callbacks/attribution.py", "import pytorch_lightning", "only nobody may import"),
        ("lightning_attr/projectors/dense.py", "import fast_jl", "may import fast_jl"),
        ("lightning_attr/metrics/figures.py", "import matplotlib.pyplot as plt", "inside a function"),
        ("lightning_attr/metrics/figures.py", "if True:\n    from matplotlib import pyplot", "inside a function"),
        ("lightning_attr/metrics/functional.py", "def f():\n    import matplotlib", "may import matplotlib"),
        ("lightning_attr/results/score_matrix.py", "def f():\n    import pandas as pd", "may import pandas"),
        ("lightning_attr/interop.py", "from dattri.task import AttributionTask", "inside a function"),
        ("lightning_attr/store/feature_store.py", "if TYPE_CHECKING:\n    import lightning", "may import lightning"),
        (
            "lightning_attr/store/feature_store.py",
            "if TYPE_CHECKING:\n    pass\nelse:\n    import matplotlib",
            "may import matplotlib",
        ),
        (
            "lightning_attr/attribution/trainer.py",
            "import lightning_attr.callbacks",
            "nothing in lightning_attr/ imports",
        ),
        ("lightning_attr/__init__.py", "from lightning_attr import callbacks", "nothing in lightning_attr/ imports"),
        ("lightning_attr/store/feature_store.py", "from . import scores", "relative import"),
        ("callbacks/monitor.py", "from .attribution import AttributionCallback", "relative import"),
        ("callbacks/monitor.py", "from callbacks.attribution import AttributionCallback", "only its home"),
        ("examples/noisy_labels.py", "import callbacks", "only its home"),
        ("tests/callbacks/test_monitor.py", "from callbacks import monitor", "only its home"),
        ("lightning_attr/errors.py", "from lightning_attr.batches.nested import f", "imports `batches`"),
        ("lightning_attr/gradients/hooks.py", "from lightning_attr import projectors", "imports `projectors`"),
        (
            "lightning_attr/metrics/plotting.py",
            "import lightning_attr.results.score_matrix",
            "imports `results` (level objectives)",
        ),
        ("lightning_attr/store/feature_store.py", "from lightning_attr.methods.trak import TRAK", "imports `methods`"),
        ("lightning_attr/attribution/trainer.py", "from lightning_attr import ScoreMatrix", "module that defines it"),
        ("lightning_attr/attribution/trainer.py", "import lightning_attr", "module that defines it"),
        ("callbacks/monitor.py", "from lightning_attr.errors import _private", "private to its file"),
        ("lightning_attr/stranger.py", "import lightning_attr.errors", "has no level yet"),
    ],
)
def test_planted_violations_are_found(tmp_path: Path, file: str, source: str, problem: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(f"import torch\n\n{source}\n", "utf-8")
    (violation,) = walk(tmp_path)
    assert violation.startswith(f"{file}:{2 + len(source.splitlines())}: ")
    assert problem in violation


@pytest.mark.parametrize(
    ("file", "source"),
    [
        (
            "lightning_attr/attribution/trainer.py",
            "import lightning as L\nfrom lightning_attr.methods.trak import TRAK",
        ),
        ("lightning_attr/attribution/predict_step.py", "import lightning"),
        (
            "callbacks/attribution.py",
            "from lightning.pytorch import Callback\nfrom lightning_attr.store.feature_store import X",
        ),
        ("callbacks/__init__.py", "from lightning_attr.callbacks.attribution import AttributionCallback"),
        ("lightning_attr/metrics/figures.py", "def f():\n    if True:\n        import matplotlib.pyplot as plt"),
        ("lightning_attr/metrics/noisy_labels.py", "if TYPE_CHECKING:\n    from matplotlib.axes import Axes"),
        ("lightning_attr/projectors/fast_jl.py", "import fast_jl"),
        ("lightning_attr/results/frames.py", "def f():\n    import pandas as pd"),
        ("lightning_attr/results/result.py", "if TYPE_CHECKING:\n    import pandas as pd"),
        ("lightning_attr/projectors/kronecker.py", "from lightning_attr.gradients.rules import rule"),
        ("lightning_attr/methods/trak.py", "from lightning_attr import errors, store"),
        ("lightning_attr/__init__.py", "from lightning_attr.attribution.trainer import AttributionTrainer"),
        ("lightning_attr/store/feature_store.py", "import lightning_attribution"),
        (
            "tests/attribution/test_trainer.py",
            "import lightning\nimport matplotlib\nfrom lightning_attr import attribute",
        ),
    ],
)
def test_what_the_rules_allow_is_not_found(file: str, source: str) -> None:
    assert violations(file, source) == []
