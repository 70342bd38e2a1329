"""In-run data value on digits with a tenth of the labels wrong: what it costs, and whether it finds them.

Run `python tests/benchmarks/in_run.py [--repeats N]`. Each repeat trains once for every row, in turn; costs are
medians, in processor seconds over those of a training that is recorded and not looked at.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings

import torch
from lightning.pytorch import Trainer
from sklearn.metrics import roc_auc_score  # type: ignore[import-untyped]  # ships no types
from torch import Tensor
from torch.utils.data import TensorDataset

from digits import SETTINGS, DigitsData, DigitsMLP
from lightning_attr.callbacks import AttributionCallback, InRunDataValue

EPOCHS = 10
ROWS = (None, 20, 5, 1)  # every so many steps; None does not look


def noisy(data: DigitsData) -> Tensor:
    """Give every tenth training sample another label; which they are, `(n_train,)`."""
    x, y = data.train_set.tensors
    generator = torch.Generator().manual_seed(0)
    wrong = torch.rand(len(y), generator=generator) < 0.1
    shift = torch.randint(1, 10, (len(y),), generator=generator)
    data.train_set = TensorDataset(x, torch.where(wrong, (y + shift) % 10, y))
    return wrong


def run(every: int | None, seed: int) -> tuple[float, float | None]:
    """Train once: processor seconds, and the AUROC of low values for wrong labels."""
    data = DigitsData(SETTINGS["mlp"])
    wrong = noisy(data)
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        looks = None if every is None else InRunDataValue(data.test_dataloader(), every=every)
        callbacks = [AttributionCallback(folder, featurize=False, snapshots=[EPOCHS - 1], log=False)]
        trainer = Trainer(
            max_epochs=EPOCHS,
            callbacks=[*callbacks, *([] if looks is None else [looks])],
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        model, begun = DigitsMLP(), time.process_time()
        trainer.fit(model, datamodule=data)
        seconds = time.process_time() - begun
    return seconds, None if looks is None else float(roc_auc_score(wrong, -looks.values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    run(5, 0)  # what only the first training pays
    found = [{every: run(every, seed) for every in ROWS} for seed in range(repeats)]
    print("| looked at | cost | AUROC of wrong labels |\n|---|---|---|")
    for every in ROWS[1:]:
        cost = statistics.median(rows[every][0] / rows[None][0] for rows in found)
        auroc = statistics.median(rows[every][1] or 0.0 for rows in found)
        print(f"| every {every} steps | {cost:.2f} | {auroc:.3f} |")
    print(f"a training: {statistics.median(rows[None][0] for rows in found):.2f} processor seconds")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    main()
