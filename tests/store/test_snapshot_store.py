"""What snapshots hold beside weights: the optimizer's state, read, merged, set aside, damaged; see test_store.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lightning_attr import FeatureStore
from lightning_attr.errors import AttributionError, CorruptedStoreError
from lightning_attr.parameters.optimizer_state import AdamMoments, OptimizerState
from lightning_attr.store.manifest import Fingerprint

FINGERPRINT = Fingerprint(23, "abc", {"w": (2,)}, {"kind": "identity"})


def with_state(path: Path, value: float = 0.5) -> FeatureStore:
    store = FeatureStore.create(path, FINGERPRINT, feature_dtype="float32")
    moments = AdamMoments(torch.full((2,), value), torch.ones(2), 3, (0.9, 0.999), 1e-8, 0.1, "AdamW")
    tensors = OptimizerState({"w": moments}).tensors()
    weights = {"w": torch.ones(2)}
    store.add_snapshot("epoch=0", weights, epoch=0, global_step=1, learning_rate=0.1, optimizer=tensors)
    store.add_snapshot("epoch=1", weights, epoch=1, global_step=2, learning_rate=0.1)
    return store


def test_the_optimizers_state_comes_back(tmp_path: Path) -> None:
    with_state(tmp_path)
    store = FeatureStore.open(tmp_path)
    (moments,) = store.optimizer_state("epoch=0").moments.values()
    assert moments.exp_avg.tolist() == [0.5, 0.5]
    assert (moments.step, moments.betas, moments.kind) == (3, (0.9, 0.999), "AdamW")
    message = (
        r"'epoch=1' in .* has no optimizer state, which this method needs. Fit with AttributionCallback\(optimizer_"
    )
    with pytest.raises(AttributionError, match=message):
        store.optimizer_state("epoch=1")


def test_a_manifest_from_before_it_was_recorded(tmp_path: Path) -> None:
    store = FeatureStore.create(tmp_path, FINGERPRINT)
    store.add_snapshot("epoch=0", {"w": torch.ones(2)}, epoch=0, global_step=1, learning_rate=0.1)
    assert "optimizer" not in json.loads((tmp_path / "manifest.json").read_text())["snapshots"][0]
    assert FeatureStore.open(tmp_path).manifest == store.manifest


def test_the_optimizers_state_is_merged_and_set_aside_with_its_snapshot(tmp_path: Path) -> None:
    stores = [with_state(tmp_path / name, value) for name, value in (("a", 0.25), ("b", 0.75))]
    merged = FeatureStore.merge(stores, tmp_path / "both")
    for i, value in enumerate((0.25, 0.75)):
        (moments,) = merged.optimizer_state(f"run{i}/epoch=0").moments.values()
        assert moments.exp_avg.tolist() == [value, value]
    merged.set_aside(["run1/epoch=0"])
    assert (tmp_path / "both" / "abandoned" / "run1" / "epoch=0" / "optimizer.safetensors").exists()


def test_a_damaged_optimizers_state_is_told_and_dropped(tmp_path: Path) -> None:
    store = with_state(tmp_path)
    file = tmp_path / "snapshots" / "epoch=0" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-20] + bytes(20))
    with pytest.raises(CorruptedStoreError, match=r"optimizer\.safetensors is .*damaged.*set_aside\(\['epoch=0'\]\)"):
        store.optimizer_state("epoch=0")
    assert store.repair() == [file]
    again = FeatureStore.open(tmp_path)
    assert again.snapshot("epoch=0").optimizer is None
    assert again.weights("epoch=0")["w"].tolist() == [1, 1]
    assert again.repair() == []
    intact = with_state(tmp_path / "intact")
    assert intact.repair() == []
    assert intact.snapshot("epoch=0").optimizer is not None


@pytest.mark.parametrize(
    ("weights", "problem"),
    [({"v": torch.ones(2)}, "`w` is missing"), ({"w": torch.ones(3)}, r"`w` has the shape \(3,\)")],
)
def test_weights_of_another_model_are_told_with_their_place(
    tmp_path: Path, weights: dict[str, torch.Tensor], problem: str
) -> None:
    store = FeatureStore.create(tmp_path, Fingerprint(3, None, {"w": (2,)}, None))
    store.add_snapshot("epoch=0", weights, epoch=0, global_step=2, learning_rate=0.1)
    with pytest.raises(CorruptedStoreError, match=rf"epoch=0 does not hold the weights .*{problem}, where \(2,\) is"):
        store.weights("epoch=0")
