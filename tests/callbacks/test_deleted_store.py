"""What deletes a store, or files of it, while a run is recorded: training goes on to the same bits, and it is told."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from cases import BlobClassifier, blobs, loader_of, quiet_trainer
from lightning_attr import FeatureStore
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.errors import AttributionError
from lightning_attr.methods import TRAK

EPOCHS = 4


class Deletes(L.Callback):
    """Deletes something of a store when the third epoch starts."""

    def __init__(self, path: Path, what: Callable[[Path], None]) -> None:
        self.path, self.what = path, what

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 2:
            self.what(self.path)


def first(path: Path, pattern: str) -> Path:
    return sorted(path.glob(pattern))[0]


DAMAGES: dict[str, tuple[Callable[[Path], None], bool]] = {
    "the store": (shutil.rmtree, True),
    "the manifest": (lambda path: (path / "manifest.json").unlink(), True),
    "all snapshots": (lambda path: shutil.rmtree(path / "snapshots"), False),
    "the weights of a snapshot": (lambda path: first(path, "snapshots/*/weights.safetensors").unlink(), False),
    "a shard": (lambda path: first(path, "snapshots/*/features/*.safetensors").unlink(), False),
    "the claims": (lambda path: shutil.rmtree(path / "claims"), False),
}


def fit(callbacks: list[Any]) -> tuple[Any, dict[str, Tensor], list[str]]:
    torch.manual_seed(3)
    trainer = quiet_trainer(max_epochs=EPOCHS, callbacks=callbacks)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(BlobClassifier(), loader_of(blobs(24), shuffle=True))
    return trainer, trainer.lightning_module.state_dict(), [str(warning.message) for warning in caught]


@pytest.mark.parametrize("name", DAMAGES)
def test_training_goes_on_to_the_same_bits_and_the_loss_is_told(name: str, tmp_path: Path) -> None:
    what, at_once = DAMAGES[name]
    path = tmp_path / "run"
    _, plain, _ = fit([])
    callback = AttributionCallback(path, TRAK(8), "all", featurize=True, log=False)
    trainer, recorded, told = fit([Deletes(path, what), callback])
    assert trainer.current_epoch == EPOCHS
    assert all(torch.equal(plain[key], recorded[key]) for key in plain)
    stopped = [text for text in told if "Training goes on, unchanged" in text]
    assert len(stopped) == at_once, told
    if at_once:
        assert str(path) in stopped[0]
        assert "gone" in stopped[0]
        with pytest.raises(AttributionError, match=r"no attribution store|is gone|deleted"):
            trainer.attribute(targets="train")
    elif name == "the claims":
        assert len(FeatureStore.open(path).snapshots) == EPOCHS
        assert trainer.attribute(targets="train").scores.shape == (24, 24)
    else:
        with pytest.raises(AttributionError, match=r"\.safetensors is missing\. .*(set_aside|repair)"):
            trainer.attribute(targets="train")
