"""What cannot work is refused before the first step, by name; what goes wrong later leaves the store usable."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import safetensors.torch
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import Tensor, nn
from torch.utils.data import IterableDataset, TensorDataset

from cases import BlobClassifier, blobs, loader_of, quiet_trainer
from lightning_attr.attribution.strategies import check_strategy
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.errors import (
    AttributionError,
    BatchDependenceError,
    NonFiniteGradientError,
    StoreMismatchError,
    UnsupportedLayerError,
)
from lightning_attr.methods import TRAK
from lightning_attr.outputs import MulticlassMargin
from lightning_attr.store.feature_store import FeatureStore

pytestmark = [
    # Only early stopping needs validation data here.
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    # Lightning says so, and passes over the empty data set.
    pytest.mark.filterwarnings("ignore:Total length of `.*` across ranks is zero"),
]


class Steps(L.Callback):
    """Counts the steps of training."""

    count = 0

    def on_train_batch_start(self, *_: Any) -> None:
        self.count += 1


def fit(
    folder: Path, module: L.LightningModule | None = None, data: Any = None, steps: Steps | None = None, **own: Any
) -> Any:
    callback = AttributionCallback(folder, **{"method": TRAK(16), **own})
    trainer = quiet_trainer(L.Trainer, max_epochs=2, callbacks=[steps or Steps(), callback])
    trainer.fit(module or BlobClassifier(), data if isinstance(data, dict) else loader_of(data or blobs(26)))
    return callback


def content(folder: Path) -> dict[str, Any]:
    """Every file with its bytes and its time of change."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(torch.rand(26, 4))


class Empty(TensorDataset):
    def __init__(self) -> None:
        super().__init__(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))

    def __bool__(self) -> bool:
        return True


class Plain(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.layer(batch[0]).square().mean().sqrt()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class BatchStatistics(BlobClassifier):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 3))


class Contrast(BlobClassifier):
    def forward(self, x: Tensor) -> Tensor:
        return self.network(x - x.mean(0))


class Frozen(BlobClassifier):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Parameter(torch.zeros(1))
        self.requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + torch.zeros(1, requires_grad=True).sum()


class WrongSign(BlobClassifier):
    class model_output(MulticlassMargin):  # noqa: N801 - stands in the place of an instance
        def out_to_loss(self, outputs: Any, targets: Any) -> Tensor:
            return -super().out_to_loss(outputs, targets)

    model_output = model_output()


class DictBatch(BlobClassifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((batch["x"], batch["y"]), batch_idx)


class Records(TensorDataset):
    def __getitem__(self, i: int) -> dict[str, Tensor]:
        x, y = super().__getitem__(i)
        return {"x": x, "y": y}


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"data": Stream()}, TypeError, r"two passes over Stream, an IterableDataset, differ"),
        ({"data": Empty()}, ValueError, r"Expected the training data set to have samples, but Empty is empty"),
        ({"data": "two loaders"}, TypeError, r"Expected one torch DataLoader for the training data, but got 2 loaders"),
        ({"module": Plain()}, BatchDependenceError, r"neither the mean nor the sum of one term a sample"),
        (
            {"module": BatchStatistics()},
            UnsupportedLayerError,
            r"`network.1` \(BatchNorm1d\) has no running statistics",
        ),
        ({"module": Contrast()}, BatchDependenceError, r"depends on the samples beside it: .* differ by up to"),
        ({"module": Frozen()}, ValueError, r"Expected Frozen to have at least one parameter with requires_grad=True"),
        ({"module": WrongSign()}, AssertionError, r"expected grad loss = -out_to_loss \* grad output"),
        (
            {"module": DictBatch(), "data": Records(*blobs(26).tensors)},
            TypeError,
            r"with the keys \['x', 'y'\]. Override",
        ),
        ({"noise_mask": [True] * 25}, ValueError, r"noise_mask` to have one entry a training sample, of shape \(26,\)"),
        ({"noise_mask": [2] * 26}, ValueError, r"Expected argument `noise_mask` to hold only True and False"),
    ],
    ids=lambda value: "",
)
def test_refused_before_the_first_step(tmp_path: Path, settings: dict[str, Any], error: Any, message: str) -> None:
    steps = Steps()
    if settings.get("data") == "two loaders":
        settings = {"data": {"a": loader_of(blobs(26)), "b": loader_of(blobs(26))}}
    with pytest.raises(error, match=message):
        fit(tmp_path / "store", steps=steps, **settings)
    assert steps.count == 0
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("sharded", [FSDPStrategy, DeepSpeedStrategy])
def test_sharding_strategies(tmp_path: Path, sharded: type) -> None:
    strategy = sharded.__new__(sharded)  # their constructors want their packages, or devices
    with pytest.raises(AttributionError, match=f"whole parameters on each rank.*but {sharded.__name__} shards them"):
        check_strategy(strategy)
    trainer = quiet_trainer(L.Trainer, max_epochs=1)
    trainer.strategy.__class__, own = sharded, trainer.strategy.__class__
    try:
        with pytest.raises(AttributionError, match=f"{sharded.__name__} shards them"):
            AttributionCallback(tmp_path).setup(trainer, BlobClassifier(), "fit")
    finally:
        trainer.strategy.__class__ = own


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": blobs(25)}, r"was written for a training data set of 26 samples, but this one has 25"),
        (
            {"data": blobs(26, seed=1)},
            r"written for another training data set: it is as long, but its samples differ",
        ),
        ({"module": BlobClassifier(classes=4)}, r"was written for another model: its parameter `network.2.weight`"),
        (
            {"method": TRAK(24)},
            r"was featurized with .*'proj_dim': 16.*, but here it is .*'proj_dim': 24",
        ),
        ({"method": TRAK(16, seed=1)}, r"was featurized with the projection"),
        ({"module": BlobClassifier(seed=1)}, r"holds another training run: it started from other weights"),
    ],
    ids=lambda value: "",
)
@pytest.mark.parametrize("featurized", [True, False])
def test_another_run_is_refused(tmp_path: Path, settings: dict[str, Any], message: str, featurized: bool) -> None:
    if not featurized and "method" in settings:
        pytest.skip("a store without features fits any projection")
    fit(tmp_path, featurize=featurized)
    before, steps = content(tmp_path), Steps()
    with pytest.raises(StoreMismatchError, match=message):
        fit(tmp_path, steps=steps, **settings)
    assert steps.count == 0
    assert content(tmp_path) == before


