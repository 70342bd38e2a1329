"""Who may import whom: an ast walk over the tables below."""

from __future__ import annotations

import ast
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

# Modules and subpackages of lightning_attr by level: each imports only from lower levels, and from itself.
LEVELS: tuple[tuple[str, ...], ...] = (
    ("argument_messages",),
    ("arguments", "samples_apart"),
    (
        "errors",
        "fields",
        "forms",
        "worlds",
        "batch",
        "encoding",
        "layout",
        "randomness",
        "remedies",
        "texts",
        "tokens",
        "tolerance",
        "labels_at_hand",
        "highlights",
        "trainable",
        "namespaces",
    ),
    ("reachable", "written", "streams"),
    (
        "batch_form",
        "sample_digest",
        "sample_errors",
        "failing_samples",
        "draws",
        "processes",
        "trajectories",
        "headers",
        "paths",
        "contents",
        "generators",
        "batch_copies",
    ),
    ("optimizer_state", "learning_rates", "kept_state", "metric_calls"),
    ("user_calls", "reading_state"),
    ("files", "frames", "checkpoints", "isolation", "modes", "memory", "outputs", "gradients", "projectors", "metrics"),
    ("kept_files",),
    ("curvature", "reductions", "step_world", "start_hooks", "sealed", "claims"),
    ("training_step",),
    ("func", "loss_terms", "report", "saved_scores", "writing"),
    ("manifest", "scores", "top_scores", "mixin", "loader_forms", "reading", "exposure", "testing", "result_metrics"),
    ("loader",),
    (
        "snapshot_store",
        "store",
        "ckpt_files",
        "result",
        "data",
        "attributed",
        "target_function",
        "data_changes",
        "probe_rows",
        "lost_rows",
        "contrastive",
        "diffusion",
    ),
    (
        "ckpt_snapshots",
        "inspection",
        "model_check",
        "jobs",
        "shards",
        "attributed_apart",
        "mode_choice",
        "repeated_reads",
    ),
    ("access", "featurizer"),
    ("second_direction",),
    ("feature_check", "snapshot_model", "positions", "learning", "recorded_losses", "target_check", "training_rows"),
    ("methods",),
    ("ensemble",),
    ("attribute_arguments", "borrow", "provenance", "scoring", "transfer"),
    ("row_checks",),
    ("probe",),
    ("plans",),
    ("evaluation", "interop", "command_line"),
    ("pilots",),
    ("request",),
    ("prediction",),
    ("trainer",),
    ("callbacks", "cli", "__init__"),
)
# Further imports, from a module to another of its own level.
SIDEWAYS = {("projectors", "gradients"), ("store", "snapshot_store")}

