"""Runs ended by SIGKILL at a random moment and started again: their store is that of a run that was not."""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import faults_subject as subject

from lightning_attr import FeatureStore
from lightning_attr.files.io import digest, read_tensors

__all__ = ["rows"]

EPOCHS = 4
CHILD = f"""
import sys, warnings
sys.path.insert(0, {str(Path(__file__).parent)!r})
warnings.simplefilter("ignore")
import faults_subject, pathlib
faults_subject.fit(pathlib.Path(sys.argv[1]), {EPOCHS}, on_start=pathlib.Path(sys.argv[2]).touch)
"""


def contents(path: Path) -> dict[str, Any]:
    """What a store holds, but for its id."""
    store = FeatureStore.open(path)
    files = sorted(file for file in path.rglob("*.safetensors") if "abandoned" not in file.parts)
    manifest = replace(store.manifest, id="")
    return {"manifest": manifest, **{str(file.relative_to(path)): digest(read_tensors(file)) for file in files}}


def rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Kill ``options.kills`` runs."""
    rng, lost, killed = random.Random(options.seed), 0, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        begin = time.perf_counter()
        subject.fit(folder / "whole", EPOCHS)
        seconds = time.perf_counter() - begin
        whole = contents(folder / "whole")
        for number in range(options.kills):
            path, started = folder / str(number), folder / f"started{number}"
            command = [sys.executable, "-c", CHILD, str(path), str(started)]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while not started.exists() and process.poll() is None:
                time.sleep(0.01)
            time.sleep(rng.random() * seconds)
            killed += process.poll() is None
            process.kill()
            process.wait()
            try:
                subject.fit(path, EPOCHS)
                same = contents(path) == whole and not (path / "abandoned").exists()
            except Exception as error:  # a run that cannot go on is lost
                print(f"kill {number}: {type(error).__name__}: {error}")
                same = False
            lost += not same
            shutil.rmtree(path, ignore_errors=True)
    found = {"tried": options.kills, "killed": killed, "lost": lost}
    return [{"table": "kills", "what": f"fit, {EPOCHS} epochs", **found}]
