"""Stores made of checkpoint files, beside those that the callback writes and attributions by the files themselves."""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from cases import QUIET, BlobClassifier, blobs, loader_of, quiet_trainer, told
from lightning_attr import FeatureStore
from lightning_attr.attribution import checkpoint_files
from lightning_attr.attribution.checkpoint_store import from_checkpoints
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.errors import AttributionError, CorruptedStoreError, StoreInUseError, StoreMismatchError
from lightning_attr.files.writer_lock import WriterLock
from lightning_attr.methods import LESS, TRAK, GradDot, Influence
from lightning_attr.projectors import KroneckerProjector
from lightning_attr.store.feature_store import FromCheckpoints

METHOD = TRAK(projector=KroneckerProjector(16))


class Exact(BlobClassifier):
    """In float64."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.double())


class Blobs(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader_of(blobs(24), shuffle=True)

    def test_dataloader(self) -> Any:
        return loader_of(blobs(6, seed=1))


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    kept = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    callback = AttributionCallback(tmp_path / "by the callback", METHOD, snapshots="all")
    settings = {**QUIET, "enable_checkpointing": True, "max_epochs": 3}
    L.Trainer(**settings, callbacks=[callback, kept]).fit(Exact(), datamodule=Blobs())
    return sorted(tmp_path.glob("*.ckpt"))


def test_it_scores_as_the_callback_and_as_the_files_do(tmp_path: Path, files: list[Path]) -> None:
    module, generator = Exact(seed=5), torch.get_rng_state()
    weights = [p.clone() for p in module.parameters()]
    store = FeatureStore.from_checkpoints(files, module, Blobs(), dirpath=tmp_path / "store", method=METHOD)
    assert torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(p, own) for p, own in zip(module.parameters(), weights, strict=True))
    recorded = FeatureStore.open(tmp_path / "by the callback")
    assert [s.key for s in store.snapshots] == [s.key for s in recorded.snapshots]
    assert [s.weights for s in store.snapshots] == [s.weights for s in recorded.snapshots]
    for snapshot in store.snapshots:
        assert not store.missing(snapshot.key)
        ours, theirs = (one.column(snapshot.key, "features") for one in (store, recorded))
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)

    trainer = quiet_trainer()
    found = trainer.attribute(Blobs(), model=Exact(), store=tmp_path / "store").scores.values
    by_callback = trainer.attribute(Blobs(), model=Exact(), store=recorded.path).scores.values
    by_files = trainer.attribute(Blobs(), model=Exact(), ckpt_path=files, method=METHOD).scores.values
    torch.testing.assert_close(found, by_callback, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found, by_files, rtol=1e-10, atol=1e-10)


def test_it_goes_on(tmp_path: Path, files: list[Path]) -> None:
    arguments: dict[str, Any] = {"dirpath": tmp_path / "store", "method": METHOD, "feature_dtype": "float32"}
    FeatureStore.from_checkpoints(files[:1], Exact(), Blobs(), **arguments)
    store = FeatureStore.from_checkpoints(files, Exact(), train_dataloaders=loader_of(blobs(24)), **arguments)
    assert len(store.snapshots) == 3
    again = FeatureStore.from_checkpoints(files, Exact(), Blobs(), **arguments)
    assert again.manifest == store.manifest
    with pytest.raises(StoreMismatchError, match="keeps features in float32, but here `feature_dtype` is 'float16'"):
        FeatureStore.from_checkpoints(files, Exact(), Blobs(), **{**arguments, "feature_dtype": "float16"})


def test_a_method_without_features_has_snapshots(tmp_path: Path, files: list[Path]) -> None:
    store = FeatureStore.from_checkpoints(
        files, Exact(), Blobs(), dirpath=tmp_path / "store", method=Influence("empirical_fisher")
    )
    assert [snapshot.shards for snapshot in store.snapshots] == [{}, {}, {}]


def test_each_file_is_read_once(tmp_path: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def count(path: str, mode: str) -> Any:
        opened.append(path)
        return fsspec_open(path, mode)

    fsspec_open = checkpoint_files.fsspec.open
    monkeypatch.setattr(checkpoint_files.fsspec, "open", count)
    urls = [f"file://{file}" for file in files]
    FeatureStore.from_checkpoints(urls, Exact(), Blobs(), dirpath=tmp_path / "store", method=METHOD)
    assert opened == urls


def _flip(path: Path) -> None:
    """Change a byte in the middle of a weight, which torch itself does not notice."""
    content = bytearray(path.read_bytes())
    weight = torch.load(path, weights_only=True)["state_dict"]["network.0.weight"].numpy().tobytes()
    content[content.index(weight) + len(weight) // 2] ^= 64
    path.write_bytes(content)


def _rewrite(path: Path, **changes: Any) -> None:
    torch.save({**torch.load(path, weights_only=True), **changes}, path)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (_flip, CorruptedStoreError, r"epoch=2.ckpt is damaged.*checksum of .*data/"),
        (lambda path: path.write_bytes(path.read_bytes()[:-500]), CorruptedStoreError, "epoch=2.ckpt is damaged"),
        (lambda path: path.write_bytes(b""), CorruptedStoreError, "epoch=2.ckpt is damaged"),
        (lambda path: (path.unlink(), path.mkdir()), AttributionError, "is a directory: a sharded strategy"),
        (lambda path: path.unlink(), FileNotFoundError, r"There is no checkpoint .*epoch=2.ckpt"),
        (lambda path: _rewrite(path, state_dict={}), StoreMismatchError, "of another module than Exact: .*Missing key"),
        (lambda path: _rewrite(path, global_step=6), StoreMismatchError, "are of the same step"),
        (lambda path: _rewrite(path, optimizer_states=[{}, {}]), StoreMismatchError, "the states of 2 optimizers"),
    ],
    ids=["flipped", "short", "empty", "sharded", "gone", "other module", "same step", "two optimizers"],
)
@pytest.mark.parametrize("call", ["from_checkpoints", "attribute"])
def test_nothing_stays_of_checkpoints_that_cannot_be_used(
    tmp_path: Path, files: list[Path], call: str, spoil: Any, error: Any, message: str
) -> None:
    spoil(files[-1])
    if "same step" in message:
        _rewrite(files[-1], epoch=1)
    where = tmp_path / "new" / "store"
    arguments = {"model": Exact(), "ckpt_path": files, "method": METHOD}
    if call == "attribute":
        make = partial(quiet_trainer().attribute, Blobs(), store=where, **arguments)
    else:
        make = partial(FeatureStore.from_checkpoints, datamodule=Blobs(), dirpath=where, **arguments)
    with pytest.raises(error, match=message):
        make()
    assert not where.exists()


def test_type_checkers_see_the_arguments_of_the_function() -> None:
    function, shown = (inspect.signature(call) for call in (from_checkpoints, FromCheckpoints.__call__))
    seen = [parameter for name, parameter in shown.parameters.items() if name != "self"]
    assert [(own.name, own.kind, own.default) for own in seen] == [
        (own.name, own.kind, own.default) for own in function.parameters.values()
    ]
    assert inspect.signature(FeatureStore.from_checkpoints) == function


def test_wrong_arguments(tmp_path: Path, files: list[Path]) -> None:
    def make(*arguments: Any, **named: Any) -> None:
        FeatureStore.from_checkpoints(*arguments, **{"dirpath": tmp_path / "store", **named})

    with pytest.raises(ValueError, match=r"`ckpt_path` of FeatureStore\.from_checkpoints to be .*at least one"):
        make([], Exact(), Blobs())
    with pytest.raises(AttributionError, match='ckpt_path="best" asks the ModelCheckpoint of this trainer'):
        make("best", Exact(), Blobs())
    with pytest.raises(ValueError, match=r"`feature_dtype` of FeatureStore\.from_checkpoints"):
        make(files, Exact(), Blobs(), feature_dtype="int8")
    with pytest.raises(TypeError, match=r"`method` of FeatureStore\.from_checkpoints"):
        make(files, Exact(), Blobs(), method="TRAK")
    with pytest.raises(TypeError, match=r"`datamodule` of FeatureStore\.from_checkpoints to be a LightningDataModule"):
        make(files, Exact(), loader_of(blobs(24)))
    with pytest.raises(ValueError, match="Expected training data"):
        make(files, Exact())
    with pytest.raises(AttributionError, match="moments"):
        make(files, Exact(), Blobs(), method=LESS())
    with WriterLock(tmp_path / "store"):
        pass
    assert not FeatureStore.exists(tmp_path / "store")


def test_a_checkpoint_of_a_newer_lightning_is_read_with_a_warning(tmp_path: Path, files: list[Path]) -> None:
    _rewrite(files[0], **{"pytorch-lightning_version": "99.0.0"})
    with told("produced with Lightning v?99.0.0, which is newer"):
        FeatureStore.from_checkpoints(files[0], Exact(), Blobs(), dirpath=tmp_path / "store", method=GradDot())


def test_a_store_that_another_process_writes_is_left_alone(
    tmp_path: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    where = tmp_path / "store"
    FeatureStore.from_checkpoints(files[:1], Exact(), Blobs(), dirpath=where, method=METHOD)
    monkeypatch.setattr("lightning_attr.attribution.predict_step.take", lambda path: (None, f"{path} is being written"))
    with pytest.raises(StoreInUseError, match="is being written"):
        FeatureStore.from_checkpoints(files, Exact(), Blobs(), dirpath=where, method=METHOD)
