"""Stored files of a stranger: every checksum is right, and what they say makes no sense."""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import faults_subject as subject
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_attr import AttributionResult, AttributionTrainer, FeatureStore
from lightning_attr.errors import AttributionError
from lightning_attr.evaluation.ground_truth import GroundTruth, Records
from lightning_attr.files.headers import config_digest
from lightning_attr.files.io import digest, write_tensors
from lightning_attr.files.sealed_records import seal
from lightning_attr.methods import LESS, TRAK, Influence
from lightning_attr.metrics import linear_datamodeling_score
from lightning_attr.store.inspection import damages, described

__all__ = ["rows"]

OUTCOMES = ("named", "usable", "raw")
SECONDS = 60
ABSURD: tuple[Any, ...] = (
    *(None, True, -1, 0, 3, 2**31, 2**53, 10**400, 0.5, -1e300, float("nan"), float("inf")),
    *("", "x", "0", "../../x", "<script>alert(1)</script>", "é\n\0", "x" * 20_000, [], [1, "a"], {}, {"a": {"b": [1]}}),
)

Place = tuple[str | int, ...]


def places(record: Any, above: Place = ()) -> Iterator[Place]:
    """All places in a record, its containers among them."""
    entries = record.items() if isinstance(record, dict) else enumerate(record) if isinstance(record, list) else ()
    for name, entry in entries:
        yield (*above, name)
        yield from places(entry, (*above, name))


def change_record(rng: random.Random, file: Path) -> str:
    """Put something absurd into one place of a JSON file, or take the place away, and seal it again."""
    record = json.loads(file.read_text("utf-8"))
    sealed = record.pop("sha256", None) is not None
    place = rng.choice(list(places(record)))
    inner = record
    for name in place[:-1]:
        inner = inner[name]
    if rng.random() < 0.1:
        del inner[place[-1]]
        what = "gone"
    else:
        inner[place[-1]] = rng.choice(ABSURD)
        what = repr(inner[place[-1]])[:40]
    file.write_bytes(seal(record) if sealed else json.dumps(record).encode())
    if "provenance" in record:
        _of_these_scores(file.with_name("result.safetensors"), record)
    return f"{'.'.join(map(str, place))} = {what}"


def _of_these_scores(columns: Path, record: dict[str, Any]) -> None:
    """Let the columns of a result say that they belong to its changed scores."""
    header, tensors = _content(columns)
    place = {"scores": str(record.get("content")), "provenance": config_digest(record["provenance"])}
    write_tensors(columns, tensors, {**header, **place})


