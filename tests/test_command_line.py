"""The command `lightning-attr`, as its users call it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_attr import AttributionResult, FeatureStore, ScoreMatrix
from lightning_attr.__main__ import main
from lightning_attr.store.manifest import Fingerprint


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "store"
    made = FeatureStore.create(path, Fingerprint(600, None, {"w": (2,)}, None), batch_size=1)
    made.add_snapshot("epoch=0", {"w": torch.ones(2)}, epoch=0, global_step=20, learning_rate=0.5)
    for shard in made.missing("epoch=0"):
        rows = len(made.rows(shard))
        made.write_shard("epoch=0", shard, {"features": torch.ones(rows, 2), "loss": torch.zeros(rows)})
    return path


def test_show(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(store)]) == 0
    shown = capsys.readouterr().out
    assert "1 snapshots" in shown
    assert "600" in shown
    assert "1 parameters with 2 entries" in shown
    assert shown.splitlines()[-1].split()[:5] == ["epoch=0", "0", "20", "0.5", "600"]


def test_verify_and_repair(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(store)]) == 0
    shard = next(store.rglob("00001.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    before = {file: file.read_bytes() for file in store.rglob("*") if file.is_file()}
    assert main(["verify", str(store)]) == 1
    assert {file: file.read_bytes() for file in store.rglob("*") if file.is_file()} == before
    printed = capsys.readouterr()
    assert str(shard) in printed.err
    assert "1 damaged files" in printed.out
    assert main(["repair", str(store)]) == 0
    assert f"dropped {shard}" in capsys.readouterr().out
    assert main(["verify", str(store)]) == 0
    assert FeatureStore.open(store).missing("epoch=0") == [1]


def test_merge(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(store), str(store), "--output", str(tmp_path / "merged")]) == 0
    assert "2 snapshots of 2 stores" in capsys.readouterr().out
    assert len(FeatureStore.open(tmp_path / "merged").snapshots) == 2


def test_report(tmp_path: Path) -> None:
    AttributionResult(ScoreMatrix(torch.eye(3)), torch.ones(3), torch.ones(3)).save(tmp_path / "result")
    page = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "result"), "--output", str(page), "--title", "Mine"]) == 0
    assert "<title>Mine</title>" in page.read_text("utf-8")


@pytest.mark.parametrize("command", [["show"], ["verify"], ["repair"], ["merge", "--output", "there"], ["report"]])
def test_what_is_not_there_is_named(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = str(tmp_path / "nowhere")
    assert main([command[0], nowhere, *command[1:]]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith(f"lightning-attr {command[0]}: ")
    assert nowhere in printed
    assert not Path("there").exists()


def test_as_a_module() -> None:
    run = subprocess.run([sys.executable, "-m", "lightning_attr.__main__", "--help"], capture_output=True, text=True)
    assert run.returncode == 0
    assert "show" in run.stdout
    assert "report" in run.stdout
