"""Directories that a stranger crafted: none makes us read, write, delete, rename or copy outside of it."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import faults_subject as subject
import torch

from lightning_attr import FeatureStore
from lightning_attr.errors import AttributionError
from lightning_attr.evaluation.ground_truth import GroundTruth, Records
from lightning_attr.evaluation.subsets import random_subsets
from lightning_attr.files.sealed_records import seal

__all__ = ["CRAFTED", "rows"]

Craft = Callable[[Path, Path], None]
_SECONDS = 30


def manifest(**changes: Any) -> Craft:
    """Other fields of a manifest, with a right checksum."""

    def craft(path: Path, outside: Path) -> None:
        record = {**json.loads((path / "manifest.json").read_text()), **changes}
        del record["sha256"]
        (path / "manifest.json").write_bytes(seal(record))

    return craft


def snapshot(**changes: Any) -> Craft:
    """Other fields of the first snapshot; OUTSIDE stands for the directory outside."""

    def craft(path: Path, outside: Path) -> None:
        found = {k: v.replace("OUTSIDE", str(outside)) if isinstance(v, str) else v for k, v in changes.items()}
        record = json.loads((path / "manifest.json").read_text())
        record["snapshots"][0] |= found
        del record["sha256"]
        (path / "manifest.json").write_bytes(seal(record))

    return craft


def link(pattern: str, target: str = "") -> Craft:
    """A link to the outside in the place of a file or folder, whose content lies there."""

    def craft(path: Path, outside: Path) -> None:
        place = next(iter(sorted(path.glob(pattern))), path / pattern)
        there = outside / (target or place.name)
        if place.exists():
            shutil.move(place, there)
        place.symlink_to(there)

    return craft


def added_link(path: Path, outside: Path) -> None:
    """A link among the files of a snapshot, which merging could copy."""
    folder = next(iter(sorted((path / "snapshots").iterdir())))
    (folder / "notes.txt").symlink_to(outside / "secret.txt")


def pipe(path: Path, outside: Path) -> None:
    """A file that never ends, and never begins."""
    file = next(iter(sorted(path.rglob("weights.safetensors"))))
    file.unlink()
    os.mkfifo(file)


def vast(path: Path, outside: Path) -> None:
    """A manifest of a terabyte that takes no room."""
    os.truncate(path / "manifest.json", 2**40)


def deep(path: Path, outside: Path) -> None:
    """A manifest of brackets."""
    (path / "manifest.json").write_text("[" * 10**6)


def loop(path: Path, outside: Path) -> None:
    """A folder that leads to itself."""
    place = next(iter(sorted(path.rglob("features"))))
    shutil.rmtree(place)
    place.symlink_to(place)


def claim(path: Path, outside: Path) -> None:
    """A claim that says that everybody's process has it."""
    (path / "claims").mkdir(exist_ok=True)
    (path / "claims" / "writer.0").write_text(json.dumps({"host": os.uname().nodename, "pid": -1}))


def targets(path: Path, outside: Path) -> None:
    """A ground truth of more outputs than there is memory."""
    record = json.loads((path / "manifest.json").read_text())
    record["recipe"]["n_target"] = 2**39
    del record["sha256"]
    (path / "manifest.json").write_bytes(seal(record))
    shutil.rmtree(path / "runs")


_VAST = {"length": 2**52, "data": None, "layout": {}, "projector": None}
_OF_SNAPSHOT = ("weights.safetensors", "optimizer.safetensors", "features", "features/00000.safetensors", "computed")
_OF_RESULT = ("scores.json", "scores.safetensors", "result.safetensors")
CRAFTED: dict[str, Craft] = {
    "store: folder above": snapshot(folder="../outside/victim"),
    "store: absolute folder": snapshot(folder="OUTSIDE/victim"),
    "store: name above": snapshot(key="../../outside/victim", folder="snapshots/../../outside/victim"),
    "store: absolute name": snapshot(key="OUTSIDE/victim", folder="OUTSIDE/victim"),
    "store: name with a null byte": snapshot(key="a\0b", folder="snapshots/a\0b"),
    "store: hidden name": snapshot(key=".ssh", folder="snapshots/.ssh"),
    "store: fields of other types": snapshot(shards=[1], epoch="x"),
    "store: endless rate": snapshot(learning_rate=float("nan")),
    "store: endless shards": manifest(shard_rows=1, fingerprint=_VAST),
    "store: no rows": manifest(shard_rows=0),
    "store: field of another make": manifest(__reduce__=["os.system", "true"]),
    "store: vast manifest": vast,
    "store: deep manifest": deep,
    "store: pipe": pipe,
    "store: loop": loop,
    "store: foreign claim": claim,
    "store: link among the files": added_link,
    **{
        f"store: link for {place}": link(place)
        for place in ("manifest.json", "snapshots", "snapshots/*", "abandoned", "claims")
    },
    **{f"store: link for a snapshot's {place}": link(f"snapshots/*/{place}") for place in _OF_SNAPSHOT},
    **{f"truth: link for {place}": link(place) for place in ("manifest.json", "masks.safetensors", "runs", "claims")},
    "truth: link for a retraining": link("runs/*"),
    "truth: outputs beyond memory": targets,
    **{f"result: link for {place}": link(place) for place in _OF_RESULT},
}  # fmt: skip


