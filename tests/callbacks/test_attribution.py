"""What the callback stores, and that it is what a direct computation at the snapshots' weights gives."""

from __future__ import annotations

import copy
import logging
import pickle
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning_utilities.core import rank_zero
from safetensors.torch import load_file
from torch import Tensor, nn

from cases import BlobClassifier, blobs, loader_of, quiet_trainer
from lightning_attr import AttributionTrainer
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.errors import StoreMismatchError
from lightning_attr.features.featurizer import Featurizer, plan
from lightning_attr.features.learned_projection import load_projection
from lightning_attr.methods import TRAK
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.parameters.weights import load_weights
from lightning_attr.projectors import IdentityProjector
from lightning_attr.store.feature_store import FeatureStore

pytestmark = [
    # No test here needs validation data.
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    # Lightning's own, told to pytest a second time, under our name, by `pytest.warns`.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
]


class Deep(BlobClassifier):
    """Dropout and BatchNorm: features are those of eval mode, by running statistics."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.network = nn.Sequential(
                nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3)
            )


def fit(folder: Path, module: L.LightningModule | None = None, data: Any = None, **settings: Any) -> tuple[Any, Any]:
    """Train; settings of loader and callback are told apart from the trainer's by their names."""
    loader = {name: settings.pop(name) for name in ("shuffle", "drop_last", "sampler") if name in settings}
    names = ("method", "snapshots", "featurize", "noise_mask", "batch_size", "log", "feature_dtype")
    own = {name: settings.pop(name) for name in names if name in settings}
    callback = AttributionCallback(folder, **{"method": TRAK(16), "snapshots": "all", **own})
    trainer = quiet_trainer(settings.pop("kind", L.Trainer), **{"max_epochs": 2, **settings}, callbacks=[callback])
    torch.manual_seed(7)
    trainer.fit(module or BlobClassifier(), loader_of(data or blobs(26), batch_size=6, **loader))
    return trainer, callback


def reference(store: FeatureStore, key: str, module: L.LightningModule, data: Any, projector: Any) -> dict[str, Tensor]:
    """One sample after the other, at the snapshot's weights."""
    module = copy.deepcopy(module).eval()
    load_weights(module, store.weights(key))
    layout = ParameterLayout.of(module)
    first = [torch.stack(parts) for parts in zip(*(data[i] for i in range(4)), strict=True)]
    projection = projector.bind(layout, store.snapshot(key).projection)
    load_projection(projection, store, key)
    featurizer = Featurizer(module, plan(module, first, 4), projection)
    rows = [featurizer([part[None] for part in data[i]], [i]) for i in range(len(data))]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize(
    "settings",
    [
        {"shuffle": True},
        {"shuffle": True, "drop_last": True},
        {"limit_train_batches": 2},
        {"overfit_batches": 1, "shuffle": False},
        {"sampler": [3, 1, 2, 9, 9, 4, 5, 0]},
        {"shuffle": True, "batch_size": 7, "accumulate_grad_batches": 2},
        {"shuffle": True, "method": TRAK(projector=IdentityProjector())},
    ],
    ids=str,
)
def test_row_i_is_dataset_i(tmp_path: Path, settings: dict[str, Any]) -> None:
    data, module = blobs(26), Deep()
    _, callback = fit(tmp_path, module, data, **settings)
    store = FeatureStore.open(tmp_path)
    assert [snapshot.epoch for snapshot in store.snapshots] == [0, 1]
    for snapshot in store.snapshots:
        expected = reference(store, snapshot.key, module, data, callback.method.projector)
        for name, values in expected.items():
            torch.testing.assert_close(store.column(snapshot.key, name), values, rtol=1e-3, atol=1e-5)  # float16
        assert torch.equal(store.column(snapshot.key, "label"), data.tensors[1])


