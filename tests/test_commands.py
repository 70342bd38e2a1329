"""Every command line of the README, the guides and the contributor's page can be typed as it stands.

What is quick is run. What builds, trains or downloads for long is asked whether it would start: `make -n`, the
arguments of a script, the extras of an installation. Commands of `lightning-attr` on a store are run by
`tests/test_guides.py`, the examples and targets as a whole by `.ci/run`.
"""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from cases import QUIET, BlobClassifier, blobs, loader_of
from lightning_attr import AttributionResult
from lightning_attr.__main__ import main

REPOSITORY = Path(__file__).parents[1]
PROGRAMS = ("make", "python", "pip", "pytest", "lightning-attr", ".ci/run", ".venv/bin/python")
PAGES = ("README.md", "examples/README.md", ".github/CONTRIBUTING.md", "examples/guides/*.md")


def command_lines() -> list[str]:
    """Lines of blocks that are no Python, and what stands between backticks, if a program is named first."""
    pages = [page.read_text("utf-8") for pattern in PAGES for page in sorted(REPOSITORY.glob(pattern))]
    found = []
    for text in pages:
        blocks = re.findall(r"^```(?:sh)?\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
        found += [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
        found += re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    return sorted({line for line in found if line.split()[:1] and line.split()[0] in PROGRAMS and line != "pip"})


def project_extras() -> set[str]:
    text = (REPOSITORY / "pyproject.toml").read_text("utf-8")
    return set(re.findall(r"^([a-z]+) = \[", text.split("[project.optional-dependencies]")[1], flags=re.MULTILINE))


@pytest.mark.parametrize("line", command_lines())
def test_a_command_of_the_pages_can_be_typed(line: str, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *arguments = shlex.split(line)
    monkeypatch.chdir(repository)
    if program == "make":
        would_start(["make", "-n", *arguments])
    elif program == "pip":
        assert arguments[0] == "install"
        wanted = [extra for part in arguments for extra in re.findall(r"\[(.*)\]", part)]
        assert set(wanted) <= project_extras()
        assert {part.split("[")[0] for part in arguments[1:]} <= {".", "-e", "lightning_attr", "pytest"}
    elif program == "pytest":
        assert arguments == ["-m", "not slow"]
        assert '"slow: ' in Path("pyproject.toml").read_text("utf-8")
    elif program == "lightning-attr":
        for name in line.split(" ", 1)[1].split(" | ") if "|" in line else arguments[:1]:
            with pytest.raises(SystemExit, match="0"):
                main([name, "--help"])
    elif program == ".ci/run":
        assert os.access(program, os.X_OK)
        for target in re.findall(r"for target in (.*); do", Path(program).read_text("utf-8"))[0].split():
            would_start(["make", "-n", target])
    elif arguments[:1] == ["-m"]:
        monkeypatch.setattr(sys, "argv", [*arguments[1:], "--help"])
        monkeypatch.delitem(sys.modules, arguments[1], raising=False)  # runpy warns where another test imported it
        with pytest.raises(SystemExit, match="0"):
            runpy.run_module(arguments[1], run_name="__main__")
    elif arguments[0] == "main.py":
        assert line in OF_MAIN, "run it in test_the_guides_own_main"
    elif arguments[0] != "examples/NAME.py":
        takes_arguments(Path(arguments[0]), arguments[1:], monkeypatch)


def would_start(command: list[str]) -> None:
    """Have make say what it would do: the target exists, and so do the scripts that it names."""
    done = subprocess.run(command, env={**os.environ, "MAKEFLAGS": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    scripts = re.findall(r"(?<![\w/.])(?:examples|tests)/[\w/]+\.py", done.stdout)
    assert [script for script in scripts if not Path(script).is_file()] == []


def takes_arguments(script: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Start a script, up to where it has read its arguments."""
    read = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, *given: Any) -> None:
        read(parser, *given)
        raise KeyboardInterrupt

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    monkeypatch.syspath_prepend(str(script.parent))
    with pytest.raises(KeyboardInterrupt):
        runpy.run_path(str(script), run_name="__main__")


class LitClassifier(BlobClassifier):
    """Without arguments, as a command line makes it."""

    def __init__(self) -> None:
        super().__init__()


class LitData(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader_of(blobs(20))

    def test_dataloader(self) -> Any:
        return loader_of(blobs(6, seed=1))


OF_MAIN = (
    "python main.py check --config config.yaml",
    "python main.py attribute --config config.yaml --ckpt_path best.ckpt --method TRAK --topk 10",
    "python main.py --config attribution_result/config.yaml attribute",
)


def test_the_guides_own_main(repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    pytest.importorskip("jsonargparse")
    guide = (repository / "examples" / "guides" / "your_checkpoints.md").read_text("utf-8")
    kept = ModelCheckpoint(".", filename="best")
    settings = {**QUIET, "enable_checkpointing": True, "max_epochs": 1, "callbacks": [kept]}
    L.Trainer(**settings).fit(LitClassifier(), datamodule=LitData())
    blocks = {"main.py": "```python\n(from lightning_attr.cli.*?)```", "config.yaml": "```yaml\n(.*?)```"}
    for name, pattern in blocks.items():
        Path(name).write_text(re.findall(pattern, guide, flags=re.DOTALL)[0])
    Path("project.py").write_text(f"from {__name__} import LitClassifier, LitData")
    monkeypatch.syspath_prepend(".")
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")

    results = []
    for line in OF_MAIN:
        assert line in guide
        monkeypatch.setattr(sys, "argv", shlex.split(line)[1:])
        with pytest.MonkeyPatch.context() as patch:
            patch.delitem(sys.modules, "project", raising=False)
            runpy.run_path("main.py", run_name="__main__")
        if "attribute" in line:
            results.append(AttributionResult.load("attribution_result"))
    printed = capsys.readouterr().out
    assert "Attribution of LitClassifier by TRAK: 20 training samples" in printed
    assert printed.count("AttributionResult by TRAK: 20 training samples x 6 targets") == 2
    assert results[0].scores.proponents.tolist() == results[1].scores.proponents.tolist()