def use_store(path: Path) -> None:
    """All that may be done with a store: each step by itself, as one that is refused must not hide the next."""
    other = path.with_name("merged")
    steps: list[Callable[[FeatureStore], Any]] = [
        lambda store: subject.read("store", path),
        lambda store: store.adopt(store.snapshots[0].key),
        lambda store: store.write_shard(store.snapshots[0].key, 0, store.shard(store.snapshots[0].key, 0)),
        lambda store: store.repair(),
        lambda store: FeatureStore.merge([store], other),
        lambda store: store.set_aside([store.snapshots[0].key]),
        lambda store: store.add_snapshot("new", {"w": torch.ones(1)}, epoch=0, global_step=1, learning_rate=0.1),
    ]
    for step in steps:
        refused(lambda step=step: step(FeatureStore.open(path)))
    if other.exists() and any(file.is_symlink() or file.name == "notes.txt" for file in other.rglob("*")):
        raise AssertionError("a file of the outside was copied")


def use_truth(path: Path) -> None:
    """Read a ground truth, and fill it further."""
    plan = random_subsets(20, num_subsets=3, alpha=0.5, repeats=2, seed=0)

    def fill() -> None:
        records = Records.prepare(path, plan, {"n_train": 20, "n_target": 4})
        for retraining in plan:
            records.claim(retraining)
            records.write(retraining, torch.zeros(4))
        records.sweep()

    refused(lambda: GroundTruth.open(path))
    refused(fill)
    refused(lambda: Records(path).sweep())


def refused(step: Callable[[], Any]) -> None:
    """Do a step; an error of ours is an answer."""
    with suppress(AttributionError):
        step()


USES = {
    "store": use_store,
    "truth": use_truth,
    "result": lambda path: refused(lambda: subject.read("result", path)),
}


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """All that lies in a folder, with its age."""
    found = {}
    for file in sorted(folder.rglob("*")):
        info = file.lstat()
        found[str(file)] = (info.st_mtime_ns, file.read_bytes() if file.is_file() else b"")
    return found


def contained(kind: str, craft: Craft, whole: Path, folder: Path) -> str | None:
    """Use a crafted directory; say what went wrong, if anything did."""
    path, outside = folder / "crafted", folder / "outside"
    shutil.copytree(whole / kind / "a", path)
    (outside / "victim").mkdir(parents=True)
    (outside / "secret.txt").write_text("secret")
    (outside / ".old.1.tmp").write_text("not ours")
    craft(path, outside)
    before = contents(outside)
    try:
        USES[kind](path)
    except Exception as error:  # what must not come
        return f"{type(error).__name__}: {error}"
    return None if contents(outside) == before else "changed the outside"


def rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Try every crafted directory."""
    found: dict[str, list[bool]] = {}

    def ring(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"took more than {_SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name).resolve() / "whole"
        subject.make(whole, USES)
        subject.know_factors(whole)
        for number, (what, craft) in enumerate(CRAFTED.items()):
            signal.alarm(_SECONDS)
            problem = contained(what.split(":")[0], craft, whole, Path(name).resolve() / str(number))
            signal.alarm(0)
            if problem is not None:
                print(f"not contained: {what}: {problem}")
            found.setdefault(what.split(":")[0], []).append(problem is None)
    signal.signal(signal.SIGALRM, before)
    return [
        {"table": "hostile", "what": what, "tried": len(good), "contained": sum(good)} for what, good in found.items()
    ]
