"""Scoring at scale: features on disk, scored by TRAK for many targets, in seconds, as a share of plain GEMM, in memory.

    python tests/benchmarks/score.py [--rows 100000] [--dim 2048] [--targets 1000] [--topk 10] [--json FILE]

writes a synthetic store of float16 shards into a temporary folder, then scores it from there, keeping the strongest
scores only; with `--dense` the whole score matrix as well. "Plain GEMM" is one float32 matrix product a block for each
of the kernel, the scores and self-influence, on data in memory, timed before and after. The kernel and self-influence
need only half of the multiplications, so that their share can be above 100 %.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_attr import FeatureStore
from lightning_attr.attribution.scoring import score
from lightning_attr.methods import TRAK, SnapshotFeatures
from lightning_attr.methods.kernels import feature_kernel as kernel
from lightning_attr.results import top_scores
from lightning_attr.store.manifest import Fingerprint

Seconds = dict[str, float]
LIMIT = 8 * 2**30


class TimedTRAK(TRAK):
    """TRAK that notes how long its parts take, and what of it was reading."""

    def __init__(self, seconds: Seconds) -> None:
        super().__init__()
        self.seconds = seconds

    def solve(self, snapshot: SnapshotFeatures) -> Any:
        return timed(self.seconds, "kernel, with reading", super().solve)(snapshot)


def timed(seconds: Seconds, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Add up what the calls of a function take."""

    def call(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[name] += time.perf_counter() - begin

    return call


def synthetic_columns(rows: range, dim: int) -> dict[str, Tensor]:
    """Features of unequal directions, and figures of a classifier that is right four times of five."""
    generator = torch.Generator().manual_seed(rows.start)
    q = torch.rand(len(rows), generator=generator).pow(4)
    features = torch.randn(len(rows), dim, generator=generator) * torch.linspace(2, 0.2, dim)
    return {
        "features": features,
        "output": -q.logit(),
        "loss": -(1 - q).log(),
        "out_to_loss": q,
        "newton_weight": q * (1 - q),
    }


def make_store(folder: Path, rows: int, dim: int) -> FeatureStore:
    """Write the shards one by one."""
    store = FeatureStore.create(folder, Fingerprint(rows, None, {"w": (2,)}, None))
    store.add_snapshot("final", {"w": torch.ones(2)}, epoch=0, global_step=1, learning_rate=1.0)
    for shard in store.missing("final"):
        store.write_shard("final", shard, synthetic_columns(store.rows(shard), dim))
    return store


def measure(store: FeatureStore, targets: dict[str, Tensor], topk: int | None, folder: Path) -> Seconds:
    """Score all rows once."""
    seconds: Seconds = defaultdict(float)

    def blocks() -> Iterator[Any]:
        reader = store.blocks("final")
        while (block := timed(seconds, "reading", lambda: next(reader, None))()) is not None:
            yield block

    timings = [
        (kernel, "squared_norms", "self-influence"),
        (top_scores.TopScoresSum, "add", "keeping the strongest"),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in timings]
    for owner, name, label in timings:
        setattr(owner, name, timed(seconds, label, getattr(owner, name)))
    try:
        snapshot = SnapshotFeatures(blocks, targets)
        begin = time.perf_counter()
        score(TimedTRAK(seconds), [snapshot], store.fingerprint.length, topk, lambda: folder)
        total = time.perf_counter() - begin
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)
    return {**seconds, "scoring": total - sum(seconds.values()), "total": total}


def plain_gemm(rows: int, dim: int, targets: int) -> Seconds:
    """Plain products of the same shapes, the median of a few blocks times how many there are."""
    block, inner = torch.randn(4096, dim), {"kernel, with reading": None, "self-influence": dim, "scoring": targets}
    found = {}
    for name, width in inner.items():
        right = None if width is None else torch.randn(dim, width)
        times = []
        for _ in range(7):
            begin = time.perf_counter()
            block.T @ block if right is None else block @ right
            times.append(time.perf_counter() - begin)
        found[name] = sorted(times)[3] * rows / len(block)
    return {**found, "total": sum(found.values())}


def memory(field: str) -> int:
    """Bytes of this process, by name in /proc/self/status."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def report(title: str, seconds: Seconds, plain: Seconds) -> None:
    print(f"\n{title}")
    for name, value in seconds.items():
        share = f"{plain[name] / value:9.0%} of plain GEMM ({plain[name]:.1f} s)" if name in plain else ""
        print(f"  {name:26}{value:9.1f} s{share}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--targets", type=int, default=1000)
    parser.add_argument("--topk", type=int, default=10)
    parser.add_argument("--dense", action="store_true", help="build the whole score matrix as well")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows, dim = arguments.rows, arguments.dim
    with tempfile.TemporaryDirectory(prefix="lightning_attr-") as name:
        needed, free = rows * (2 * dim + 4 * arguments.targets * arguments.dense), shutil.disk_usage(name).free
        if needed > 0.9 * free:
            raise SystemExit(f"{rows:,} rows need {needed:,} bytes in {name}, where {free:,} are free: set TMPDIR.")
        print(f"{rows:,} x {dim:,} features, {arguments.targets:,} targets, {torch.get_num_threads()} threads")
        begin = time.perf_counter()
        make_store(Path(name) / "store", rows, dim)
        print(f"writing the store {time.perf_counter() - begin:.1f} s")
        Path("/proc/self/clear_refs").write_text("5")  # peak memory from here on
        targets = synthetic_columns(range(rows, rows + arguments.targets), dim)
        found = {}
        for kind in ("topk", "dense") if arguments.dense else ("topk",):
            store = FeatureStore.open(Path(name) / "store")  # anew: the first reading checks the checksums
            before = plain_gemm(rows, dim, arguments.targets)
            found[kind] = measure(store, targets, arguments.topk if kind == "topk" else None, Path(name))
            after = plain_gemm(rows, dim, arguments.targets)
            plain = {part: (before[part] + after[part]) / 2 for part in before}
            report("the strongest scores" if kind == "topk" else "the whole score matrix", found[kind], plain)
            peak, mapped = memory("VmHWM"), memory("RssFile")
            print(f"  peak memory {peak / 2**30:.2f} GiB, {'under' if peak < LIMIT else 'NOT under'} 8 GiB", end="")
            print(f" ({mapped / 2**30:.2f} GiB of it mapped files, which the system takes back at need)")
            found[kind] |= {"plain": plain, "peak_bytes": peak, "mapped_bytes": mapped}
    if arguments.json:
        arguments.json.write_text(json.dumps({**vars(arguments), "json": None, **found}, indent=1))


if __name__ == "__main__":
    main()