def test_several_shards(tmp_path: Path) -> None:
    data, module = blobs(1100), BlobClassifier()
    _, callback = fit(tmp_path, module, data, max_epochs=1, limit_train_batches=2, batch_size=50)
    store = FeatureStore.open(tmp_path)
    (snapshot,) = store.snapshots
    assert [len(store.rows(shard)) for shard in snapshot.shards] == [550, 550]  # whole batches
    expected = reference(store, snapshot.key, module, data, callback.method.projector)
    torch.testing.assert_close(store.column(snapshot.key, "features"), expected["features"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
def test_featurizing_later_gives_the_same_scores(tmp_path: Path, precision: Any) -> None:
    targets = loader_of(blobs(5, seed=1))
    scores, settings = [], {"shuffle": True, "precision": precision, "max_epochs": 3}
    for featurize in (True, False):
        trainer, callback = fit(tmp_path / str(featurize), Deep(), featurize=featurize, **settings)
        shards = [len(snapshot.shards) for snapshot in callback.store.snapshots]
        assert shards == ([1, 1, 1] if featurize else [0, 0, 0])
        result = trainer.attribute(target_dataloaders=targets)
        scores.append((result.scores.values, result.self_influence))
    assert torch.equal(scores[0][0], scores[1][0])
    assert torch.equal(scores[0][1], scores[1][1])
    assert scores[0][0].any()


def test_attribute_uses_what_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _ = fit(tmp_path)
    featurized = []
    original = Featurizer.__call__
    monkeypatch.setattr(
        Featurizer,
        "__call__",
        lambda self, batch, rows, out=None: featurized.append(rows) or original(self, batch, rows, out),
    )
    trainer.attribute(target_dataloaders=loader_of(blobs(5, seed=1)))
    # At each of two snapshots the targets, and four training samples for their losses, beside those on record.
    assert [len(rows) for rows in featurized] == [4, 5, 4, 5]


def test_bound_attribute(tmp_path: Path) -> None:
    stock, _ = fit(tmp_path / "stock")
    assert type(stock) is L.Trainer
    own, _ = fit(tmp_path / "own", kind=AttributionTrainer)
    assert "attribute" not in vars(own)
    targets = loader_of(blobs(5, seed=1))
    results = [trainer.attribute(target_dataloaders=targets) for trainer in (stock, own)]
    assert torch.equal(results[0].scores.values, results[1].scores.values)


def test_attribute_is_bound_before_any_fit() -> None:
    trainer = quiet_trainer(L.Trainer, callbacks=[AttributionCallback()])
    trainer.validate(BlobClassifier(), loader_of(blobs(5)), verbose=False)
    assert callable(trainer.attribute)


@pytest.mark.parametrize("after_fit", [False, True])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda item: pickle.loads(pickle.dumps(item))])
def test_copies(tmp_path: Path, after_fit: bool, duplicate: Any) -> None:
    """Strategies that spawn processes copy the trainer with its callbacks."""
    callback = AttributionCallback(tmp_path / "a", TRAK(16), [1], noise_mask=[True] + [False] * 25, batch_size=3)
    trainer = quiet_trainer(L.Trainer, max_epochs=2, callbacks=[callback])
    if after_fit:
        trainer.fit(BlobClassifier(), loader_of(blobs(26)))
    twin = duplicate(callback)
    assert (twin.dirpath, twin.store_path, twin.batch_size) == (
        callback.dirpath,
        callback.store_path,
        callback.batch_size,
    )
    assert twin.method.config == callback.method.config
    assert twin.schedule.snapshots == callback.schedule.snapshots
    assert twin.state_dict() == callback.state_dict()
    (own,) = [c for c in duplicate(trainer).callbacks if isinstance(c, AttributionCallback)]
    assert own.state_dict() == callback.state_dict()


