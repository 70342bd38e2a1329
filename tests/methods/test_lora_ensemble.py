"""Adapters of several runs on one frozen base (LoRA ensembles, Deng et al., 2024): merged stores and TRAK."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from cases import blobs, loader_of, quiet_trainer
from lightning_attr import AttributionMixin, FeatureStore, attribute
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.errors import CorruptedStoreError
from lightning_attr.features.snapshot_model import SnapshotModel
from lightning_attr.methods import TRAK
from lightning_attr.projectors import IdentityProjector

peft = pytest.importorskip("peft", minversion="0.17", reason="needs peft")

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")
N, M, RANK = 30, 5, 2


class Adapted(AttributionMixin, L.LightningModule):
    """A base that is the same for every seed, with an adapter that is not."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            base = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
            torch.manual_seed(1 + seed)
            config = peft.LoraConfig(r=RANK, lora_alpha=4, target_modules=["0", "2"], init_lora_weights=True)
            self.network = peft.get_peft_model(base, config)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.2)


def _fit(folder: Path, seed: int) -> Path:
    callback = AttributionCallback(folder, method=TRAK(projector=IdentityProjector()), snapshots=[1, 3], log=False)
    trainer = quiet_trainer(max_epochs=4, callbacks=[callback])
    torch.manual_seed(seed)
    trainer.fit(Adapted(seed), loader_of(blobs(N), shuffle=True))
    return folder


def _attributed(store: Path, method: TRAK | None = None) -> Any:
    loaders = {"train_dataloaders": loader_of(blobs(N)), "target_dataloaders": loader_of(blobs(M, seed=1))}
    return attribute(quiet_trainer(), model=Adapted(9), store=store, method=method, **loaders)


def test_adapters_of_several_runs_are_one_ensemble(tmp_path: Path) -> None:
    stores = [_fit(tmp_path / f"run-{seed}", seed) for seed in range(3)]
    FeatureStore.merge(stores, tmp_path / "ensemble")
    method = TRAK(projector=IdentityProjector(), balanced=False)
    alone = [_attributed(store, method).scores.values for store in stores]
    assert (alone[0] - alone[1]).abs().max() > 0.05 * alone[0].abs().max()
    together = _attributed(tmp_path / "ensemble", method)
    torch.testing.assert_close(together.scores.values, torch.stack(alone).mean(0), rtol=1e-4, atol=1e-5)
    snapshots = together.scores.provenance["snapshots"]
    assert [key.split("/")[0] for key in snapshots] == ["run0", "run0", "run1", "run1", "run2", "run2"]
    for snapshot in FeatureStore.open(tmp_path / "ensemble").snapshots:
        assert snapshot.trainable
        assert all("lora" in name for name in snapshot.trainable)


def test_before_the_first_step_half_of_the_features_are_empty() -> None:
    module = Adapted(0).double().eval()
    batch = tuple(torch.utils.data.default_collate([blobs(N)[i] for i in range(N)]))
    batch = (batch[0].double(), batch[1])
    model = SnapshotModel.of(module, [batch], [batch])
    ((_, columns),) = model.train(IdentityProjector().bind(model.layout, model.key))
    start = 0
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            part = columns["features"][:, start : start + parameter.numel()]
            start += parameter.numel()
            assert bool((part == 0).all()) == ("lora_A" in name), name
    assert start == columns["features"].shape[1] == RANK * (4 + 8 + 8 + 3)


def test_the_frozen_base_is_written_once(tmp_path: Path) -> None:
    store = FeatureStore.open(_fit(tmp_path / "run", seed=0))
    first, last = store.snapshots
    frozen = [tmp_path / "run" / snapshot.folder / "frozen.safetensors" for snapshot in (first, last)]
    assert frozen[0].stat().st_ino == frozen[1].stat().st_ino
    weights = store.weights(last.key)
    assert set(weights) == {name for name, _ in Adapted(0).named_parameters()}
    trained = load_file(tmp_path / "run" / last.folder / "weights.safetensors")
    assert all("lora" in name for name in trained)
    assert sum(map(Tensor.numel, trained.values())) < sum(map(Tensor.numel, weights.values())) / 2
    merged = FeatureStore.merge([tmp_path / "run"], tmp_path / "merged")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in merged.weights(f"run0/{last.key}").items())
    shutil.copy(tmp_path / "run" / first.folder / "weights.safetensors", tmp_path / "run" / last.folder)
    with pytest.raises(CorruptedStoreError, match=r"is not the file that belongs here"):
        store.weights(last.key)
    frozen[0].write_bytes(frozen[0].read_bytes()[:-8])
    with pytest.raises(CorruptedStoreError, match=r"frozen.safetensors is .*damaged.*set_aside"):
        store.weights(first.key)


def test_a_run_goes_on_with_its_frozen_base(tmp_path: Path) -> None:
    _fit(tmp_path / "run", seed=0)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.safetensors")}
    _fit(tmp_path / "run", seed=0)  # the same run again finds its own snapshots
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.safetensors")} == before
    assert not (tmp_path / "run" / "abandoned").exists()