def _content(file: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """What a file of tensors says about itself, without its checksums, and its tensors."""
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118 - no iterator
        header = json.loads(opened.metadata()["lightning_attr"])
    return {name: value for name, value in header.items() if "sha256" not in name}, tensors


def absurd(tensor: Tensor) -> dict[str, Tensor]:
    """What a tensor could be instead."""
    shape, real = tensor.shape, tensor.dtype.is_floating_point
    values = (torch.nan, torch.inf, torch.finfo(tensor.dtype).min, 0.0) if real else (-1, 7, 2**40, -(2**63))
    return {
        **{f"{v}": torch.full(shape, v, dtype=tensor.dtype if real else torch.int64) for v in values},
        **{str(d): torch.zeros(shape, dtype=d) for d in (torch.bool, torch.uint8, torch.float64, torch.complex64)},
        "one more dimension": tensor.unsqueeze(0),
        "flat": tensor.reshape(-1),
        "none": tensor.new_zeros(0, *shape[1:]),
        "one more": torch.cat([tensor.reshape(-1), tensor.reshape(-1)[:1]]),
        "a number": tensor.new_zeros(()),
    }


def change_tensor(rng: random.Random, file: Path) -> str:
    """Put another tensor into a file, take one away or add one, with a right header and checksum."""
    header, tensors = _content(file)
    before = digest(tensors)
    name = rng.choice(sorted(tensors))
    kind, draw = "", rng.random()
    if draw < 0.1:
        del tensors[name]
        kind = "gone"
    elif draw < 0.2:
        tensors[f"{name}2"] = tensors[name]
        kind = "twice"
    else:
        kind, tensors[name] = rng.choice(list(absurd(tensors[name]).items()))
    _enter(file, before, write_tensors(file, tensors, header))
    return f"{name}: {kind}"


def _enter(file: Path, before: str, after: str) -> None:
    """Write a new checksum in the place of the one before, into all records that name it."""
    for folder in (file.parent, *file.parents):
        for record_file in folder.glob("*.json"):
            text = record_file.read_text("utf-8")
            if before in text:
                record = json.loads(text.replace(before, after))
                del record["sha256"]
                record_file.write_bytes(seal(record))
                return


# Uses ---------------------------------------------------------------------------------------------------------------

Use = Callable[[Path], Any]


def attribute(path: Path, method: Any) -> None:
    """Score by a store."""
    trainer = AttributionTrainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
    loaders = {"train_dataloaders": DataLoader(subject.data(), batch_size=104), "target_dataloaders": subject.targets()}
    trainer.attribute(model=subject.Classifier(), store=path, method=method, **loaders)


def use_result(result: AttributionResult, folder: Path) -> None:
    """All that a result shows."""
    _ = repr(result), result._repr_html_()
    page = result.report(folder / "page.html").read_text("utf-8")
    if "<script>alert(1)" in page:
        raise AssertionError("a text of the result is code in the page")
    result.to_pandas()
    result.select(0.5)
    result.save(folder / "again")
    AttributionResult.load(folder / "again")


def use_truth(truth: GroundTruth) -> None:
    """All that a ground truth tells."""
    _ = truth.finished, truth.complete
    if truth.kind == "lds":
        linear_datamodeling_score(torch.randn(truth.masks.shape[1], truth.outputs.shape[2]), truth.masks, truth.outputs)
    else:
        _ = truth.removed, truth.reference, truth.effects


def fill(path: Path) -> None:
    """Go on with a ground truth."""
    records = Records(path)
    for retraining in records.unfinished()[:3]:
        claim = records.claim(retraining)
        if claim is not None:
            with claim:
                records.write(retraining, torch.zeros(records.recipe["n_target"]))
    records.sweep()


USES: dict[str, tuple[Use, ...]] = {
    "store": (
        lambda path: described(FeatureStore.open(path)),
        lambda path: damages(FeatureStore.open(path)),
        lambda path: attribute(path, TRAK(8)),
        lambda path: attribute(path, LESS()),
        lambda path: attribute(path, Influence(solver="ekfac")),
        lambda path: FeatureStore.open(path).repair(),
    ),
    "truth": (lambda path: use_truth(GroundTruth.open(path)), fill),
    "result": (lambda path: use_result(AttributionResult.load(path), path),),
    "top": (lambda path: use_result(AttributionResult.load(path), path),),
}


def outcome(path: Path, uses: tuple[Use, ...]) -> tuple[str, str]:
    """Do with a crafted directory all that may be done; give the worst that came, and its text."""
    found = [_came_of(use, path) for use in uses]
    return max(found, key=lambda one: (one[0] == "raw", one[0] == "named"))


def _came_of(use: Use, path: Path) -> tuple[str, str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            use(path)
    except AttributionError as error:
        return "named", str(error)
    except Exception as error:  # what the user must never see is what is counted here
        return "raw", f"{type(error).__name__}: {error}"
    return "usable", ""


def rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Try ``options.damages`` crafted files, and count what came of them by kind of file."""
    rng, counts = random.Random(options.seed), defaultdict[str, Counter[str]](Counter)

    def ring(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    with tempfile.TemporaryDirectory() as name:
        whole, crafted = Path(name).resolve() / "whole", Path(name).resolve() / "crafted"
        subject.make(whole, getattr(options, "kinds", None) or list(USES))
        files = defaultdict[str, list[Path]](list)
        for file in sorted(file for file in whole.glob("*/a/**/*") if file.is_file()):
            files[subject.kind_of(file, whole)].append(file)
        for number in range(options.damages):
            what = sorted(files)[number % len(files)]
            file, kind = rng.choice(files[what]), what.split()[0]
            shutil.copytree(whole / kind / "a", crafted)
            target = crafted / file.relative_to(whole / kind / "a")
            done = (change_record if target.suffix == ".json" else change_tensor)(rng, target)
            signal.alarm(SECONDS)
            found, text = outcome(crafted, USES[kind])
            signal.alarm(0)
            shutil.rmtree(crafted)
            counts[what][found] += 1
            if found == "raw":
                print(f"raw: {file.relative_to(whole)}, {done} (number {number}): {text[:200]}")
    signal.signal(signal.SIGALRM, before)
    return [
        {"table": "crafted", "what": what, "tried": sum(own.values()), **{name: own[name] for name in OUTCOMES}}
        for what, own in sorted(counts.items())
    ]
