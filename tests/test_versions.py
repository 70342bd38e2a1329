"""The versions that are tested are those that are declared."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it


def declared(project: dict[str, dict[str, list[str]]], *extras: str) -> list[Requirement]:
    """What the project and these extras of it require, the extras that they name included."""
    listed = [line for extra in extras for line in project["optional-dependencies"][extra]]
    found = [Requirement(line) for line in [*project["dependencies"], *listed]]
    own = {extra for requirement in found if requirement.name == project["name"] for extra in requirement.extras}
    if own - set(extras):
        return declared(project, *extras, *(own - set(extras)))
    return [requirement for requirement in found if requirement.name != project["name"]]


def lower_bound(requirement: Requirement) -> Version:
    (bound,) = [Version(part.version) for part in requirement.specifier if part.operator in {">=", "==", "~="}]
    return bound


@pytest.fixture
def project(repository: Path) -> dict[str, dict[str, list[str]]]:
    return tomllib.loads((repository / "pyproject.toml").read_text("utf-8"))["project"]


def test_the_oldest_versions_are_the_lower_bounds(repository: Path, project: dict[str, dict[str, list[str]]]) -> None:
    lines = (repository / ".ci" / "constraints-oldest.txt").read_text("utf-8").splitlines()
    pins = [Requirement(line.partition("#")[0]) for line in lines if line.partition("#")[0].strip()]
    tried = {pin.name: lower_bound(pin) for pin in pins if "==" in str(pin.specifier)}
    bounds = {requirement.name: lower_bound(requirement) for requirement in declared(project, "test")}
    assert {name: tried.get(name) for name in bounds} == bounds
