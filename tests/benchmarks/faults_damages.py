"""Random damages of stored files: each is named, or changes nothing."""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import faults_subject as subject
import torch

from lightning_attr.errors import AttributionError

__all__ = ["rows"]

OUTCOMES = ("named", "harmless", "raw", "silent")


def flip(rng: random.Random, file: Path, others: list[Path]) -> None:
    """Change one bit."""
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def truncate(rng: random.Random, file: Path, others: list[Path]) -> None:
    """Keep a part."""
    content = file.read_bytes()
    file.write_bytes(content[: rng.randrange(len(content))])


def delete(rng: random.Random, file: Path, others: list[Path]) -> None:
    """Take the file away."""
    file.unlink()


def swap(rng: random.Random, file: Path, others: list[Path]) -> None:
    """Put another file of the same kind in its place: of another snapshot, row, store, retraining or result."""
    shutil.copy(rng.choice(others), file)


def overwrite(rng: random.Random, file: Path, others: list[Path]) -> None:
    """Zero a run of bytes, or put noise there."""
    content = bytearray(file.read_bytes())
    start = rng.randrange(len(content))
    length = min(rng.randrange(1, 64), len(content) - start)
    content[start : start + length] = bytes(length) if rng.random() < 0.5 else rng.randbytes(length)
    file.write_bytes(content)


def append(rng: random.Random, file: Path, others: list[Path]) -> None:
    """Write more behind it."""
    file.write_bytes(file.read_bytes() + rng.randbytes(rng.randrange(1, 32)))


def retouch(rng: random.Random, file: Path, others: list[Path]) -> None:
    """Change a digit in the text, as an editor would."""
    content = bytearray(file.read_bytes())
    digits = [i for i, byte in enumerate(content) if 48 <= byte <= 57]
    if digits:
        content[rng.choice(digits)] = 48 + rng.randrange(10)
        file.write_bytes(content)


DAMAGES = (flip, flip, truncate, delete, swap, overwrite, append, retouch)


def outcome(kind: str, path: Path, file: Path, reference: subject.Reading) -> str:
    """Read a damaged directory, and say what came of it."""
    try:
        found = subject.read(kind, path)
    except AttributionError as error:
        return "named" if file.name in str(error) or str(path) in str(error) else "raw"
    except Exception:  # what the user must never see is what is counted here
        return "raw"
    missing = reference.keys() - found.keys()
    gone = not file.exists() and (kind == "truth" or file.parent.name == "computed")  # it is made again
    same = all(_equal(value, reference.get(name)) for name, value in found.items())
    return "harmless" if same and (gone or not missing) else "silent"


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return bool(a == b) or (a != a and b != b)


def rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Try ``options.damages`` damages, and count what came of them by kind of file."""
    rng, counts = random.Random(options.seed), defaultdict[str, Counter[str]](Counter)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        subject.make(folder / "whole")
        subject.know_factors(folder / "whole")
        files = defaultdict[str, list[Path]](list)
        for file in sorted(file for file in (folder / "whole").rglob("*") if file.is_file()):
            files[subject.kind_of(file, folder / "whole")].append(file)
        references = {kind: subject.read(kind, folder / "whole" / kind / "a") for kind in subject.KINDS}
        for number in range(options.damages):
            what = sorted(files)[number % len(files)]
            kind = what.split()[0]
            file = rng.choice([f for f in files[what] if f.relative_to(folder / "whole").parts[1] == "a"])
            damaged = folder / "damaged"
            shutil.copytree(folder / "whole" / kind / "a", damaged)
            target = damaged / file.relative_to(folder / "whole" / kind / "a")
            damage, before = rng.choice(DAMAGES), target.read_bytes()
            damage(rng, target, [other for other in files[what] if other != file and other.suffix == file.suffix])
            if not target.exists() or target.read_bytes() != before:
                found = outcome(kind, damaged, target, references[kind])
                counts[what][found] += 1
                if found in {"raw", "silent"}:
                    print(f"{found}: {damage.__name__} of {file.relative_to(folder / 'whole')} (damage {number})")
            shutil.rmtree(damaged)
    return [
        {"table": "damages", "what": what, "tried": sum(own.values()), **{name: own[name] for name in OUTCOMES}}
        for what, own in sorted(counts.items())
    ]
