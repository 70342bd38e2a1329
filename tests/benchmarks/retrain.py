"""Ground truth by retraining: seconds per model by plain `Trainer.fit`, by `retrain_lds`, and with many models at once.

    python tests/benchmarks/retrain.py [--settings lr mlp cnn] [--subsets 24] [--seeds 1] [--vectorise 64] [--json FILE]

on the digits settings. With `--subsets 100 --seeds 3` that is the whole ground truth, each way. Plain `Trainer.fit` is
a loop with a new module and Trainer for each subset, which computes no outputs; half of it
runs before and half after the models at once. Float32 outputs differ by rounding, which training makes larger.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

import digits
from lightning_attr.evaluation import GroundTruth, retrain_lds
from lightning_attr.evaluation.ground_truth import Records

LR = digits.Setting("lr", lambda: nn.Sequential(nn.Linear(64, 10)), (64,), epochs=20)
SETTINGS = {"lr": LR, **digits.SETTINGS}


def trainer_of(setting: digits.Setting) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    return L.Trainer(
        max_epochs=setting.epochs, accelerator="cpu", enable_progress_bar=False, limit_val_batches=0, **quiet
    )


def plain_fits(setting: digits.Setting, records: Records, part: slice) -> None:
    """What a user's script does."""
    for retraining in list(records.plan)[part]:
        L.seed_everything(retraining.seed, verbose=False)
        kept = records.plan.masks[retraining.subset].nonzero().flatten().tolist()
        loader = DataLoader(Subset(digits.DigitsData(setting).train_set, kept), digits.BATCH_SIZE, shuffle=True)
        trainer_of(setting).fit(digits.DigitsClassifier(setting), loader)


def timed(function: Callable[[], Any]) -> tuple[Tensor, Any]:
    """Seconds, and seconds of the processor, which other load changes less."""
    start, start_cpu = time.perf_counter(), time.process_time()
    found = function()
    return torch.tensor([time.perf_counter() - start, time.process_time() - start_cpu]), found


def measure(setting: digits.Setting, subsets: int, seeds: int, vectorise: Any) -> dict[str, Any]:
    """Train the same models three ways."""
    parts = (
        partial(digits.DigitsClassifier, setting),
        partial(trainer_of, setting),
        partial(digits.DigitsData, setting),
    )
    with tempfile.TemporaryDirectory(prefix="lightning_attr-") as name:

        def truth(way: str, vectorise: Any) -> GroundTruth:
            settings = {"num_subsets": subsets, "seeds": seeds, "vectorise": vectorise, "progress": False}
            return retrain_lds(*parts, dirpath=Path(name) / way, **settings)

        one_at_a_time, one = timed(lambda: truth("one", False))
        records, half = Records(Path(name) / "one"), subsets * seeds // 2
        before, _ = timed(lambda: plain_fits(setting, records, slice(half)))
        at_once, many = timed(lambda: truth("many", vectorise))
        after, _ = timed(lambda: plain_fits(setting, records, slice(half, None)))
    count, plain = subsets * seeds, before + after
    apart = (many.outputs - one.outputs).abs()
    return {
        "retrainings": count,
        "Trainer.fit": float(plain[0]) / count,
        "one at a time": float(one_at_a_time[0]) / count,
        "at once": float(at_once[0]) / count,
        "share of Trainer.fit": float(at_once[0] / plain[0]),
        "share of its processor time": float(at_once[1] / plain[1]),
        "median difference": float(apart.median()),
        "largest difference": float(apart.max()),
        "standard deviation": float(one.outputs.std()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["lr", "mlp"])
    parser.add_argument("--subsets", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--vectorise", type=int, help="models at once; by default what `vectorise=True` takes")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    found = {}
    print(f"{torch.get_num_threads()} threads; seconds a retraining, and the share of Trainer.fit (in processor time)")
    print(f"{'setting':8}{'models':>7}{'Trainer.fit':>13}{'one at a time':>15}{'at once':>9}{'share':>13}", end="")
    print("   difference of outputs: median, largest (their standard deviation)")
    for name in arguments.settings:
        row = measure(SETTINGS[name], arguments.subsets, arguments.seeds, arguments.vectorise or True)
        found[name] = row
        print(
            f"{name:8}{row['retrainings']:7}{row['Trainer.fit']:13.3f}{row['one at a time']:15.3f}{row['at once']:9.3f}"
            f"{row['share of Trainer.fit']:6.2f} ({row['share of its processor time']:.2f})"
            f"   {row['median difference']:.0e}, {row['largest difference']:.0e} ({row['standard deviation']:.1f})",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
