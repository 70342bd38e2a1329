"""What a replay costs: processor seconds of MAGIC and TrajectoryInfluence beside those of the training.

python tests/benchmarks/magic.py
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_attr import AttributionMixin, AttributionTrainer
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.methods import MAGIC, TrajectoryInfluence

EPOCHS, BATCH = 10, 64


class Net(AttributionMixin, L.LightningModule):
    """An MLP of 4,810 parameters, trained by AdamW with a cosine schedule."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.net(x)
        return found

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.01)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * 16)
        return [optimizer], [{"scheduler": cosine, "interval": "step"}]


def trained(train: DataLoader[Any], callbacks: list[L.Callback]) -> AttributionTrainer:
    L.seed_everything(0, verbose=False)
    trainer = AttributionTrainer(
        max_epochs=EPOCHS, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=callbacks,
    )  # fmt: skip
    trainer.fit(Net(), train)
    return trainer


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    found = run()
    return time.process_time() - start, found


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16).float(), torch.tensor(labels))
    train = DataLoader(Subset(data, range(1000)), batch_size=BATCH, shuffle=True)
    trained(train, [])
    training, _ = seconds(lambda: trained(train, []))
    print("| method | targets | trainings | largest drift |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        recorder = AttributionCallback(store, snapshots="start+geometric", featurize=False, log=False)
        trainer = trained(train, [recorder])
        for method in (MAGIC(), TrajectoryInfluence("gram")):
            for count in (1, 20):
                targets = DataLoader(Subset(data, range(1000, 1000 + count)), batch_size=count)
                loaders = {"train_dataloaders": train, "target_dataloaders": targets}
                took, result = seconds(lambda: trainer.attribute(method=method, store=store, **loaders))  # noqa: B023
                (evidence,) = result.scores.provenance["evidence"].values()
                drift = max(evidence["drift"].values())
                print(f"| {type(method).__name__} | {count} | {took / training:.1f} | {drift:.1g} |")


if __name__ == "__main__":
    main()
