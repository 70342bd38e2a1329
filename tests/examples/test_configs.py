"""The configs of the examples: looked at, trained, attributed, and run again by the config beside the result."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_attr import AttributionResult

pytest.importorskip("jsonargparse")
pytest.importorskip("sklearn")


def run(*arguments: str, directory: Path, repository: Path) -> str:
    """The command line as the configs name it, in a directory of its own."""
    environment = {"PYTHONPATH": str(repository / "examples"), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-W", "ignore", "-m", "lightning_attr.cli", *arguments]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def commands(file: Path) -> list[list[str]]:
    """The command lines that a config names in its head."""
    found = re.findall(
        r"^#   PYTHONPATH=examples \.venv/bin/python -m lightning_attr\.cli (.*)$", file.read_text(), re.M
    )
    return [line.split() for line in found]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["noisy_labels", "regression", "text_classification"])
def test_a_config_runs_and_its_result_replays(repository: Path, tmp_path: Path, name: str) -> None:
    if name == "text_classification":
        pytest.importorskip("transformers")
    (tmp_path / "examples").symlink_to(repository / "examples")
    where: dict[str, Any] = {"directory": tmp_path, "repository": repository}
    file = repository / "examples" / "configs" / f"{name}.yaml"
    assert [line[0] for line in commands(file)] == ["check", "fit", "attribute"]
    check, fit, attribute = commands(file)
    printed = run(*attribute, "--print_config", **where)
    assert "class_path: lightning_attr.callbacks.AttributionCallback" in printed
    assert "topk: null" in printed
    assert "nothing stands in its way" in run(*check, **where)
    assert not (tmp_path / "out").exists()
    run(*fit, "--trainer.max_epochs=2", **where)
    assert "AttributionResult by TRAK" in run(*attribute, "--topk=3", **where)
    folder = tmp_path / "out" / "configs" / name / "attribution_result"
    first = AttributionResult.load(folder)
    (tmp_path / "config.yaml").write_bytes((folder / "config.yaml").read_bytes())
    for file in folder.iterdir():
        file.unlink()
    run("--config", "config.yaml", "attribute", **where)
    again = AttributionResult.load(folder)
    assert torch.equal(first.scores.proponents, again.scores.proponents)
    # The first run has just learned the projection that the second one reads.
    torch.testing.assert_close(first.scores.proponent_scores, again.scores.proponent_scores, rtol=1e-3, atol=1e-6)
    assert (folder / "report.html").is_file()
