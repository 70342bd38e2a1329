"""What fails in recording is told, and ends the recording; the training goes on to the same end, to the last bit."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cases import BlobClassifier, blobs, leave_group_at_exit, loader_of, quiet_trainer, told
from lightning_attr.callbacks import AttributionCallback, AttributionMonitor
from lightning_attr.errors import AttributionError
from lightning_attr.features.featurizer import Featurizer
from lightning_attr.methods import TRAK, GradDot
from lightning_attr.projectors import KroneckerProjector
from lightning_attr.store.feature_store import FeatureStore
from lightning_attr.store.manifest import Stopped

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")

N = 26

METHOD = TRAK(projector=KroneckerProjector(8), kernel="margin")  # one pass a batch: calls are counted


class Net(BlobClassifier):
    """What has state besides weights: buffers, draws, moments."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.network = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.05)


def breaking(monkeypatch: pytest.MonkeyPatch, call: int, error: BaseException) -> None:
    """Let featurizing fail with its n-th batch, after it has drawn from every stream."""
    calls: list[int] = []
    original = Featurizer.__call__

    def broken(self: Featurizer, batch: Any, rows: Any, out: Any = None) -> Any:
        calls.append(len(rows))
        torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002
        if len(calls) == call:
            raise error
        return original(self, batch, rows, out)

    monkeypatch.setattr(Featurizer, "__call__", broken)


def fit(*callbacks: L.Callback, **settings: Any) -> tuple[Any, list[Tensor]]:
    """Train, and give all state at the end."""
    L.seed_everything(3, verbose=False)
    trainer = quiet_trainer(max_epochs=4, callbacks=list(callbacks), **settings)
    module = Net()
    trainer.fit(module, loader_of(blobs(N), shuffle=True))
    moments = [value for state in trainer.optimizers[0].state.values() for value in state.values()]
    return trainer, [*module.state_dict().values(), *moments, torch.get_rng_state()]


def test_training_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, plain = fit()
    breaking(monkeypatch, call=1 + 4 + 4 + 3, error=ZeroDivisionError("broken on purpose"))  # probe, two epochs, third
    callback = AttributionCallback(tmp_path / "store", METHOD, "all", batch_size=8)
    warning = r"recording stopped in epoch 2 \(step 12\): ZeroDivisionError: broken on purpose\. Training goes.*2 comp"
    with told(warning):
        trainer, state = fit(callback)
    assert all(torch.equal(a, b) for a, b in zip(plain, state, strict=True))
    assert trainer.current_epoch == 4
    store = FeatureStore.open(tmp_path / "store")
    assert store.manifest.stopped == callback.stopped
    assert callback.stopped == Stopped(2, 12, "ZeroDivisionError: broken on purpose.", "epoch=0002-step=000012")
    assert [snapshot.epoch for snapshot in store.manifest.usable] == [0, 1]

    with told(r"recording stopped in epoch 2 .*Scores are by the snapshots before that:"):
        result = trainer.attribute(targets="train")
    assert result.scores.provenance["snapshots"] == ["epoch=0000-step=000004", "epoch=0001-step=000008"]
    assert "broken on purpose" in result.scores.provenance["stopped"]

    monkeypatch.undo()
    again, _ = fit(AttributionCallback(tmp_path / "store", METHOD, "all", batch_size=8))  # goes on where it stopped
    assert FeatureStore.open(tmp_path / "store").manifest.stopped is None
    fit(AttributionCallback(tmp_path / "whole", METHOD, "all", batch_size=8))
    assert FeatureStore.open(tmp_path / "whole").manifest == FeatureStore.open(tmp_path / "store").manifest
    assert again.attribute(targets="train").scores.shape == (N, N)


def test_without_a_complete_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    breaking(monkeypatch, call=2, error=AttributionError("Sample 17 has no label."))
    with told(r"has no complete snapshot\."):
        trainer, _ = fit(AttributionCallback(tmp_path, METHOD))
    message = r"no complete snapshot to attribute at: recording stopped in epoch 0 \(step 4\): Sample 17 has no label\."
    with pytest.raises(AttributionError, match=message):
        trainer.attribute(targets="train")
    with pytest.raises(AttributionError, match=message):  # in another process
        quiet_trainer().attribute(model=Net(), train_dataloaders=loader_of(blobs(N)), targets="train", store=tmp_path)


def test_an_error_can_end_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    breaking(monkeypatch, call=3, error=ZeroDivisionError("broken on purpose"))
    with pytest.raises(ZeroDivisionError, match="broken on purpose"):
        fit(AttributionCallback(tmp_path, METHOD, on_error="raise"))
    with pytest.raises(
        ValueError,
        match="`on_error` of AttributionCallback to be 'warn' or 'raise', but got 'ignore'",
    ):
        AttributionCallback(on_error="ignore")


