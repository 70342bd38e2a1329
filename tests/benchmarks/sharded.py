"""Memory of each process that trains and records a model divided by `fully_shard`, on 1, 2 and 4 of them.

One table: the most that a process takes beyond what it took before the model was made, while it trains with Adam, while
it is checked on a few samples at the start, and while it records a snapshot with features; in multiples of the model's
bytes as well. All processes share one machine; memory does not depend on what else runs there.

    python tests/benchmarks/sharded.py [--width 2048] [--depth 12] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_attr import AttributionMixin
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.methods import TRAK

PROCESSES = (1, 2, 4)
ROWS, BATCH = 32, 8


class Wide(AttributionMixin, L.LightningModule):
    """A stack of square layers, each divided."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.width, self.depth = width, depth
        self.network: Any = None

    def configure_model(self) -> None:
        if self.network is None:
            mesh = self.device_mesh["data_parallel"]
            with torch.device("meta"):
                layers = [nn.Linear(self.width, self.width, bias=False) for _ in range(self.depth)]
            self.network = nn.Sequential(*(fully_shard(layer, mesh=mesh) for layer in layers))
            fully_shard(self.network, mesh=mesh)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-5)


def highest(begin: bool = False) -> int:
    """The most memory since the last beginning, bytes."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text("utf-8").splitlines())
    if begin:
        Path("/proc/self/clear_refs").write_text("5", "utf-8")
    return int(status["VmHWM"].split()[0]) * 1024


class Meter(L.Callback):
    """Notes memory between the moments of a run; before and after the callback that records."""

    def __init__(self, seen: dict[str, int], last: bool) -> None:
        self.seen, self.last = seen, last

    def setup(self, *_: Any, **__: Any) -> None:
        if not self.last:
            self.seen["before"] = highest(begin=True)

    def on_train_start(self, *_: Any) -> None:
        self.seen["made" if not self.last else "checked"] = highest(begin=True)

    def on_train_epoch_end(self, *_: Any) -> None:
        self.seen["trained" if not self.last else "recorded"] = highest(begin=True)


def measure(count: int, width: int, depth: int, folder: Path) -> None:
    """What each process runs: two epochs, of which the second is in the table."""
    torch.set_num_threads(1)
    seen: dict[str, int] = {}
    recorder = AttributionCallback(folder / "store", TRAK(proj_dim=256), featurize=True, log=False, on_error="raise")
    trainer = L.Trainer(
        accelerator="cpu", devices=count, max_epochs=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        strategy=ModelParallelStrategy(data_parallel_size=count, tensor_parallel_size=1),
        callbacks=[Meter(seen, last=False), recorder, Meter(seen, last=True)],
    )  # fmt: skip
    x = torch.randn(ROWS, width, generator=torch.Generator().manual_seed(0))
    trainer.fit(Wide(width, depth), DataLoader(TensorDataset(x, torch.arange(ROWS) % 10), BATCH))
    (folder / f"{trainer.global_rank}.json").write_text(json.dumps(seen), "utf-8")
    torch.distributed.destroy_process_group()


def row(count: int, width: int, depth: int) -> dict[str, Any]:
    """The most of all processes, in MB and in sizes of the model."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--processes", count, "--width", width, "--depth", depth, "--into", folder]
        subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
        ranks = [json.loads((Path(folder) / f"{rank}.json").read_text("utf-8")) for rank in range(count)]
    size = 4 * width * width * depth
    found: dict[str, Any] = {"processes": count, "model MB": size / 1e6}
    for phase in ("checked", "trained", "recorded"):
        most = max(rank[phase] - rank["before"] for rank in ranks)
        found |= {f"{phase} MB": most / 1e6, phase: most / size}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--processes", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.processes is not None:
        measure(given.processes, given.width, given.depth, given.into)
        return
    rows = []
    print("| processes | training | the check at the start | recording a snapshot |\n|---|---|---|---|")
    for count in PROCESSES:
        rows.append(one := row(count, given.width, given.depth))
        cells = (f"{one[f'{phase} MB']:,.0f} MB ({one[phase]:.1f})" for phase in ("trained", "checked", "recorded"))
        print(f"| {one['processes']} | {' | '.join(cells)} |", flush=True)
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=1), "utf-8")


if __name__ == "__main__":
    main()
