"""Random damages of stored files: each is named, or changes nothing."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import faults_subject as subject
import torch
from safetensors import safe_open

from lightning_attr.errors import AttributionError
from lightning_attr.files.io import write_tensors

__all__ = ["rows"]

_DAMAGED = "damaged"
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


def empty(rng: random.Random, file: Path, others: list[Path]) -> None:
    """Leave nothing in it, as a full disk does."""
    file.write_bytes(b"")


def into_folder(rng: random.Random, file: Path, others: list[Path]) -> None:
    """Put a folder in its place, with the file inside or without."""
    content = file.read_bytes()
    file.unlink()
    file.mkdir()
    if rng.random() < 0.5:
        (file / file.name).write_bytes(content)


def rename(rng: random.Random, file: Path, others: list[Path]) -> None:
    """Give it another name, or that of another file in its folder."""
    beside = [other.name for other in others if other.suffix == file.suffix]
    file.rename(file.with_name(rng.choice([f"{file.name}.bak", f"copy of {file.name}", *beside])))


def duplicate(rng: random.Random, file: Path, others: list[Path]) -> None:
    """Put a copy of it beside it, under the name of a file that could be there."""
    names = ["00007.safetensors", f"copy of {file.name}", f".{file.name}.1.tmp", f"{file.name}~"]
    shutil.copy(file, file.with_name(rng.choice(names)))


def deny(rng: random.Random, file: Path, others: list[Path]) -> None:
    """Let nobody read it."""
    file.chmod(0)


def only_read(rng: random.Random, file: Path, others: list[Path]) -> None:
    """Let nobody write it, nor its folder."""
    file.chmod(0o444)
    file.parent.chmod(0o555)


def header(rng: random.Random, file: Path, others: list[Path]) -> None:
    """Let the first bytes, the size of a header of safetensors, say something absurd."""
    content = file.read_bytes()
    size = rng.choice([0, 1, len(content), len(content) - 8, 2**31, 2**40, 2**63 - 1, 2**64 - 1])
    file.write_bytes(size.to_bytes(8, "little") + content[8:])


def line_ends(rng: random.Random, file: Path, others: list[Path]) -> None:
    """Write other ends of lines, as version control and transfers of texts do."""
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))


def encoding(rng: random.Random, file: Path, others: list[Path]) -> None:
    """Begin with the mark of an encoding, or write the text in another, as editors do."""
    content = file.read_bytes()
    other = content.decode("latin-1").encode("utf-16") if rng.random() < 0.5 else b"\xef\xbb\xbf" + content
    file.write_bytes(other)


def pack(rng: random.Random, file: Path, others: list[Path]) -> None:
    """Pack it, as backups do."""
    file.write_bytes(gzip.compress(file.read_bytes(), mtime=0))


def hole(rng: random.Random, file: Path, others: list[Path]) -> None:
    """Let it end in a hole, or be one as a whole, as after a copy that was interrupted."""
    size = file.stat().st_size
    if rng.random() < 0.5:
        os.truncate(file, 0)
    os.truncate(file, size + rng.choice([0, 1, 4096]))


def mix(rng: random.Random, file: Path, others: list[Path]) -> None:
    """Begin as it was and end as another of the same kind, as after two writers."""
    content, other = file.read_bytes(), rng.choice(others).read_bytes()
    start = rng.randrange(len(content))
    file.write_bytes(content[:start] + other[start:])


def exchange(rng: random.Random, file: Path, others: list[Path]) -> None:
    """Exchange its folder and another: one beside it, or of the same name elsewhere."""
    own = file.parent
    root = next(place for place in file.parents if place.name == _DAMAGED)
    folders = sorted(place for place in root.rglob("*") if place.is_dir() and place != own)
    fitting = [place for place in folders if own != root and (place.parent == own.parent or place.name == own.name)]
    if fitting:
        other, between = rng.choice(fitting), own.with_name("between")
        for source, target in ((own, between), (other, own), (between, other)):
            source.rename(target)


def linked(rng: random.Random, file: Path, others: list[Path]) -> None:
    """Put a link in its place, to another file of the directory or to none."""
    inside = sorted(file.parent.parent.rglob(f"*{file.suffix}"))
    target = rng.choice([*inside, file.with_name("gone")])
    file.unlink()
    file.symlink_to(os.path.relpath(target, file.parent))


def closed(rng: random.Random, file: Path, others: list[Path]) -> None:
    """Let nobody enter its folder."""
    file.parent.chmod(0)


def senseless(rng: random.Random, file: Path, others: list[Path]) -> None:
    """Write other tensors with right checksums, as a stranger can: NaN, other shapes, dtypes and names, none at all."""
    if file.suffix != ".safetensors":
        retouch(rng, file, others)
        return
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no iterator of its own
        metadata = json.loads(opened.metadata()["lightning_attr"])
    name = rng.choice(sorted(tensors))
    tensor = tensors[name]
    changes = [
        torch.full(tensor.shape, float("nan")),
        tensor.new_zeros(*tensor.shape, 1),
        tensor.new_zeros(max(1, len(tensor.shape)) * [3]),
        torch.zeros(tensor.shape, dtype=torch.bool),
        torch.zeros(tensor.shape, dtype=torch.complex64),
        torch.zeros(0),
    ]
    if "result" in file.name or "scores" in file.name:
        del changes[0]  # scores may be NaN
    if rng.random() < 0.2:
        tensors[f"{name}2"] = tensors.pop(name)
    elif rng.random() < 0.1:
        tensors = {}
    else:
        tensors[name] = rng.choice(changes)
    write_tensors(file, tensors, {key: value for key, value in metadata.items() if "sha256" not in key})


DAMAGES = (
    *(flip, truncate, delete, swap, overwrite, append, retouch, empty, into_folder, rename, duplicate, deny, only_read),
    *(header, line_ends, encoding, pack, hole, mix, exchange, linked, closed),
    *(flip, senseless, senseless),  # more often
)


@contextmanager
def unprivileged() -> Iterator[None]:
    """Read as somebody to whom permissions apply; they do not to root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def denied(file: Path) -> bool:
    """Whether nobody may read it, or enter its folder."""
    return not (file.parent.stat().st_mode & 0o111 and (not file.is_file() or file.stat().st_mode & 0o444))


