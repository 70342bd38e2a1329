"""What writing the store and loading the data cost while features are computed.

One table, in one run: seconds to featurize a CNN's training set with shards written in the background (as always),
inline (the writer is waited for after every batch) and not at all; then with a data set whose samples take 2 ms each to
read, by 0 and 2 workers. Medians of several repeats, which take turns; ratios are to the reference of the same repeat.

    python tests/benchmarks/overlap.py --json overlap.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_attr import AttributionMixin, FeatureStore
from lightning_attr.data.loader import DataSource, OrderedLoader
from lightning_attr.features.featurizer import Featurizer, plan
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.projectors import KroneckerProjector
from lightning_attr.store.manifest import Fingerprint
from lightning_attr.store.shard_writer import ShardWriter

READING = 0.002
"""Seconds to read a slow sample."""
BACKGROUND, INLINE, NOTHING = "written in the background", "written inline", "not written"


class CNN(AttributionMixin, nn.Sequential):
    """Four convolutions, 0.3 million parameters, for 16x16 images."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(128, 128, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10),
        )  # fmt: skip


class Images(Dataset[tuple[Tensor, int]]):
    """Random images, read at once or slowly."""

    def __init__(self, rows: int, reading: float) -> None:
        self.images = torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        self.reading = reading

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        if self.reading:
            time.sleep(self.reading)
        return self.images[row], row % 10


def featurize(module: Any, rows: int, batch_size: int, writing: str, reading: float = 0.0, workers: int = 0) -> float:
    """Seconds to featurize all rows, the last shard's way to the disk included."""
    source = DataSource.of(DataLoader(Images(rows, reading), batch_size, num_workers=workers), "training")
    layout = ParameterLayout.of(module)
    probe = [part[:4] for part in next(iter(DataLoader(Images(4, 0.0), 4)))]
    featurizer = Featurizer(module, plan(module, probe, 4), KroneckerProjector(2048).bind(layout, "final"))
    with tempfile.TemporaryDirectory() as folder:
        store = FeatureStore.create(folder, Fingerprint(rows, None, layout.shapes, None), batch_size=batch_size)
        store.add_snapshot("final", {"w": torch.ones(1)}, epoch=0, global_step=1, learning_rate=0.1)
        start = time.perf_counter()
        with ShardWriter(store, "final") as writer:
            for numbers, batch in OrderedLoader(source, source.batches(range(rows))):
                columns = featurizer(batch, numbers)
                if writing != NOTHING:
                    writer.add(numbers, columns)
                if writing == INLINE:
                    writer.close()
        taken = time.perf_counter() - start
        assert bool(store.missing("final")) == (writing == NOTHING)
    return taken


def in_turns(runs: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Run everything once unmeasured, then again and again, one after the other."""
    for run in runs.values():
        run()
    found: dict[str, list[float]] = {what: [] for what in runs}
    for _ in range(repeats):
        for what, run in runs.items():
            found[what].append(run())
    return found


def table(title: str, found: dict[str, list[float]], reference: str) -> list[dict[str, Any]]:
    """Print medians, and return them as rows."""
    print(f"\n{title}\n{'':44}{'seconds':>9}{'ratio':>8}")
    rows = []
    for what, seconds in found.items():
        ratio = statistics.median(a / b for a, b in zip(seconds, found[reference], strict=True))
        rows.append({"table": title, "what": what, "seconds": statistics.median(seconds), "ratio": ratio})
        print(f"{what:44}{rows[-1]['seconds']:9.3f}{ratio:8.3f}")
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096, help="training samples (default: %(default)s)")
    parser.add_argument("--slow-rows", type=int, default=1024, help="of the slow data set (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    settings = parser.parse_args(arguments)
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    module, size = CNN().eval(), settings.batch_size

    def run(rows: int, **how: Any) -> Callable[[], float]:
        return lambda: featurize(module, rows, size, **how)

    writing = {what: run(settings.rows, writing=what) for what in (BACKGROUND, INLINE, NOTHING)}
    title = f"{settings.rows:,} samples, CNN, 2,048 features, float16, {settings.threads} thread(s)"
    rows = table(title, in_turns(writing, settings.repeats), NOTHING)
    share = rows[0]["ratio"] - 1
    print(f"writing costs {100 * share:.1f} % of the time that features take")

    slow = settings.slow_rows
    loading = {
        "read at once": run(slow, writing=BACKGROUND),
        "read slowly, 0 workers": run(slow, writing=BACKGROUND, reading=READING),
        "read slowly, 2 workers": run(slow, writing=BACKGROUND, reading=READING, workers=2),
    }
    title = f"{slow:,} samples, reading them takes {slow * READING:.1f} s"
    rows += table(title, in_turns(loading, min(settings.repeats, 3)), "read at once")
    if settings.json:
        settings.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
