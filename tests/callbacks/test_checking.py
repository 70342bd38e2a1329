"""The look before a run says what the run then does, refuses what it refuses, and leaves no trace."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, SequentialSampler, TensorDataset

from cases import BlobClassifier, blobs, loader_of, quiet_trainer
from lightning_attr.attribution.run_check import ALONE, FROZEN, HOOKS, LOOP, VMAP
from lightning_attr.callbacks import AttributionCallback, AttributionMonitor
from lightning_attr.methods import LESS, TRAK, GradDot, Influence
from lightning_attr.projectors import KroneckerProjector

pytestmark = pytest.mark.filterwarnings("ignore:.*litlogger", "ignore:The '.*_dataloader' does not have many workers")
METHOD = GradDot(projector=KroneckerProjector(16))


class Net(BlobClassifier):
    """With a layer of each kind: by rule, by fallback, frozen; buffers, and randomness in its construction of data."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Tanh(), nn.Linear(8, 3))
        self.scale = nn.Parameter(torch.ones(3))
        self.network[1].requires_grad_(False)
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        return (self.network(x).T * self.scale[:, None]).T

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(batch_idx)
        return super().training_step(batch, batch_idx)


class Blobs(L.LightningDataModule):
    def __init__(self, n: int = 40) -> None:
        super().__init__()
        self.n, self.stages = n, []

    def setup(self, stage: str) -> None:
        self.stages.append(stage)
        self.data = blobs(self.n)
        torch.randperm(4)

    def train_dataloader(self) -> Any:
        return loader_of(self.data, shuffle=True)


def state_of(module: nn.Module, *others: Any) -> list[Any]:
    tensors = [tensor.clone() for tensor in module.state_dict().values()]
    flags = [p.requires_grad for p in module.parameters()] + [one.training for one in module.modules()]
    streams = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]  # noqa: NPY002
    attributes = [{name: repr(value) for name, value in vars(one).items()} for one in (module, *others)]
    return [*map(Tensor.tolist, tensors), flags, streams, attributes]


def test_no_trace_is_left(tmp_path: Path) -> None:
    module, data, callback = Net(), Blobs(), AttributionCallback(tmp_path / "store", METHOD)
    trainer = quiet_trainer(max_epochs=3, callbacks=[callback])
    trainer.predict_loop, trainer.state  # noqa: B018 - made when they are first asked for
    before = state_of(module, data, callback)
    callbacks, loops = list(trainer.callbacks), (trainer.predict_loop, trainer.fit_loop._combined_loader)
    check = callback.check(module, data, trainer=trainer)
    assert check.ok, check.refused
    assert state_of(module, data, callback) == before
    assert trainer.callbacks == callbacks
    assert (trainer.predict_loop, trainer.fit_loop._combined_loader) == loops
    assert not (tmp_path / "store").exists()


def test_training_after_it_is_training_without(tmp_path: Path) -> None:
    def weights(look: bool) -> list[Tensor]:
        torch.manual_seed(3)
        module, callback = Net(), AttributionCallback(tmp_path / str(look), METHOD)
        trainer = quiet_trainer(max_epochs=2, callbacks=[callback])
        if look:
            callback.check(module, Blobs(), trainer=trainer)
        trainer.fit(module, datamodule=Blobs())
        return list(module.state_dict().values())

    assert all(torch.equal(a, b) for a, b in zip(weights(True), weights(False), strict=True))


def test_it_says_what_the_run_then_writes(tmp_path: Path) -> None:
    callback = AttributionCallback(tmp_path, METHOD, featurize=True)
    trainer = quiet_trainer(max_epochs=5, callbacks=[callback])
    check = callback.check(BlobClassifier(), Blobs(600), trainer=trainer)
    trainer.fit(BlobClassifier(), datamodule=Blobs(600))
    snapshots = callback.store.snapshots
    assert check.snapshots == len(snapshots) == 4
    snapshot_files = tmp_path / "snapshots"
    sizes = {
        kind: sum(f.stat().st_size for f in snapshot_files.rglob(kind)) / 4 for kind in ("weights*", "0*.safetensors")
    }
    header = 2000
    assert check.weight_bytes == pytest.approx(sizes["weights*"], abs=header)
    assert check.feature_bytes == pytest.approx(sizes["0*.safetensors"], abs=header)
    assert check.total_bytes == 4 * check.snapshot_bytes
    assert (check.num_samples, check.mode, check.device, check.featurizes) == (600, "eval", "cpu", True)
    assert check.seconds is not None
    assert 0 < check.seconds < 10
    assert check.free_bytes is not None
    assert f"4 snapshots, {check.total_bytes / 1e3:.3g} kB" in str(check)


def test_layers_and_their_paths() -> None:
    check = AttributionCallback(method=METHOD).check(Net(), Blobs())
    assert [(layer.name, layer.kind, layer.parameters, layer.path) for layer in check.layers] == [
        ("", "Net", 3, VMAP),
        ("network.0", "Linear", 40, HOOKS),
        ("network.1", "BatchNorm1d", 16, FROZEN),
        ("network.4", "Linear", 27, HOOKS),
    ]
    assert [layer.share for layer in check.layers] == [3 / 70, 40 / 70, 0, 27 / 70]
    assert any("`scale` (4.3% of the trainable parameters) go through vmap(grad)" in note for note in check.notes)
    shown = [line.split() for line in str(check).splitlines()]
    assert ["hooks,", "in", "one", "pass", "2", "Linear", "67", "95.7%"] in shown
    assert ["vmap(grad),", "slower", "1", "Net", "3", "4.3%"] in shown


