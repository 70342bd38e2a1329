"""dattri at the weights of our snapshots: what it computes, and what ours compute from the same run."""

from __future__ import annotations

import doctest
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from cases import BlobClassifier, blobs, quiet_trainer
from lightning_attr import AttributionTrainer, FeatureStore, attribute
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.errors import MissingDependencyError, StoreMismatchError
from lightning_attr.interop import dattri_task
from lightning_attr.methods import TRAK, GradDot
from lightning_attr.parameters.weights import weights_of
from lightning_attr.projectors import IdentityProjector
from lightning_attr.store import feature_store as store_module
from lightning_attr.store.manifest import Fingerprint

TRAIN, TARGETS = blobs(20), blobs(6, seed=1)


class Regressor(L.LightningModule):
    """Without the mixin: what is attributed is its training loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def training_step(self, batch: Any) -> Tensor:
        return F.mse_loss(self.layer(batch[0]).squeeze(1), batch[1].float())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def loader(data: TensorDataset) -> DataLoader[Any]:
    return DataLoader(data, batch_size=4)


def trained(module: L.LightningModule, folder: Path) -> tuple[FeatureStore, AttributionTrainer]:
    method = GradDot(projector=IdentityProjector())
    callback = AttributionCallback(dirpath=folder, method=method, feature_dtype="float32")
    trainer = quiet_trainer(max_epochs=2, callbacks=[callback])
    trainer.fit(module, loader(TRAIN))
    return FeatureStore.open(folder), trainer


def tracin(task: Any, weights: list[float]) -> Tensor:
    algorithm = pytest.importorskip("dattri.algorithm.tracin")
    attributor = algorithm.TracInAttributor(task, torch.tensor(weights), normalized_grad=False)
    attributor.projector_kwargs = None  # as an argument it would mean dattri's default projection
    return attributor.attribute(loader(TRAIN), loader(TARGETS))


@pytest.mark.parametrize("module", [BlobClassifier, Regressor])
def test_tracin_at_the_last_snapshot_is_minus_grad_dot(module: type[L.LightningModule], tmp_path: Path) -> None:
    pytest.importorskip("dattri")
    own = module()
    store, trainer = trained(own, tmp_path)
    result = attribute(trainer, model=own, train_dataloaders=loader(TRAIN), target_dataloaders=loader(TARGETS))
    task = dattri_task(store, own)
    assert task.get_checkpoints() == [snapshot.key for snapshot in store.snapshots]
    found = tracin(task, [0.0, 1.0])
    torch.testing.assert_close(found, -result.scores.values, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(tracin(dattri_task(tmp_path, own), [1.0, 0.0]), found, rtol=0.01)


def test_the_weights_are_those_of_the_snapshot(tmp_path: Path) -> None:
    pytest.importorskip("dattri")
    module = BlobClassifier().train()
    store, _ = trained(module, tmp_path)
    task = dattri_task(str(tmp_path), module)
    for number, snapshot in enumerate(store.snapshots):
        task.get_param(ckpt_idx=number)
        for name, tensor in store.weights(snapshot.key).items():
            assert torch.equal(weights_of(module)[name], tensor)
    assert not module.training


def test_trak_of_dattri_agrees_with_ours_as_published(tmp_path: Path) -> None:
    algorithm = pytest.importorskip("dattri.algorithm.trak")
    module = BlobClassifier()
    _, trainer = trained(module, tmp_path)
    method = TRAK(projector=IdentityProjector(), newton_weights=False, damping=0.01)
    data = {"train_dataloaders": loader(TRAIN), "target_dataloaders": loader(TARGETS)}
    ours = attribute(trainer, model=module, method=method, store=tmp_path, **data).scores.values
    task = dattri_task(tmp_path, module, train="output")
    attributor = algorithm.TRAKAttributor(
        task,
        lambda params, sample: task.original_target_func(params, sample).sigmoid(),
        projector_kwargs={"proj_dim": 2048},  # more dimensions than parameters: nearly the identity
        regularization=1e-3,
    )
    theirs = attributor.attribute(loader(TARGETS), loader(TRAIN))
    assert torch.corrcoef(torch.stack([ours.flatten(), theirs.flatten()]))[0, 1] > 0.95


def test_loss_and_output_are_those_of_the_module(tmp_path: Path) -> None:
    pytest.importorskip("dattri")
    module = BlobClassifier()
    trained(module, tmp_path)
    params, sample = dict(module.named_parameters()), TARGETS[0]
    logits = module(sample[0][None])
    loss = F.cross_entropy(logits, sample[1][None])
    task = dattri_task(tmp_path, module)
    torch.testing.assert_close(task.original_loss_func(params, sample), loss)
    margin = task.original_target_func(params, sample)
    torch.testing.assert_close(F.softplus(-margin), loss)
    torch.testing.assert_close(dattri_task(tmp_path, module, train="output").original_loss_func(params, sample), margin)


@pytest.mark.parametrize("feature_dtype", ["float16", "float32"])
def test_the_five_lines_that_read_a_store_without_this_package(tmp_path: Path, feature_dtype: str) -> None:
    source = "".join(example.source for example in doctest.DocTestParser().get_examples(store_module.__doc__ or ""))
    assert len(source.splitlines()) <= 5
    assert "lightning_attr" not in source
    names: dict[str, Any] = {}
    exec(source, names)
    store = FeatureStore.create(tmp_path, Fingerprint(5, None, {"w": (2,)}, None), feature_dtype=feature_dtype)
    snapshot = store.add_snapshot("last", {"w": torch.ones(2)}, epoch=0, global_step=1, learning_rate=0.1)
    store.write_shard("last", 0, {"features": torch.randn(5, 3), "loss": torch.zeros(5)})
    found = names["read_features"](tmp_path / snapshot.folder / "features" / "00000.safetensors")
    assert torch.equal(found, store.column("last", "features"))


def test_bad_input(tmp_path: Path) -> None:
    pytest.importorskip("dattri")
    module = BlobClassifier()
    trained(module, tmp_path / "full")
    FeatureStore.create(tmp_path / "empty", Fingerprint(3, None, {"w": (2,)}, None))
    with pytest.raises(ValueError, match=r"Expected a store with snapshots, but .*empty has none"):
        dattri_task(tmp_path / "empty", module)
    with pytest.raises(ValueError, match="`train` of dattri_task to be 'loss' or 'output', but got 'both'"):
        dattri_task(tmp_path / "full", module, train="both")  # type: ignore[arg-type]
    with pytest.raises(StoreMismatchError, match="The snapshot does not fit Regressor"):
        dattri_task(tmp_path / "full", Regressor())
    with pytest.raises(TypeError, match="AttributionMixin among its bases"):
        dattri_task(tmp_path / "full", nn.Linear(1, 1))


def test_missing_dattri_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "dattri.task", None)
    with pytest.raises(MissingDependencyError, match=r"needs dattri, which is not installed. Run `pip install dattri`"):
        dattri_task(tmp_path, BlobClassifier())
