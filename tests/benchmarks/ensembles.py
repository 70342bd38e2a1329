"""What snapshots and pilots add on scikit-learn's digits: linear datamodeling score, and cost in trainings.

Run `python tests/benchmarks/ensembles.py [--setting mlp|cnn] [--subsets tune|report] [--rows TEXT] [--cache DIR]`.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from digits import CACHE, SETTINGS, SUBSET_SEEDS, DigitsClassifier, DigitsData, Setting, ground_truth
from lightning_attr import AttributionTrainer, FeatureStore
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.methods import TRAK
from lightning_attr.metrics import linear_datamodeling_score
from lightning_attr.pilots import Pilots


@dataclass(frozen=True)
class Row:
    """A recipe: snapshots of the run, pilots, and which of them score."""

    snapshots: Any = "geometric"
    pilots: int = 0
    epochs: int | None = None
    run: bool = True
    exact: bool = False


START, EARLY = "start+geometric", "early+geometric"
ROWS: dict[str, Row] = {
    "last snapshot": Row([]),
    "geometric": Row(),
    "start+geometric": Row(START),
    "early+geometric": Row(EARLY),
    "all epochs": Row("all"),
    "geometric, 1 pilot": Row(pilots=1),
    "geometric, 2 pilots": Row(pilots=2),
    "geometric, 4 pilots": Row(pilots=4),
    "early+geometric, 1 pilot": Row(EARLY, pilots=1),
    "early+geometric, 2 pilots": Row(EARLY, pilots=2),
    "early+geometric, 4 pilots": Row(EARLY, pilots=4),
    "last snapshot, 2 pilots": Row([], pilots=2),
    "2 pilots alone": Row([], pilots=2, run=False),
    "4 pilots alone": Row([], pilots=4, run=False),
    "exact, geometric": Row(exact=True),
    "exact, start+geometric": Row(START, exact=True),
    "exact, early+geometric": Row(EARLY, exact=True),
    "exact, geometric, 2 pilots": Row(pilots=2, exact=True),
    "exact, early+geometric, 1 pilot": Row(EARLY, pilots=1, exact=True),
    "exact, early+geometric, 2 pilots": Row(EARLY, pilots=2, exact=True),
    "exact, early+geometric, 4 pilots": Row(EARLY, pilots=4, exact=True),
    "exact, 2 pilots alone": Row([], pilots=2, run=False, exact=True),
}


def scores_of(setting: Setting, row: Row, seed: int) -> Tensor:
    """One training run with the callback, its pilots, and the scores of all that the row takes."""
    method = TRAK(exact=row.exact)
    pilots = Pilots(row.pilots, lambda: DigitsClassifier(setting), epochs=row.epochs) if row.pilots else None
    with tempfile.TemporaryDirectory() as folder:
        trainer = fit(setting, seed, AttributionCallback(folder, method, row.snapshots))
        result = trainer.attribute(pilots=pilots)
        if not row.run:
            store = FeatureStore.open(folder)
            store.set_aside([snapshot.key for snapshot in store.snapshots if snapshot.pilot is None])
            result = trainer.attribute(pilots=pilots)
        return result.scores.values


def fit(setting: Setting, seed: int, *callbacks: L.Callback) -> AttributionTrainer:
    """One training run."""
    L.seed_everything(seed, verbose=False)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = AttributionTrainer(
        max_epochs=setting.epochs, accelerator="cpu", callbacks=list(callbacks), enable_model_summary=False, **quiet
    )
    trainer.fit(DigitsClassifier(setting), datamodule=DigitsData(setting))
    return trainer


def seconds_of(work: Callable[[], Any]) -> tuple[Any, float]:
    """Processor seconds of this process, which other processes change less than those of a clock."""
    start = time.process_time()
    found = work()
    return found, time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--setting", choices=SETTINGS, default="mlp")
    parser.add_argument("--rows", nargs="+", default=[""], help="only those with one of these texts in their names")
    parser.add_argument("--subsets", choices=SUBSET_SEEDS, default="report", help="choose defaults on `tune` only")
    parser.add_argument("--seed", type=int, default=0, help="of the run")
    parser.add_argument("--cache", type=Path, default=CACHE, help="directory of the ground truth")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")

    setting = SETTINGS[arguments.setting]
    masks, outputs = ground_truth(setting, arguments.subsets, arguments.cache)
    fit(setting, arguments.seed)  # the first takes longer
    _, training = seconds_of(lambda: fit(setting, arguments.seed))
    print(f"digits, {setting.name}, subsets `{arguments.subsets}`, run of seed {arguments.seed}")
    print(f"one training: {training:.2f} s of a processor; cost: all trainings and passes, over that")
    print(f"{'':44}{'LDS':>6}  {'95 % interval':16}{'cost':>6}")
    for name, row in ROWS.items():
        if any(text in name for text in arguments.rows):
            scores, seconds = seconds_of(lambda row=row: scores_of(setting, row, arguments.seed))
            mean, low, high, *_ = linear_datamodeling_score(scores, masks, outputs)
            print(f"{name:44}{mean:6.3f}  {f'{low:.3f} to {high:.3f}':16}{seconds / training:6.1f}", flush=True)


if __name__ == "__main__":
    main()