def test_samples_apart_and_loops() -> None:
    class Looped(BlobClassifier):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(1, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.network(self.rnn(x[..., None])[1][0])

    check = AttributionCallback(method=METHOD).check(Looped(), train_dataloaders=loader_of(blobs(16)))
    assert {layer.name: layer.path for layer in check.layers}["rnn"] == LOOP
    assert "(rnn)" in str(check)
    batched = TensorDataset(torch.randn(6, 2, 4), torch.randint(3, (6, 2)))
    apart = AttributionCallback(method=METHOD).check(Summed(), train_dataloaders=loader_of(batched, batch_size=None))
    assert {layer.path for layer in apart.layers} == {ALONE}, apart


class Summed(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.layer(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_what_is_computed_when() -> None:
    data = loader_of(blobs(40))

    def check(callback: AttributionCallback, *others: L.Callback, **settings: Any) -> Any:
        trainer = quiet_trainer(callbacks=[callback, *others], **settings)
        return callback.check(BlobClassifier(), train_dataloaders=data, trainer=trainer)

    assert not check(AttributionCallback()).featurizes  # nothing reads features of small data while training
    assert check(AttributionCallback(), AttributionMonitor(figure=False)).featurizes
    assert check(AttributionCallback(), logger=True).featurizes
    later = check(AttributionCallback(method=METHOD, featurize=False))
    assert not later.featurizes
    assert later.seconds is not None
    without = check(AttributionCallback(method=Influence()))
    assert (without.seconds, without.feature_bytes) == (None, None)
    assert "runs the module in `trainer.attribute`" in str(without)


class Coupled(BlobClassifier):
    def attribution_step(self, batch: Any) -> tuple[Tensor, Tensor]:
        outputs, labels = super().attribution_step(batch)
        return outputs - outputs.mean(0), labels


class NoLength(Dataset[Any]):
    def __getitem__(self, i: int) -> Any:
        return torch.ones(4), 0


def sampled(data: Any) -> Any:
    return loader_of(data, sampler=SequentialSampler(range(16)))


class Failing(BlobClassifier):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("no such column")


@pytest.mark.parametrize(
    ("module", "settings", "data"),
    [
        (Coupled, {}, blobs(16)),
        (BlobClassifier, {"method": LESS()}, blobs(16)),
        (BlobClassifier, {"noise_mask": [True] * 3}, blobs(16)),
        (BlobClassifier, {}, NoLength()),
        (BlobClassifier, {}, TensorDataset(torch.full((8, 4), torch.nan), torch.zeros(8, dtype=torch.int64))),
        (Failing, {}, blobs(16)),
    ],
    ids=["coupled", "no moments", "mask", "no length", "nan", "user's error"],
)
def test_it_refuses_with_the_words_of_fit(tmp_path: Path, module: Any, settings: Any, data: Any) -> None:
    callback = AttributionCallback(tmp_path / "store", **settings)
    trainer = quiet_trainer(max_epochs=1, callbacks=[callback])
    check = callback.check(module(), train_dataloaders=sampled(data), trainer=trainer)
    with pytest.raises(Exception) as refused:  # noqa: PT011 - its text is compared
        trainer.fit(module(), sampled(data))
    assert str(refused.value) == str(check.error)
    assert type(refused.value) is type(check.error)
    assert not check.ok
    assert str(check).splitlines()[-1].startswith("would be refused: ")
    assert not (tmp_path / "store").exists()


def test_a_store_of_another_run_is_refused(tmp_path: Path) -> None:
    callback = AttributionCallback(tmp_path, METHOD)
    quiet_trainer(max_epochs=1, callbacks=[callback]).fit(BlobClassifier(), datamodule=Blobs())
    content = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    look = AttributionCallback(tmp_path, METHOD).check
    assert look(BlobClassifier(), Blobs()).ok  # this run again
    assert "holds another training run" in str(look(BlobClassifier(seed=1), Blobs()).refused)
    assert "41" in str(look(BlobClassifier(), Blobs(41)).refused)
    other = AttributionCallback(tmp_path, METHOD, feature_dtype="float32").check(BlobClassifier(), Blobs())
    assert "keeps features in float16" in str(other.refused)
    assert other.layers
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == content


def test_trainers_of_several_processes_and_strategies() -> None:
    callback = AttributionCallback(method=TRAK(16))
    several = quiet_trainer(devices=2, strategy="ddp_spawn", max_epochs=2, callbacks=[callback])
    check = callback.check(BlobClassifier(), Blobs(), trainer=several)
    assert check.ok, check.refused
    assert check.snapshots == 2
    sharded = quiet_trainer(devices=1)
    sharded.strategy.__class__ = type("Sharding", (FSDPStrategy,), {})
    assert "Sharding shards them" in str(callback.check(BlobClassifier(), Blobs(), trainer=sharded).refused)


def test_wrong_arguments() -> None:
    callback = AttributionCallback()
    with pytest.raises(TypeError, match=r"`datamodule` of AttributionCallback\.check to be a LightningDataModule"):
        callback.check(BlobClassifier(), loader_of(blobs(8)))
    with pytest.raises(TypeError, match=r"`trainer` of AttributionCallback\.check to be a Trainer"):
        callback.check(BlobClassifier(), Blobs(), trainer=callback)
    assert "training data" in str(callback.check(BlobClassifier()).refused)
    assert "LightningModule" in str(callback.check(nn.Linear(1, 1), Blobs()).refused)


def test_by_the_trainer() -> None:
    trainer = quiet_trainer(max_epochs=3, callbacks=[AttributionCallback(method=METHOD)])
    check = trainer.check(BlobClassifier(), Blobs())
    assert (check.ok, check.snapshots, check.model, check.method) == (True, 3, "BlobClassifier", "GradDot")
    with pytest.raises(ValueError, match="Expected an AttributionCallback among the Trainer's callbacks"):
        quiet_trainer().check(BlobClassifier(), Blobs())
