"""Linear datamodeling score of one run of a character language model, through the callback.

Run `python tests/benchmarks/language_model.py [--cache DIR] [--json FILE]`. Model, text and ground truth are those of
`one_run_text.py`; all 128 targets, on the `report` subsets. The damping of EK-FAC was chosen on the `tune` subsets.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from one_run_text import BATCH_SIZE, EPOCHS, adamw, ground_truth, load, log_likelihood, start
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from digits import CACHE
from lightning_attr import AttributionMixin, AttributionTrainer
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.methods import TRAK, AttributionMethod, GradDot, Influence
from lightning_attr.metrics import linear_datamodeling_score
from lightning_attr.outputs import LanguageModel


class LastTRAK(TRAK):
    """TRAK at the end of the run."""

    def select(self, snapshots: Sequence[Any]) -> Sequence[Any]:
        return snapshots[-1:]


ROWS: dict[str, AttributionMethod] = {
    "TRAK, start and geometric snapshots": TRAK(),
    "TRAK, last snapshot": LastTRAK(),
    "Grad-Dot, last snapshot": GradDot(),
    "EK-FAC, last snapshot": Influence("empirical_fisher", damping=0.01),
    "EK-FAC, start and geometric snapshots": Influence("empirical_fisher", damping=0.01, snapshots="all"),
}


class CharacterModule(AttributionMixin, L.LightningModule):
    """What is attributed is the mean log-likelihood of a sequence, which is also what training maximises."""

    model_output = LanguageModel(kind="mean_loss", shift=False)  # inputs and labels are shifted already

    def __init__(self, vocabulary: int, steps: int) -> None:
        super().__init__()
        self.network = start(vocabulary, seed=0)
        self.steps = steps

    def attribution_step(self, batch: Any) -> tuple[Tensor, Tensor]:
        (sequences,) = batch
        return self.network(sequences[:, :-1]), sequences[:, 1:]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (sequences,) = batch
        return -log_likelihood(self.network(sequences[:, :-1]), sequences).mean()

    def configure_optimizers(self) -> Any:
        optimizer, schedule = adamw(self.network, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    """Train once, score by each method, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    masks, outputs = ground_truth("report", arguments.cache)
    train, targets, vocabulary = load()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        callback = AttributionCallback(folder, snapshots="start+geometric", log=False)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = AttributionTrainer(
            max_epochs=EPOCHS, callbacks=[callback], enable_checkpointing=False, accelerator="cpu", **quiet
        )
        torch.manual_seed(0)
        module = CharacterModule(vocabulary, EPOCHS * -(-len(train) // BATCH_SIZE))
        trainer.fit(module, DataLoader(TensorDataset(train), BATCH_SIZE, shuffle=True))
        loader = DataLoader(TensorDataset(targets), BATCH_SIZE)
        for name, method in ROWS.items():
            scores = trainer.attribute(target_dataloaders=loader, method=method).scores.values
            lds = linear_datamodeling_score(scores, masks, outputs)
            figures = {key: getattr(lds, key).item() for key in ("mean", "low", "high", "ceiling")}
            rows.append({"what": name, **figures})
            print(f"{name:40} {figures['mean']:.3f}  {figures['low']:.3f} to {figures['high']:.3f}", flush=True)
    print(f"{'noise ceiling':40} {rows[0]['ceiling']:.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
