"""The examples of the README run as they stand, with a module and a datamodule in place of the reader's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from cases import QUIET, blobs, loader_of


class Blobs(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader_of(blobs(40), shuffle=True)

    def test_dataloader(self) -> Any:
        return loader_of(blobs(12, seed=1))


class YourClassifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def blocks(repository: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (repository / "README.md").read_text(), flags=re.DOTALL)


def test_first_examples(blocks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    code = blocks[0].replace("max_epochs=20", "max_epochs=3, **QUIET")
    assert code != blocks[0]
    names: dict[str, Any] = {"YourModule": YourClassifier, "dm": Blobs(), "QUIET": QUIET}
    exec(code, names)
    assert names["result"].scores.shape == (40, 12)
    assert names["indices"].shape == names["scores"].shape == (12, 10)
    assert len(names["keep"]) == 36

    retrain = blocks[1].replace("num_subsets=100, seeds=3", "num_subsets=4, seeds=1, progress=False")
    assert retrain != blocks[1]
    names["make_trainer"] = lambda: L.Trainer(max_epochs=1, **QUIET)
    exec(retrain, names)
    assert capsys.readouterr().out.startswith("subsets: 4, seeds: 1, targets: 12\nlds: ")


def test_it_can_be_read_in_some_minutes(repository: Path) -> None:
    text = (repository / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 170
    assert len(text.split()) <= 1100