def test_an_interruption_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    breaking(monkeypatch, call=3, error=KeyboardInterrupt())
    callback = AttributionCallback(tmp_path, METHOD)
    with pytest.raises((KeyboardInterrupt, SystemExit)):  # Lightning exits when interrupted
        fit(callback)
    assert callback.stopped is None


@pytest.mark.parametrize("featurize", [True, False])
def test_a_store_that_is_deleted(tmp_path: Path, featurize: bool) -> None:
    class Delete(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.current_epoch == 2:
                shutil.rmtree(tmp_path / "store")

    callback = AttributionCallback(tmp_path / "store", METHOD, "all", featurize=featurize)
    with told(r"store is gone: something moved or deleted it .*and with it the snapshots"):
        trainer, _ = fit(Delete(), callback)
    assert not (tmp_path / "store").exists()
    with pytest.raises(AttributionError, match=r"no attribution store to attribute from: .* epoch 2 .*store is gone"):
        trainer.attribute(targets="train")


def test_snapshots_alone_stay_usable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing was featurized, the snapshots before are whole, and later features do not change that."""
    calls: list[str] = []
    original = FeatureStore.add_snapshot

    def broken(self: FeatureStore, key: str, *args: Any, **kwargs: Any) -> Any:
        calls.append(key)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return original(self, key, *args, **kwargs)

    monkeypatch.setattr(FeatureStore, "add_snapshot", broken)
    with told(r"No space left on device.*2 complete snapshots"):
        trainer, _ = fit(AttributionCallback(tmp_path, METHOD, "all", featurize=False))
    for method in (METHOD, GradDot(exact=True)):
        with told("No space left on device"):
            result = trainer.attribute(targets="train", method=method)
        assert set(result.scores.provenance["snapshots"]) <= {"epoch=0000-step=000004", "epoch=0001-step=000008"}


def test_a_store_that_stopped_can_be_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    breaking(monkeypatch, call=1 + 1 + 1, error=ZeroDivisionError("broken on purpose"))
    with told("recording stopped in epoch 1"):
        fit(AttributionCallback(tmp_path / "a", METHOD, "all", batch_size=N))
    monkeypatch.undo()
    fit(AttributionCallback(tmp_path / "b", METHOD, [0], batch_size=N))
    merged = FeatureStore.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert [snapshot.epoch for snapshot in merged.snapshots] == [0, 0, 3]
    assert merged.manifest.stopped is None


def test_what_fails_in_logging_ends_the_logging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(AttributionMonitor, "_table", broken)
    callback = AttributionCallback(tmp_path, METHOD, "all")
    with told(r"logging of self-influence ended, recording goes on: .*no network"):
        fit(callback, AttributionMonitor(3))
    assert callback.stopped is None
    assert [len(snapshot.shards) for snapshot in callback.store.snapshots] == [1, 1, 1, 1]


def test_the_monitor_survives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    breaking(monkeypatch, call=1 + 1 + 1, error=ZeroDivisionError("broken on purpose"))
    shown: list[int] = []
    monkeypatch.setattr(AttributionMonitor, "_show", lambda self, trainer, *_: shown.append(trainer.current_epoch))
    with told("recording stopped in epoch 1"):
        fit(AttributionCallback(tmp_path, METHOD, "all", batch_size=N), AttributionMonitor(3))
    assert shown == [0]


def run_two(folder: Path) -> None:
    """One process of two fails in featurizing."""
    original = Featurizer.__call__

    def broken(self: Featurizer, batch: Any, rows: Any, out: Any = None) -> Any:
        if rows[0] >= 512:  # the shard of the second process
            raise ZeroDivisionError("broken on purpose")
        return original(self, batch, rows, out)

    Featurizer.__call__ = broken  # type: ignore[method-assign]  # of this process
    callback = AttributionCallback(folder, METHOD, "all", batch_size=64)
    trainer = quiet_trainer(
        L.Trainer, max_epochs=2, callbacks=[callback], strategy="ddp", devices=2, limit_train_batches=2
    )
    trainer.fit(BlobClassifier(), loader_of(blobs(700), batch_size=50))
    assert trainer.current_epoch == 2
    assert callback.stopped is not None
    assert "broken on purpose" in callback.stopped.cause
    weights = torch.cat([p.detach().flatten() for p in trainer.lightning_module.parameters()])
    assert F.mse_loss(trainer.strategy.broadcast(weights), weights) == 0


@pytest.mark.slow
def test_all_processes_stand_down_together(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        capture_output=True, text=True, timeout=180, cwd=tmp_path, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Training goes on, unchanged.") == 1
    stopped = FeatureStore.open(tmp_path).manifest.stopped
    assert stopped is not None
    assert stopped.cause.startswith("In process 1: ZeroDivisionError: broken on purpose")


if __name__ == "__main__":
    leave_group_at_exit()
    torch.set_num_threads(1)
    run_two(Path(sys.argv[1]))
