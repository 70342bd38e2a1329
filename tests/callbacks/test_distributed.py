"""Two processes write the store that one writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import pytest
import torch

from cases import BlobClassifier, blobs, leave_group_at_exit, loader_of, quiet_trainer
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.methods import TRAK
from lightning_attr.store.feature_store import FeatureStore

# No test here needs validation data.
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


def run(folder: Path, logger_dir: Path, **settings: Any) -> None:
    """Training of two epochs that leaves the weights where they are, so that it is the same on any number of ranks."""
    callback = AttributionCallback(folder, TRAK(16), "all", batch_size=64, noise_mask=[True] + [False] * 1099)
    logger = L.pytorch.loggers.CSVLogger(logger_dir)
    limits = {"max_epochs": 2, "limit_train_batches": 5}  # as many steps on any number of ranks
    trainer = quiet_trainer(L.Trainer, callbacks=[callback], logger=logger, **limits, **settings)
    loader = loader_of(blobs(1100), batch_size=50, shuffle=True)
    trainer.fit(BlobClassifier(learning_rate=0.0), loader)
    if settings.get("strategy") != "ddp_spawn":  # there the callback that ran is another process's
        assert [len(snapshot.shards) for snapshot in callback.store.snapshots] == [3, 3]


def read_figures(folder: Path) -> pd.DataFrame:
    (file,) = folder.rglob("metrics.csv")
    return pd.read_csv(file).filter(regex="step|attribution/")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn"])
def test_two_processes(tmp_path: Path, strategy: str) -> None:
    command = [sys.executable, __file__, str(tmp_path), strategy]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=180, cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    run(tmp_path / "one", tmp_path / "logs")
    figures = [read_figures(tmp_path / name) for name in ("logs", "logs-two")]
    assert len(figures[0]) == 2
    pd.testing.assert_frame_equal(figures[0], figures[1])
    one, two = FeatureStore.open(tmp_path / "one"), FeatureStore.open(tmp_path / "two")
    assert [s.epoch for s in one.snapshots] == [s.epoch for s in two.snapshots] == [0, 1]
    for left, right in zip(one.snapshots, two.snapshots, strict=True):
        assert (left.key, left.weights, left.shards) == (right.key, right.weights, right.shards)
        assert left.shards.keys() == {0, 1, 2}
        for name in one.shard(left.key, 0):
            assert torch.equal(two.column(right.key, name), one.column(left.key, name))


if __name__ in ("__main__", "__mp_main__"):  # the second is what a spawned process calls it
    leave_group_at_exit()

if __name__ == "__main__":
    torch.set_num_threads(1)
    base = Path(sys.argv[1])
    run(base / "two", base / "logs-two", strategy=sys.argv[2], devices=2)
