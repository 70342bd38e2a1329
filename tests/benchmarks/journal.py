"""What the journal of a run costs: processor seconds of trainings with and without it, by turns, and bytes on disk.

    python tests/benchmarks/journal.py [--repeats N]

Both trainings have the callback with a snapshot at the end and no features, and end with the same bits. Their steps
take one to five milliseconds: the share in a training with longer steps is smaller in proportion.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import lightning as L
import torch
from torch import Tensor

from digits import SETTINGS, DigitsClassifier, DigitsData
from lightning_attr.callbacks import AttributionCallback


def trained(name: str, folder: Path, journal: bool) -> tuple[float, list[Tensor]]:
    """Processor seconds of a training, and its weights."""
    setting = SETTINGS[name]
    L.seed_everything(0, verbose=False)
    module, data = DigitsClassifier(setting), DigitsData(setting)
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    recorder = AttributionCallback(folder, snapshots=[], featurize=False, journal=journal)
    trainer = L.Trainer(max_epochs=setting.epochs, accelerator="cpu", callbacks=[recorder], **off)
    begin = time.process_time()
    trainer.fit(module, datamodule=data)
    return time.process_time() - begin, list(module.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning_attr").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    print(
        "| digits | training (s) | with the journal | quartiles | microseconds per step | bytes per sample and epoch |"
    )
    print("|---|---|---|---|---|---|")
    for name in SETTINGS:
        ratios, plain, spent = [], [], []
        for _ in range(arguments.repeats + 1):  # the first one warms up
            with tempfile.TemporaryDirectory() as without, tempfile.TemporaryDirectory() as kept:
                seconds, weights = trained(name, Path(without), journal=False)
                journalled, same = trained(name, Path(kept), journal=True)
                assert all(map(torch.equal, weights, same))
                size = sum(file.stat().st_size for file in (Path(kept) / "journal").rglob("*") if file.is_file())
            ratios.append(journalled / seconds)
            plain.append(seconds)
            spent.append(journalled - seconds)
        setting = SETTINGS[name]
        samples = len(DigitsData(setting).train_dataloader().dataset)
        steps = setting.epochs * -(-samples // setting.batch_size)
        low, middle, high = statistics.quantiles(ratios[1:], n=4)
        cost = 1e6 * statistics.median(spent[1:]) / steps
        print(f"| {name} | {statistics.median(plain[1:]):.2f} | {middle:.3f} | {low:.3f} to {high:.3f} | {cost:.0f} | "
              f"{size / samples / setting.epochs:.1f} |")  # fmt: skip


if __name__ == "__main__":
    main()
