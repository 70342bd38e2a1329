"""A bar in the style of the Trainer's own, and silence where that is silent."""

from __future__ import annotations

import inspect
import io
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import rich
from lightning.pytorch.callbacks import Callback, RichProgressBar, TQDMProgressBar

from cases import BlobClassifier, blobs, loader_of, quiet_trainer
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.callbacks.progress import progress
from lightning_attr.methods import TRAK

# No test here needs validation data.
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


HARD = "hard" in inspect.signature(RichProgressBar.refresh).parameters  # Lightning >= 2.6


def fit(folder: Path, bar: Callback | None, *others: Callback) -> L.Trainer:
    callback = AttributionCallback(folder, TRAK(16), "all", batch_size=4)
    callbacks = [*([bar] if bar is not None else []), callback, *others]
    trainer = quiet_trainer(L.Trainer, max_epochs=2, callbacks=callbacks, enable_progress_bar=bar is not None)
    trainer.fit(BlobClassifier(), loader_of(blobs(26)))
    return trainer


def test_tqdm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, TQDMProgressBar())
    printed = capsys.readouterr().out
    assert "Featurizing epoch 0" in printed
    assert "Featurizing epoch 1" in printed
    assert re.search(r"Featurizing epoch 1: .* \d/7 ", printed)  # batches of 4 of 26 samples
    assert "Epoch 1" in printed  # the Trainer's own goes on


class Screen(RichProgressBar):
    """Remembers what tasks there were while featurizing, and draws into memory."""

    def __init__(self) -> None:
        self.text = io.StringIO()
        super().__init__(console_kwargs={"file": self.text, "force_terminal": True, "width": 120})
        self.tasks: dict[str, tuple[float, float | None]] = {}

    def refresh(self, hard: bool = False) -> None:
        super().refresh(**({"hard": True} if HARD else {}))
        assert self.progress is not None
        self.tasks |= {task.description: (task.completed, task.total) for task in self.progress.tasks}


def test_rich(tmp_path: Path) -> None:
    console = rich.get_console()
    before = dict(vars(console))
    screen = Screen()
    try:
        fit(tmp_path, screen)
    finally:
        vars(console).update(before)  # Lightning reconfigures rich's global console
    assert screen.tasks["Featurizing epoch 0"] == screen.tasks["Featurizing epoch 1"] == (7, 7)
    assert "Featurizing epoch 0" in screen.text.getvalue()  # drawn, too
    assert "7/7" in screen.text.getvalue()


def break_off(trainer: L.Trainer) -> None:
    with progress(trainer, "Once", 3) as step:
        step()
        raise KeyError("inside")


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_the_bar_goes_when_featurizing_raises(tmp_path: Path, bar: type, capsys: pytest.CaptureFixture[str]) -> None:
    class Look(Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            with pytest.raises(KeyError, match="inside"):
                break_off(trainer)
            if isinstance(trainer.progress_bar_callback, RichProgressBar):
                left = trainer.progress_bar_callback.progress
                assert left is not None
                assert "Once" not in [task.description for task in left.tasks]

    console = rich.get_console()
    before = dict(vars(console))
    try:
        fit(tmp_path, bar(), Look())
    finally:
        vars(console).update(before)


class Own(L.pytorch.callbacks.ProgressBar):
    """A bar of the user's own, in which nothing of ours has a place."""


@pytest.mark.parametrize("bar", [None, TQDMProgressBar, RichProgressBar, Own])
def test_silence(tmp_path: Path, bar: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, None if bar is None else bar() if bar is Own else bar(refresh_rate=0))
    printed = capsys.readouterr()
    assert "Featurizing" not in printed.out + printed.err


def test_no_bar_without_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All features are there already: a run after the end."""
    fit(tmp_path, None)
    fit(tmp_path, TQDMProgressBar())
    assert "Featurizing" not in capsys.readouterr().out
