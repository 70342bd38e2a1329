"""The examples that `pytorch_lightning` itself ships and documents: two lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from checks import QUIET, check_scores, train_both

pytest.importorskip("pytorch_lightning")
import pytorch_lightning as pl
from pytorch_lightning.demos import boring_classes, transformer

ROWS = [0, 7, 15]


class LitAutoEncoder(pl.LightningModule):
    """The module of the package's README."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(28 * 28, 16), nn.ReLU(), nn.Linear(16, 3))
        self.decoder = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 28 * 28))

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _ = batch
        x = x.view(x.size(0), -1)
        loss = nn.functional.mse_loss(self.decoder(self.encoder(x)), x)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Digits(pl.LightningDataModule):
    """Images and labels, as MNIST gives them, and copies of training samples to test on."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.images = TensorDataset(torch.rand(24, 1, 28, 28, generator=generator), torch.arange(24) % 10)

    def train_dataloader(self) -> Any:
        return DataLoader(self.images, batch_size=8, shuffle=True)

    def test_dataloader(self) -> Any:
        return DataLoader(Subset(self.images, ROWS), batch_size=8)


def test_autoencoder_of_the_readme() -> None:
    def train(callbacks: list[Any]) -> Any:
        trainer = pl.Trainer(max_epochs=2, callbacks=callbacks, **QUIET)
        trainer.fit(LitAutoEncoder(), datamodule=Digits())
        return trainer

    trainer = train_both(train)
    dm = Digits()
    check_scores(trainer, ROWS, DataLoader(dm.images), datamodule=dm)


def test_boring_model() -> None:
    def train(callbacks: list[Any]) -> Any:
        trainer = pl.Trainer(max_epochs=1, limit_val_batches=0, callbacks=callbacks, **QUIET)
        trainer.fit(boring_classes.BoringModel(), DataLoader(boring_classes.RandomDataset(32, 24), batch_size=4))
        return trainer

    trainer = train_both(train)
    data = trainer.train_dataloader.dataset
    check_scores(trainer, ROWS, DataLoader(data), target_dataloaders=DataLoader(Subset(data, ROWS)))


class Transformer(transformer.LightningTransformer):
    def prepare_data(self) -> None:
        """Downloads nothing: the text is made here."""


@pytest.fixture
def wikitext(tmp_path: Path) -> Dataset[Any]:
    words = " ".join(f"word{(i * i + 3 * i) % 23}" for i in range(200))
    (tmp_path / "wikitext-2.txt").write_text(words)
    return transformer.WikiText2(data_dir=tmp_path, block_size=6, download=False)


def test_transformer(wikitext: Any) -> None:
    def train(callbacks: list[Any]) -> Any:
        trainer = pl.Trainer(max_epochs=1, limit_val_batches=0, callbacks=callbacks, **QUIET)
        loader = DataLoader(wikitext, batch_size=4, shuffle=True)
        trainer.fit(Transformer(vocab_size=wikitext.vocab_size), loader)
        return trainer

    trainer = train_both(train)
    check_scores(trainer, ROWS, DataLoader(wikitext), target_dataloaders=DataLoader(Subset(wikitext, ROWS)))