class Heavy(Deep):
    """A frozen trunk and a buffer, which snapshots hold as well."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(100, 100).requires_grad_(False)
        self.register_buffer("table", torch.zeros(5000))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": TRAK(8)},
        {"module": Heavy, "featurize": False},
        {"feature_dtype": "float32"},
        {"precision": "64-true"},
        {"max_epochs": 20, "snapshots": "geometric"},
        {"max_epochs": -1, "max_steps": 100, "snapshots": "geometric", "accumulate_grad_batches": 2},
    ],
    ids=str,
)
def test_disk_use_is_announced(tmp_path: Path, settings: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    class Order(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "Attribution keeps" in record.getMessage():
                written.append(list(tmp_path.rglob("*.safetensors")))

    written: list[Any] = []
    logger: logging.Logger = rank_zero.log  # of whichever Lightning was imported last
    handler = Order()
    logger.addHandler(handler)
    with caplog.at_level(logging.INFO):
        fit(tmp_path, settings.pop("module", Deep)(), blobs(3000), limit_train_batches=10, batch_size=500, **settings)
    logger.removeHandler(handler)
    assert written == [[]]  # announced once, before the first write
    (announced,) = re.findall(r"about ([\d,.]+) MB", caplog.text)
    files = [file for file in tmp_path.rglob("*.safetensors") if "journal" not in file.parts]
    overhead = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in files)  # safetensors headers
    actual = (sum(file.stat().st_size for file in files) - overhead) / 1e6
    assert float(announced.replace(",", "")) == pytest.approx(actual, rel=0.2, abs=0.006)  # printed with two decimals
    assert "GB free" in caplog.text


@pytest.mark.parametrize(
    ("settings", "stored"),
    [
        ({}, torch.float16),
        ({"precision": "bf16-mixed"}, torch.float16),
        ({"feature_dtype": "bfloat16"}, torch.bfloat16),
        ({"feature_dtype": "float32"}, torch.float32),
        ({"precision": "64-true"}, torch.float64),
        ({"featurize": False, "feature_dtype": "bfloat16"}, torch.bfloat16),
    ],
    ids=str,
)
def test_dtype_of_the_features(tmp_path: Path, settings: dict[str, Any], stored: torch.dtype) -> None:
    trainer, callback = fit(tmp_path, **settings)
    if not callback.featurize:
        trainer.attribute(target_dataloaders=loader_of(blobs(5, seed=1)))
    (file, *_) = tmp_path.rglob("features/*.safetensors")
    columns = load_file(file)
    assert columns["features"].dtype == stored
    assert ("features_scale" in columns) == (stored == torch.float16)
    rest = torch.float64 if stored == torch.float64 else torch.float32
    assert {columns[name].dtype for name in ("output", "loss", "out_to_loss", "newton_weight")} == {rest}


def test_another_dtype_than_the_store_has_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, feature_dtype="bfloat16")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    message = (
        "keeps features in bfloat16, but here `feature_dtype` is 'float16'. Pass feature_dtype='bfloat16' to go on"
    )
    with pytest.raises(StoreMismatchError, match=re.escape(message)):
        fit(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_unknown_dtype_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"`feature_dtype` of AttributionCallback to be .* or 'float32', but got 'fp16'",
    ):
        AttributionCallback(feature_dtype="fp16")


def test_disk_use_without_a_limit_is_by_snapshot(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.should_stop = True

    callbacks = [AttributionCallback(tmp_path, TRAK(16)), Stop()]
    with caplog.at_level(logging.INFO):
        quiet_trainer(L.Trainer, max_epochs=-1, callbacks=callbacks).fit(BlobClassifier(), loader_of(blobs(26)))
    assert "features of 26 training samples at each snapshot, about 0.00 MB" in caplog.text


def test_too_little_space_is_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.warns(UserWarning, match=r"needs about 0\.0 GB, but only 0\.0 GB are free in .*Use fewer `snapshots`"):
        fit(tmp_path)


def test_a_rehearsal_writes_nothing(tmp_path: Path) -> None:
    """``fast_dev_run`` checks, and leaves nothing that the run itself would be refused for."""
    fit(tmp_path / "store", fast_dev_run=True)
    assert not (tmp_path / "store").exists()
    with pytest.raises(ValueError, match="Expected argument `noise_mask`"):
        fit(tmp_path / "store", fast_dev_run=True, noise_mask=[True])


def test_default_directory(tmp_path: Path) -> None:
    paths = []
    for _ in range(2):
        callback = AttributionCallback(method=TRAK(16))
        assert callback.store_path is None
        trainer = quiet_trainer(L.Trainer, max_epochs=1, callbacks=[callback], default_root_dir=tmp_path, logger=True)
        trainer.fit(BlobClassifier(), loader_of(blobs(26)))
        paths.append(callback.store_path)
        assert callback.store_path == Path(trainer.log_dir) / "attribution"
        assert FeatureStore.exists(callback.store_path)
    assert paths[0] != paths[1]


def test_one_callback_in_two_runs(tmp_path: Path) -> None:
    """What it remembers of the first run does not get into the second."""
    callback = AttributionCallback(method=TRAK(16), snapshots=[0])
    for version in range(2):
        trainer = quiet_trainer(L.Trainer, max_epochs=1, callbacks=[callback], default_root_dir=tmp_path, logger=True)
        trainer.fit(BlobClassifier(seed=version), loader_of(blobs(24)))
        (snapshot,) = callback.store.snapshots
        assert snapshot.learning_rate == pytest.approx(3 * 0.1)
        assert f"version_{version}" in str(callback.store_path)


def test_fitting_on(tmp_path: Path) -> None:
    """A second ``fit`` of the same trainer goes on in the same store."""
    trainer, callback = fit(tmp_path, max_epochs=2)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(trainer.lightning_module, loader_of(blobs(26), batch_size=6))
    assert [snapshot.epoch for snapshot in callback.store.snapshots] == [0, 1, 2, 3]
    assert [snapshot.learning_rate for snapshot in callback.store.snapshots] == pytest.approx([0.5] * 4)


def test_transfer_hooks_of_the_datamodule_are_used(tmp_path: Path) -> None:
    class Doubling(L.LightningDataModule):
        def train_dataloader(self) -> Any:
            return loader_of(blobs(26), batch_size=6, shuffle=True)

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return 2 * batch[0], batch[1]

    callback, module = AttributionCallback(tmp_path, TRAK(16), [0]), BlobClassifier()
    quiet_trainer(L.Trainer, max_epochs=1, callbacks=[callback]).fit(module, datamodule=Doubling())
    (snapshot,) = callback.store.snapshots
    x, y = blobs(26).tensors
    doubled = torch.utils.data.TensorDataset(2 * x, y)
    expected = reference(callback.store, snapshot.key, module, doubled, callback.method.projector)
    torch.testing.assert_close(
        callback.store.column(snapshot.key, "features"), expected["features"], rtol=1e-3, atol=1e-5
    )