def with_nan(row: int) -> TensorDataset:
    x, y = blobs(26).tensors
    x[row, 2] = float("nan")
    return TensorDataset(x, y)


class Cautious(BlobClassifier):
    """Leaves samples out of its loss that are not finite, as careful training loops do."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        good = batch[0].isfinite().all(1)
        return super().training_step((batch[0][good], batch[1][good]), batch_idx)


@pytest.fixture
def first_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of the module sees the first samples only: else it would find the bad one."""
    monkeypatch.setattr("lightning_attr.verification.probe.probe_rows", lambda source: [0, 1, 2, 3])


@pytest.mark.usefixtures("first_rows")
def test_nan_in_a_sample_that_training_left_out(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteGradientError, match=r"output of sample 17 is NaN or Inf .*Look at dataset\[17\]"):
        fit(tmp_path, Cautious(), with_nan(17), on_error="raise")


@pytest.mark.usefixtures("first_rows")
@pytest.mark.parametrize("featurize", [True, False])
def test_nan_in_a_sample_that_training_diverged_on(tmp_path: Path, featurize: bool) -> None:
    """By the end of the epoch every gradient is NaN; the message still names the one sample behind it."""
    with pytest.raises(NonFiniteGradientError, match=r"after epoch 0 .*Training sample 17 holds NaN or Inf"):
        fit(tmp_path, data=with_nan(17), featurize=featurize, on_error="raise")
    assert FeatureStore.open(tmp_path).snapshots == ()


def test_nan_is_found_before_training(tmp_path: Path) -> None:
    steps = Steps()
    with pytest.raises(NonFiniteGradientError, match=r"output is NaN or Inf .*Look at dataset\[2\]"):
        fit(tmp_path, data=with_nan(2), steps=steps)
    assert steps.count == 0


def test_divergence_without_a_bad_sample(tmp_path: Path) -> None:
    class Explode(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.current_epoch == 1:
                pl_module.network[2].bias.data[0] = float("inf")

    trainer = quiet_trainer(
        L.Trainer, max_epochs=3, callbacks=[Explode(), AttributionCallback(tmp_path, TRAK(16), on_error="raise")]
    )
    with pytest.raises(NonFiniteGradientError, match=r"epoch 1 \(`network.2.bias`\).*No training sample holds NaN"):
        trainer.fit(BlobClassifier(), loader_of(blobs(26)))
    result = trainer.attribute(model=BlobClassifier(), train_dataloaders=loader_of(blobs(26)), targets="train")
    assert result.scores.shape == (26, 26)  # by the snapshot of epoch 0


@pytest.mark.usefixtures("first_rows")
def test_early_stopping_on_nan_names_the_divergence(tmp_path: Path) -> None:
    callbacks = [EarlyStopping("val_loss"), AttributionCallback(tmp_path, TRAK(16), [5], on_error="raise")]
    trainer = quiet_trainer(L.Trainer, max_epochs=9, callbacks=callbacks)
    with pytest.raises(NonFiniteGradientError, match="Training sample 9 holds NaN"):
        trainer.fit(BlobClassifier(), loader_of(with_nan(9)), loader_of(blobs(9)))


@pytest.mark.parametrize("call", [1, 2, 3])
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """While writing a snapshot (1, 3) or a shard (2): an error that says so, and what was written stays usable."""
    fit(tmp_path / "whole")
    calls = []
    save_file = safetensors.torch.save_file

    def full(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == call:
            Path(args[1]).write_bytes(b"the first few bytes")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(*args, **kwargs)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(AttributionError, match=r"Could not write .*No space left on device.*run again to go on"):
        fit(tmp_path / "store", on_error="raise", journal=False)
    monkeypatch.undo()
    store = FeatureStore.open(tmp_path / "store")
    assert len(store.snapshots) == call // 2
    assert not list((tmp_path / "store").rglob("*.tmp"))
    fit(tmp_path / "store")
    whole, resumed = FeatureStore.open(tmp_path / "whole"), FeatureStore.open(tmp_path / "store")
    assert whole.manifest == resumed.manifest
    for snapshot in whole.snapshots:
        assert torch.equal(whole.column(snapshot.key, "features"), resumed.column(snapshot.key, "features"))
