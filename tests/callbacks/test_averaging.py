"""The weights that a run ends with are attributed, also where they are averages or were put back afterwards."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import EarlyStopping, StochasticWeightAveraging
from torch import Tensor
from torch.nn import functional as F

from cases import BlobClassifier, blobs, loader_of, quiet_trainer, told
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.methods import TRAK, GradDot, TracIn
from lightning_attr.parameters.weights import weights_of
from lightning_attr.store.feature_store import FeatureStore

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")

N, M = 20, 6
AVERAGING = ["WeightAveraging", "EMAWeightAveraging"]


class Restored(BlobClassifier):
    """Goes back to the weights of its first epoch when all is over, as for the best ones."""

    def on_train_epoch_end(self) -> None:
        if self.current_epoch == 0:
            self.best = copy.deepcopy(self.network.state_dict())

    def on_train_end(self) -> None:
        self.network.load_state_dict(self.best)


def averaging(kind: str) -> L.Callback:
    if kind == "SWA":
        return StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)
    if not hasattr(lightning_callbacks, kind):
        pytest.skip("this Lightning has no such callback")
    return getattr(lightning_callbacks, kind)()


def fit(folder: Path | None, kind: str = "", ours_first: bool = False, **settings: Any) -> Any:
    torch.manual_seed(5)
    module = Restored() if kind == "restored" else BlobClassifier()
    theirs = [averaging(kind)] if kind in {"SWA", *AVERAGING} else []
    own = [] if folder is None else [AttributionCallback(folder, TRAK(8), "all", log=False)]
    every = [*own, *theirs] if ours_first else [*theirs, *own]
    trainer = quiet_trainer(max_epochs=settings.pop("max_epochs", 3), callbacks=every, **settings)
    trainer.fit(module, loader_of(blobs(N), shuffle=True))
    return trainer


def by_hand(module: Any) -> Tensor:
    def rows(data: Any, value: Any) -> Tensor:
        found = [torch.autograd.grad(value(module(x[None]), y[None]).sum(), list(module.parameters())) for x, y in data]
        return torch.stack([torch.cat([g.flatten() for g in row]) for row in found])

    return -rows(blobs(N), F.cross_entropy) @ rows(blobs(M, seed=1), module.model_output.output).T


@pytest.mark.parametrize("ours_first", [False, True])
@pytest.mark.parametrize("kind", ["SWA", *AVERAGING, "restored"])
def test_the_model_that_the_user_ends_with(tmp_path: Path, kind: str, ours_first: bool) -> None:
    plain = fit(None, kind).lightning_module
    trainer = fit(tmp_path, kind, ours_first)
    module, store = trainer.lightning_module, FeatureStore.open(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), module.parameters(), strict=True))
    assert [snapshot.epoch for snapshot in store.snapshots] == [0, 1, 2, 2]
    final = store.snapshots[-1]
    assert (final.key, final.learning_rate, final.global_step) == ("final", 0.0, 9)
    assert all(torch.equal(p, store.weights("final")[name]) for name, p in weights_of(module).items())

    targets = loader_of(blobs(M, seed=1))
    assert trainer.attribute(target_dataloaders=targets).scores.provenance["snapshots"][-1] == "final"
    found = trainer.attribute(target_dataloaders=targets, method=GradDot(exact=True)).scores.values
    torch.testing.assert_close(found, by_hand(module), rtol=1e-4, atol=1e-6)
    weights = [0.0 if snapshot.key == "final" else snapshot.learning_rate / N for snapshot in store.snapshots]
    exact = [trainer.attribute(targets="train", method=TracIn(weights=w, exact=True)) for w in (weights, "integrated")]
    torch.testing.assert_close(exact[0].scores.values, exact[1].scores.values)


def test_an_epoch_for_the_statistics_of_batches(tmp_path: Path) -> None:
    """SWA goes through the data once more for BatchNorm; the snapshot at its end is that of the average."""

    class Norm(BlobClassifier):
        def __init__(self) -> None:
            super().__init__()
            self.network.insert(1, torch.nn.BatchNorm1d(8))

    callback = AttributionCallback(tmp_path, TRAK(8), "all", log=False)
    trainer = quiet_trainer(max_epochs=3, callbacks=[averaging("SWA"), callback])
    trainer.fit(Norm(), loader_of(blobs(N), shuffle=True))
    last = callback.store.snapshots[-1]
    own = weights_of(trainer.lightning_module)
    assert all(torch.equal(tensor, own[name]) for name, tensor in callback.store.weights(last.key).items())


def test_nothing_where_the_last_epoch_is_the_end(tmp_path: Path) -> None:
    assert [s.key for s in fit(tmp_path).callbacks[0].store.snapshots][-1] == "epoch=0002-step=000009"


def test_a_run_that_stops_early(tmp_path: Path) -> None:
    torch.manual_seed(5)
    stop = EarlyStopping("val_loss", patience=0, min_delta=10.0)
    callback = AttributionCallback(tmp_path, TRAK(8), [7], log=False)
    trainer = quiet_trainer(max_epochs=9, callbacks=[callback, stop, averaging("EMAWeightAveraging")])
    trainer.fit(BlobClassifier(), loader_of(blobs(N), shuffle=True), loader_of(blobs(M)))
    own = weights_of(trainer.lightning_module)
    assert all(torch.equal(t, own[n]) for n, t in callback.store.weights(callback.store.snapshots[-1].key).items())


def test_again_and_further(tmp_path: Path) -> None:
    """The same run again keeps its end; a longer one gives that up, and takes its own."""
    fit(tmp_path, "restored")
    before = FeatureStore.open(tmp_path).manifest
    fit(tmp_path, "restored")
    assert FeatureStore.open(tmp_path).manifest == before
    with told(r"moved final to .*abandoned"):
        fit(tmp_path, "restored", max_epochs=4)
    store = FeatureStore.open(tmp_path)
    assert [(snapshot.epoch, snapshot.key == "final") for snapshot in store.snapshots] == [
        (0, False), (1, False), (2, False), (3, False), (3, True),
    ]  # fmt: skip
    assert all(snapshot.key == "final" or snapshot.shards for snapshot in store.snapshots)


def test_what_is_not_finite_there_ends_the_recording_alone(tmp_path: Path) -> None:
    class Broken(Restored):
        def on_train_end(self) -> None:
            self.network[0].bias.data[0] = float("nan")

    callback = AttributionCallback(tmp_path, TRAK(8), "all", log=False)
    trainer = quiet_trainer(max_epochs=2, callbacks=[callback])
    with told(r"recording stopped in epoch 1 .*weights are NaN or Inf .*network.0.bias"):
        trainer.fit(Broken(), loader_of(blobs(N)))
    assert [snapshot.epoch for snapshot in callback.store.manifest.usable] == [0, 1]
