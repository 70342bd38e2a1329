"""What is installed is what is in the repository, and the repository holds what it should."""

from __future__ import annotations

import importlib.resources
import os
import subprocess
import sys
from importlib.metadata import metadata, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import lightning_attr

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

TOP_LEVEL = {
    "pyproject.toml",
    "lightning_attr",
    "callbacks",
    "tests",
    "examples",
    "CHANGELOG.md",
    "README.md",
    "LICENSE",
    "Makefile",
}
LONGEST_FILE = 400  # lines


def packages_on_disk(root: Path) -> set[str]:
    """The packages under `root`, by the names they install under."""
    found = set()
    for folder, package in (("lightning_attr", "lightning_attr"), ("callbacks", "lightning_attr.callbacks")):
        for init in (root / folder).rglob("__init__.py"):
            found.add(".".join((package, *init.parent.relative_to(root / folder).parts)))
    return found


def too_long(root: Path) -> dict[str, int]:
    """The package's files with more than `LONGEST_FILE` lines, and how many they have."""
    files = [file for folder in ("lightning_attr", "callbacks") for file in (root / folder).rglob("*.py")]
    lines = {file.relative_to(root).as_posix(): len(file.read_text("utf-8").splitlines()) for file in files}
    return {file: count for file, count in lines.items() if count > LONGEST_FILE}


def top_level_strangers(tracked: list[str]) -> set[str]:
    """Those first path components of tracked files that do not belong at the top level; dot-files do."""
    first = {path.split("/")[0] for path in tracked}
    return {name for name in first if not name.startswith(".")} - TOP_LEVEL


def test_packages_listed_are_the_packages_on_disk(repository: Path) -> None:
    listed = tomllib.loads((repository / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"]
    assert set(listed) == packages_on_disk(repository)
    assert len(listed) == len(set(listed))


def test_packages_on_disk_are_found_under_their_installed_names(tmp_path: Path) -> None:
    for folder in ("lightning_attr/methods/deep", "lightning_attr/no_package", "callbacks/deep"):
        (tmp_path / folder).mkdir(parents=True)
    for folder in ("lightning_attr", "lightning_attr/methods", "lightning_attr/methods/deep", "callbacks/deep"):
        (tmp_path / folder / "__init__.py").touch()
    assert packages_on_disk(tmp_path) == {
        "lightning_attr",
        "lightning_attr.methods",
        "lightning_attr.methods.deep",
        "lightning_attr.callbacks.deep",
    }


def test_py_typed_ships() -> None:
    assert (importlib.resources.files(lightning_attr) / "py.typed").is_file()


def test_version_is_that_of_the_metadata() -> None:
    assert lightning_attr.__version__ == version("lightning_attr")


def test_runtime_dependencies() -> None:
    requirements = map(Requirement, requires("lightning_attr") or [])
    runtime = {requirement.name for requirement in requirements if "extra" not in str(requirement.marker)}
    assert runtime == {"jinja2", "lightning", "numpy", "safetensors", "torch", "torchmetrics"}


def test_extras() -> None:
    assert set(metadata("lightning_attr").get_all("Provides-Extra", [])) >= {"plot", "fast", "examples", "dev"}


def test_top_level_of_the_repository(repository: Path) -> None:
    if not (repository / ".git").exists():
        pytest.skip("needs a git checkout")
    # Inside a git hook these name another repository, or another index.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    listing = subprocess.run(
        ["git", "ls-files"], cwd=repository, env=environment, capture_output=True, text=True, check=True
    )
    assert top_level_strangers(listing.stdout.splitlines()) == set()


def test_top_level_strangers_are_found() -> None:
    tracked = [
        ".ci/run",
        ".gitignore",
        "Makefile",
        "docs/index.md",
        "lightning_attr/store/feature_store.py",
        "setup.py",
    ]
    assert top_level_strangers(tracked) == {"docs", "setup.py"}


def test_no_file_is_too_long(repository: Path) -> None:
    assert too_long(repository) == {}


def test_too_long_files_are_found(tmp_path: Path) -> None:
    for file, lines in {"lightning_attr/a.py": 400, "lightning_attr/deep/b.py": 401, "callbacks/c.py": 999}.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("pass\n" * lines, "utf-8")
    assert too_long(tmp_path) == {"lightning_attr/deep/b.py": 401, "callbacks/c.py": 999}
