"""Whole files in a place that is not theirs: of another snapshot, store, row, retraining or result."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_attr import AttributionResult, FeatureStore, ScoreMatrix
from lightning_attr.errors import CorruptedStoreError
from lightning_attr.evaluation.ground_truth import GroundTruth, Records
from lightning_attr.evaluation.subsets import random_subsets
from lightning_attr.features.snapshot_model import SnapshotModel
from lightning_attr.parameters.optimizer_state import AdamMoments, OptimizerState
from lightning_attr.store import feature_store as store_module
from lightning_attr.store.manifest import Fingerprint

ROWS = 20  # shards of 8, 8 and 4
FINGERPRINT = Fingerprint(ROWS, "abc", {"w": (2,)}, {"kind": "identity"})
KEYS = ("epoch=0", "epoch=1")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_SHARD_ROWS", 8)


def columns(store: FeatureStore, shard: int) -> dict[str, Tensor]:
    """The same in every shard, snapshot and store, so that hashes of the content tell nothing apart."""
    rows = len(store.rows(shard))
    return {"features": torch.ones(rows, 2), "loss": torch.zeros(rows)}


def made(path: Path, fingerprint: Fingerprint = FINGERPRINT) -> FeatureStore:
    """Two snapshots with the same weights, moments and features."""
    store = FeatureStore.create(path, fingerprint, batch_size=4)
    moments = AdamMoments(torch.ones(2), torch.ones(2), 1, (0.9, 0.999), 1e-8, 0.1, "Adam")
    for i, key in enumerate(KEYS):
        state = OptimizerState({"w": moments}).tensors()
        store.add_snapshot(key, {"w": torch.ones(2)}, epoch=i, global_step=i, learning_rate=0.1, optimizer=state)
        for shard in store.missing(key):
            store.write_shard(key, shard, columns(store, shard))
    return store


def read_all(path: Path) -> None:
    store = FeatureStore.open(path)
    for snapshot in store.snapshots:
        store.weights(snapshot.key)
        store.optimizer_state(snapshot.key)
        store.column(snapshot.key, "features")


FILES = ("weights.safetensors", "optimizer.safetensors", "features/00000.safetensors")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("of", ["snapshot", "store"])
def test_a_file_of_another_snapshot_or_store_is_refused(tmp_path: Path, file: str, of: str) -> None:
    store, other = made(tmp_path / "a"), made(tmp_path / "b")
    own = store.path / "snapshots" / KEYS[0] / file
    if of == "snapshot":
        shutil.copy(store.path / "snapshots" / KEYS[1] / file, own)
        expected = "snapshot epoch=1, not epoch=0"
    else:
        shutil.copy(other.path / "snapshots" / KEYS[0] / file, own)
        expected = f"store {other.manifest.id}, not {store.manifest.id}"
    with pytest.raises(CorruptedStoreError, match=rf"{own.name} is not the file .* here: it is of {expected}\. \S+"):
        read_all(store.path)


def test_a_shard_of_other_rows_is_refused(tmp_path: Path) -> None:
    store = made(tmp_path)
    folder = store.path / "snapshots" / KEYS[0] / "features"
    shutil.copy(folder / "00001.safetensors", folder / "00000.safetensors")
    with pytest.raises(CorruptedStoreError, match=r"00000.* of rows 8-15, not 0-7\. .*repair\(\)` drops it"):
        read_all(store.path)
    assert store.repair() == [folder / "00000.safetensors"]


CHANGES: dict[str, dict[str, Any]] = {
    "data": {"data": "xyz"},
    "projection": {"projector": {"kind": "identity", "seed": 1}},
    "output": {"output": "another"},
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_whole_shard_of_another_making_is_not_adopted(tmp_path: Path, what: str) -> None:
    """What a crash leaves is adopted only if it is what would be computed."""
    known = Fingerprint(ROWS, "abc", {"w": (2,)}, {"kind": "identity"}, "this")
    store = made(tmp_path / "store", known)
    other = made(tmp_path / "other", replace(known, **CHANGES[what]))
    (store.path / "snapshots" / KEYS[0] / "features" / "00000.safetensors").unlink()
    store.repair()
    assert store.missing(KEYS[0]) == [0]
    file = Path("snapshots", KEYS[0], "features", "00000.safetensors")
    shutil.copy(other.path / file, store.path / file)
    store.adopt(KEYS[0])
    assert store.missing(KEYS[0]) == [0]
    store.write_shard(KEYS[0], 0, columns(store, 0))
    store = FeatureStore.open(store.path)
    assert store.missing(KEYS[0]) == []
    read_all(store.path)


def test_files_of_a_merged_store_keep_their_origin(tmp_path: Path) -> None:
    a, b = made(tmp_path / "a"), made(tmp_path / "b")
    merged = FeatureStore.merge([FeatureStore.merge([a, b], tmp_path / "ab"), a], tmp_path / "aba")
    read_all(merged.path)
    assert [s.origin for s in merged.snapshots] == [
        i for i in (a.manifest.id, b.manifest.id, a.manifest.id) for _ in KEYS
    ]
    first, second = (merged.path / "snapshots" / "run0" / run / KEYS[0] / FILES[0] for run in ("run0", "run1"))
    shutil.copy(first, tmp_path / "kept")
    first.unlink()  # a link: the source stays
    shutil.copy(second, first)
    with pytest.raises(CorruptedStoreError, match=f"of store {b.manifest.id}, not {a.manifest.id}"):
        read_all(merged.path)
    read_all(a.path)
    merged = FeatureStore.merge([a], tmp_path / "again")
    merged.write_shard("run0/epoch=0", 0, columns(merged, 0))
    read_all(merged.path)


def test_what_was_computed_at_another_snapshot_is_refused(tmp_path: Path) -> None:
    store = made(tmp_path)

    def model(key: str) -> SnapshotModel:
        layer = torch.nn.Linear(1, 1)
        found = object.__new__(SnapshotModel)
        vars(found).update(module=layer, key=key, folder=tmp_path / "snapshots" / key / "computed", writer=True)
        vars(found).update(place=store.place(key, "computed"), train_digest="abc")
        return found

    for key in KEYS:
        model(key).kept("factors", lambda: {"x": torch.ones(1)})
    own, other = (tmp_path / "snapshots" / key / "computed" / "factors.safetensors" for key in KEYS)
    shutil.copy(other, own)
    with pytest.raises(CorruptedStoreError, match=r"of snapshot epoch=1, not epoch=0\. Delete it: it is"):
        model(KEYS[0]).kept("factors", dict)
    shutil.copy(other, other.with_name("others.safetensors"))
    with pytest.raises(CorruptedStoreError, match="of name factors, not others"):
        model(KEYS[1]).kept("others", dict)


def test_the_run_of_another_retraining_or_ground_truth_is_refused(tmp_path: Path) -> None:
    plan = random_subsets(6, num_subsets=2, alpha=0.5, repeats=2, seed=0)
    truths = [Records.prepare(tmp_path / name, plan, {"n_train": 6, "n_target": 2}) for name in ("a", "b")]
    for records in truths:
        for retraining in plan:
            records.write(retraining, torch.ones(2))
    first, second = list(plan)[:2]
    shutil.copy(truths[0].path(second), truths[0].path(first))
    with pytest.raises(
        CorruptedStoreError, match=r"of retraining subset=\d-repeat=\d, not subset=0-repeat=0. Delete it and run again"
    ):
        GroundTruth.open(tmp_path / "a")
    shutil.copy(truths[1].path(first), truths[0].path(first))
    with pytest.raises(CorruptedStoreError, match=r"subset=0-repeat=0.* is not the file .* of truth \w+, not"):
        GroundTruth.open(tmp_path / "a")
    shutil.copy(tmp_path / "a" / "masks.safetensors", tmp_path / "b" / "masks.safetensors")
    with pytest.raises(CorruptedStoreError, match=r"masks.* of truth"):
        GroundTruth.open(tmp_path / "b")


@pytest.mark.parametrize("file", ["scores.safetensors", "scores.json", "result.safetensors"])
def test_a_part_of_another_result_is_refused(tmp_path: Path, file: str) -> None:
    for name, value in (("a", 1.0), ("b", 2.0)):
        scores = ScoreMatrix(torch.full((3, 2), value), provenance={"method": name})
        AttributionResult(scores, torch.ones(3), torch.ones(3)).save(tmp_path / name)
    shutil.copy(tmp_path / "b" / file, tmp_path / "a" / file)
    with pytest.raises(CorruptedStoreError, match=r"safetensors is (damaged|not the file).*Save the result"):
        AttributionResult.load(tmp_path / "a")
    assert AttributionResult.load(tmp_path / "b").scores.values.unique().tolist() == [2]