# Files that alone may import a distribution.
LIGHTNING = (
    *(
        f"lightning_attr/{name}.py"
        for name in (
            "attribute_arguments",
            "borrow",
            "cli",
            "ckpt_files",
            "ckpt_snapshots",
            "data",
            "plans",
            "prediction",
            "probe",
            "request",
            "row_checks",
            "start_hooks",
            "step_world",
            "trainer",
            "training_step",
            "transfer",
            "worlds",
        )
    ),
    *(
        f"lightning_attr/evaluation/{name}.py"
        for name in ("factories", "pilot", "retrain", "retraining", "stacked", "targets")
    ),
    "lightning_attr/pilots/*",
    "callbacks/*",
)
ONLY_IN: dict[str, tuple[str, ...]] = {
    "lightning": LIGHTNING,
    "lightning_utilities": ("lightning_attr/batch.py",),  # comes with lightning and torchmetrics, which both require it
    "pytorch_lightning": (),  # `lightning` is the name we use; worlds.py looks the other one up
    "fsspec": ("lightning_attr/ckpt_files.py",),  # comes with lightning and torch, which both require it
    "fast_jl": ("lightning_attr/projectors/fast_jl.py",),
    "matplotlib": ("lightning_attr/metrics/figures.py",),
    "PIL": ("lightning_attr/report/renderers.py",),
    "jinja2": ("lightning_attr/report/page.py",),
    "pandas": ("lightning_attr/frames.py",),
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
    """The entry of `LEVELS` that a file of the package belongs to."""
    parts = Path(file).with_suffix("").parts
    return "callbacks" if parts[0] == "callbacks" else parts[1]


def layer_violation(importer: str, imported: str) -> str | None:
    """What is wrong with the module `importer` of the package importing its module `imported`, if anything."""
    level = {name: number for number, names in enumerate(LEVELS) for name in names}
    if importer not in level:
        return f"`{importer}` has no level yet: add it to LEVELS"
    if imported == "callbacks" and importer != "callbacks":
        return "nothing in lightning_attr/ imports lightning_attr.callbacks"
    if imported not in level or imported == "__init__":
        return f"`{imported}` is not in LEVELS: add the module, or import the name from the module that defines it"
    if imported == importer or (importer, imported) in SIDEWAYS or level[imported] < level[importer]:
        return None
    return f"`{importer}` (level {level[importer]}) imports `{imported}` (level {level[imported]})"


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


def test_every_module_has_a_level(repository: Path) -> None:
    modules = {home(file.relative_to(repository).as_posix()) for file in (repository / "lightning_attr").rglob("*.py")}
    assert modules <= {name for names in LEVELS for name in names}


@pytest.mark.parametrize(
    ("file", "source", "problem"),
    [
        ("lightning_attr/store.py", "import lightning as L", "may import lightning"),
        ("lightning_attr/store.py", "from lightning.pytorch import Trainer", "may import lightning"),
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
        ("lightning_attr/scores.py", "def f():\n    import pandas as pd", "may import pandas"),
        ("lightning_attr/interop.py", "from dattri.task import AttributionTask", "inside a function"),
        ("lightning_attr/store.py", "if TYPE_CHECKING:\n    import lightning", "may import lightning"),
        (
            "lightning_attr/store.py",
            "if TYPE_CHECKING:\n    pass\nelse:\n    import matplotlib",
            "may import matplotlib",
        ),
        ("lightning_attr/trainer.py", "import lightning_attr.callbacks", "nothing in lightning_attr/ imports"),
        ("lightning_attr/__init__.py", "from lightning_attr import callbacks", "nothing in lightning_attr/ imports"),
        ("lightning_attr/store.py", "from . import scores", "relative import"),
        ("callbacks/monitor.py", "from .attribution import AttributionCallback", "relative import"),
        ("callbacks/monitor.py", "from callbacks.attribution import AttributionCallback", "only its home"),
        ("examples/noisy_labels.py", "import callbacks", "only its home"),
        ("tests/callbacks/test_monitor.py", "from callbacks import monitor", "only its home"),
        ("lightning_attr/errors.py", "from lightning_attr.batch import f", "imports `batch`"),
        ("lightning_attr/gradients/hooks.py", "from lightning_attr import projectors", "imports `projectors`"),
        ("lightning_attr/metrics/plotting.py", "import lightning_attr.scores", "imports `scores` (level "),
        ("lightning_attr/store.py", "from lightning_attr.methods.trak import TRAK", "imports `methods`"),
        ("lightning_attr/trainer.py", "from lightning_attr import ScoreMatrix", "module that defines it"),
        ("lightning_attr/trainer.py", "import lightning_attr", "module that defines it"),
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
        ("lightning_attr/trainer.py", "import lightning as L\nfrom lightning_attr.methods.trak import TRAK"),
        ("lightning_attr/prediction.py", "import lightning"),
        ("callbacks/attribution.py", "from lightning.pytorch import Callback\nfrom lightning_attr.store import X"),
        ("callbacks/__init__.py", "from lightning_attr.callbacks.attribution import AttributionCallback"),
        ("lightning_attr/metrics/figures.py", "def f():\n    if True:\n        import matplotlib.pyplot as plt"),
        ("lightning_attr/metrics/noisy_labels.py", "if TYPE_CHECKING:\n    from matplotlib.axes import Axes"),
        ("lightning_attr/projectors/fast_jl.py", "import fast_jl"),
        ("lightning_attr/frames.py", "def f():\n    import pandas as pd"),
        ("lightning_attr/result.py", "if TYPE_CHECKING:\n    import pandas as pd"),
        ("lightning_attr/projectors/kronecker.py", "from lightning_attr.gradients.rules import rule"),
        ("lightning_attr/methods/trak.py", "from lightning_attr import errors, store"),
        ("lightning_attr/__init__.py", "from lightning_attr.trainer import AttributionTrainer"),
        ("lightning_attr/store.py", "import lightning_attribution"),
        ("tests/test_trainer.py", "import lightning\nimport matplotlib\nfrom lightning_attr import attribute"),
    ],
)
def test_what_the_rules_allow_is_not_found(file: str, source: str) -> None:
    assert violations(file, source) == []