def outcome(kind: str, path: Path, file: Path, reference: subject.Reading) -> str:
    """Read a damaged directory, and say what came of it."""
    try:
        with unprivileged() if denied(file) else nullcontext():
            found = subject.read(kind, path)
    except AttributionError as error:
        return "named" if file.name in str(error) or str(path) in str(error) else "raw"
    except Exception:  # what the user must never see is what is counted here
        return "raw"
    missing = reference.keys() - found.keys()
    gone = not file.is_file() and (kind == "truth" or file.parent.name == "computed")  # it is made again
    same = all(_equal(value, reference.get(name)) for name, value in found.items())
    return "harmless" if same and (gone or not missing) else "silent"


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return bool(a == b) or (a != a and b != b)


def attempt(
    rng: random.Random, source: Path, file: Path, others: list[Path], reference: subject.Reading, damaged: Path
) -> tuple[str, str]:
    """Damage a file in a copy of its directory until something has changed; give the damage, and what came of it."""
    while True:
        shutil.copytree(source, damaged)
        target = damaged / file.relative_to(source)
        damage, before = rng.choice(DAMAGES), state(damaged)
        damage(rng, target, others)
        changed = state(damaged) != before
        found = outcome(source.parent.name, damaged, target, reference) if changed else ""
        for path in (damaged, *damaged.rglob("*")):
            if not path.is_symlink():
                path.chmod(0o700)
        shutil.rmtree(damaged)
        if changed:
            return damage.__name__, found


def state(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """All that lies in a folder, and who may do what with it."""
    return {path: (path.lstat().st_mode, path.read_bytes() if path.is_file() else b"") for path in folder.rglob("*")}


def rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Try ``options.damages`` damages, and count what came of them by kind of file."""
    rng, counts = random.Random(options.seed), defaultdict[str, Counter[str]](Counter)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name).resolve()
        place.chmod(0o755)
        whole, damaged = place / "whole", place / _DAMAGED
        kinds = getattr(options, "kinds", None) or list(subject.KINDS)
        subject.make(whole, kinds)
        subject.know_factors(whole)
        files = defaultdict[str, list[Path]](list)
        for file in sorted(file for file in whole.rglob("*") if file.is_file()):
            files[subject.kind_of(file, whole)].append(file)
        references = {kind: subject.read(kind, whole / kind / "a") for kind in kinds}
        for number in range(options.damages):
            what = sorted(files)[number % len(files)]
            kind = what.split()[0]
            file = rng.choice([f for f in files[what] if f.relative_to(whole).parts[1] == "a"])
            others = [other for other in files[what] if other != file and other.suffix == file.suffix]
            name_of, found = attempt(rng, whole / kind / "a", file, others, references[kind], damaged)
            counts[what][found] += 1
            if found in {"raw", "silent"}:
                print(f"{found}: {name_of} of {file.relative_to(whole)} (damage {number})")
    return [
        {"table": "damages", "what": what, "tried": sum(own.values()), **{name: own[name] for name in OUTCOMES}}
        for what, own in sorted(counts.items())
    ]
