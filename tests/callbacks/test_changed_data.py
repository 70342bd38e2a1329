"""Training data that are others in later epochs: a warning says whose rows the scores have."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from torch.utils.data import Subset, TensorDataset

from cases import BlobClassifier, blobs, loader_of, quiet_trainer
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.methods import GradDot
from lightning_attr.projectors import IdentityProjector


class Reloading(L.LightningDataModule):
    """Another loader every epoch, of what the epoch asks for."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def train_dataloader(self) -> Any:
        epoch = self.trainer.current_epoch if self.trainer is not None else 0
        data = blobs(24)
        if self.kind == "moving":
            return loader_of(Subset(data, range(2 * epoch, 2 * epoch + 16)))
        if self.kind == "growing":
            return loader_of(Subset(data, range(16 + epoch)))
        return loader_of(TensorDataset(*data.tensors))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("moving", "Subset gives other samples for the same indices"),
        ("growing", "Subset has 17 samples, and had 16"),
        ("same", None),
    ],
)
def test_later_epochs_of_other_data(kind: str, message: str | None, tmp_path: Path) -> None:
    callback = AttributionCallback(tmp_path, GradDot(IdentityProjector()), snapshots="all")
    trainer = quiet_trainer(max_epochs=2, callbacks=[callback], reload_dataloaders_every_n_epochs=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(BlobClassifier(), datamodule=Reloading(kind))
    said = [str(w.message) for w in caught if "training data are others" in str(w.message)]
    assert {text for text in said if message is None or message not in text} == set()
    assert bool(said) == (message is not None)
    assert len(trainer.attribute(targets="train").self_influence) == (24 if kind == "same" else 16)
