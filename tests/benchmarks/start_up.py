"""What the checks before the first step cost, in seconds of one processor, by the projection of the features.

Run `python tests/benchmarks/start_up.py [--repeats N] [--work resnet9 transformer]`. Each repeat starts a fresh run
with every projection in turn; the figures are medians, and the ratio that of the pairs to the random projection.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from typing import Any

import lightning as L
import torch
from networks import WORKS, Work
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_attr import AttributionMixin
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.methods import TRAK
from lightning_attr.projectors import EigenProjector, KroneckerProjector, Projector

ROWS = 512
PROJECTORS: dict[str, type[Projector]] = {"random Kronecker": KroneckerProjector, "eigenbasis": EigenProjector}


class Classifier(AttributionMixin, L.LightningModule):
    """A work as people train it."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.network = work.network()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Timed(AttributionCallback):
    """Takes the time of its start, and ends the run there."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        start = time.process_time()
        super().on_train_start(trainer, pl_module)
        self.seconds = time.process_time() - start
        trainer.should_stop = True


def seconds(work: Work, projector: type[Projector]) -> float:
    """Start a run and take the time."""
    torch.manual_seed(0)
    module = Classifier(work)
    data = TensorDataset(work.inputs(ROWS)[0], torch.randint(10, (ROWS,)))
    with tempfile.TemporaryDirectory() as folder:
        callback = Timed(folder, method=TRAK(projector=projector(2048)), featurize=True, snapshots=[10])
        trainer = L.Trainer(
            max_epochs=20,
            max_steps=1,
            limit_train_batches=1,
            callbacks=[callback],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        callback.on_train_epoch_end = lambda *_: None  # type: ignore[method-assign]  # the start is all that is wanted
        callback.on_train_end = lambda *_: None  # type: ignore[method-assign]
        callback.on_fit_end = lambda *_: None  # type: ignore[method-assign]
        trainer.fit(module, DataLoader(data, batch_size=work.batch_size))
    return callback.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--work", nargs="*", choices=WORKS, default=["resnet9", "transformer"])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for key in arguments.work:
        work = WORKS[key]
        for projector in PROJECTORS.values():
            seconds(work, projector)  # kernels are loaded
        found = [[seconds(work, projector) for projector in PROJECTORS.values()] for _ in range(arguments.repeats)]
        print(work.title)
        for number, name in enumerate(PROJECTORS):
            own = statistics.median(row[number] for row in found)
            ratio = statistics.median(row[number] / row[0] for row in found)
            print(f"  {name:20} {own:6.2f} s   {ratio:5.2f}")


if __name__ == "__main__":
    main()
