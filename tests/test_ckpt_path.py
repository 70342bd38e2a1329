"""Checkpoints of runs that never saw the callback: each a snapshot, with what Lightning wrote into it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_attr import AttributionMixin, AttributionResult, AttributionTrainer, FeatureStore
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.errors import AttributionError, CorruptedStoreError, StoreMismatchError
from lightning_attr.methods import LESS, TRAK, GradDot, TracIn
from lightning_attr.projectors import KroneckerProjector

N = 24
PLAIN = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


class Net(AttributionMixin, L.LightningModule):
    def __init__(self, width: int = 6, adam: bool = False) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, width), nn.Linear(width, 3)
        self.adam = adam

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).relu())

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        if self.adam:
            return torch.optim.AdamW(self.parameters(), lr=0.01)
        groups = [{"params": self.body.parameters(), "lr": 0.1}, {"params": self.head.parameters(), "lr": 0.3}]
        optimizer = torch.optim.SGD(groups)
        return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=3)]


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(N, 4, generator=generator), torch.arange(N) % 3), batch_size=8)


def trained(folder: Path, *callbacks: L.Callback, adam: bool = False, **arguments: Any) -> AttributionTrainer:
    """A run that keeps a checkpoint of every epoch."""
    L.seed_everything(0, verbose=False)
    kept = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_last=True, **arguments)
    trainer = AttributionTrainer(max_epochs=3, callbacks=[*callbacks, kept], **PLAIN)
    trainer.fit(Net(adam=adam), loader())
    return trainer


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("epoch*.ckpt"))


def attribute(trainer: AttributionTrainer, **arguments: Any) -> AttributionResult:
    return trainer.attribute(train_dataloaders=loader(), targets="train", **arguments)


@pytest.mark.parametrize("method", [TRAK(projector=KroneckerProjector(16)), TRAK(exact=True), GradDot(exact=True)])
def test_checkpoints_give_what_the_callback_gives(tmp_path: Path, method: Any) -> None:
    callback = AttributionCallback(tmp_path / "store", method=method, snapshots="all", feature_dtype="float32")
    trainer = trained(tmp_path / "ckpt", callback)
    expected = trainer.attribute(targets="train")
    assert [snapshot.epoch for snapshot in FeatureStore.open(tmp_path / "store").snapshots] == [0, 1, 2]
    L.seed_everything(5, verbose=False)
    module = Net()
    before = [p.clone() for p in module.parameters()]
    found = attribute(AttributionTrainer(**PLAIN), model=module, ckpt_path=files(tmp_path / "ckpt"), method=method)
    assert torch.allclose(found.scores.values, expected.scores.values, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(p, own) for p, own in zip(module.parameters(), before, strict=True))
    assert found.scores.provenance["snapshots"] == expected.scores.provenance["snapshots"]


def test_learning_rates_are_those_of_the_groups(tmp_path: Path) -> None:
    trained(tmp_path)
    attribute(
        AttributionTrainer(**PLAIN),
        model=Net(),
        ckpt_path=files(tmp_path),
        store=tmp_path / "store",
        method=TracIn(exact=True),
    )
    first, second, _ = FeatureStore.open(tmp_path / "store").snapshots
    # The schedule is 1, 0.7, 0.4, 0.1; three steps per epoch; the checkpoint is written after the scheduler's step.
    assert first.rates is not None
    assert second.rates is not None
    assert first.rates["body.weight"] == pytest.approx(3 * 0.1 * (1 + 0.7) / 2)
    assert first.rates["head.bias"] == pytest.approx(3 * 0.3 * (1 + 0.7) / 2)
    assert second.rates["head.bias"] == pytest.approx(3 * 0.3 * (0.7 + 0.4) / 2)


def test_moments_come_from_the_checkpoint(tmp_path: Path) -> None:
    trained(tmp_path, adam=True)
    path = files(tmp_path)[1]
    attribute(AttributionTrainer(**PLAIN), model=Net(adam=True), ckpt_path=path, store=tmp_path / "s", method=LESS())
    store = FeatureStore.open(tmp_path / "s")
    moments = store.optimizer_state(store.snapshots[0].key).moments["body.weight"]
    state = torch.load(path, weights_only=True)["optimizer_states"][0]["state"][0]
    assert torch.equal(moments.exp_avg_sq, state["exp_avg_sq"])
    assert moments.step == 6


@pytest.mark.parametrize("named", ["best", "last"])
def test_best_and_last_are_those_of_the_trainer(tmp_path: Path, named: str) -> None:
    trainer = trained(tmp_path)
    own = trainer.checkpoint_callback
    assert isinstance(own, ModelCheckpoint)
    path = own.best_model_path if named == "best" else own.last_model_path
    method = GradDot(exact=True)
    found = attribute(trainer, ckpt_path=named, method=method)
    expected = attribute(AttributionTrainer(**PLAIN), model=Net(), ckpt_path=path, method=method)
    assert torch.equal(found.scores.values, expected.scores.values)
    by_url = attribute(AttributionTrainer(**PLAIN), model=Net(), ckpt_path=f"file://{path}", method=method)
    assert torch.equal(by_url.scores.values, expected.scores.values)


def test_a_store_of_checkpoints_goes_on(tmp_path: Path) -> None:
    trained(tmp_path)
    own = {"model": Net(), "store": tmp_path / "store", "method": TRAK(projector=KroneckerProjector(8))}
    first = attribute(AttributionTrainer(**PLAIN), ckpt_path=files(tmp_path)[:2], **own)
    again = attribute(AttributionTrainer(**PLAIN), ckpt_path=files(tmp_path)[1::-1], **own)
    assert torch.equal(first.scores.values, again.scores.values)
    more = attribute(AttributionTrainer(**PLAIN), ckpt_path=files(tmp_path), **own)
    assert len(more.scores.provenance["snapshots"]) == 3
    with pytest.raises(StoreMismatchError, match="holds other snapshots than these checkpoints"):
        attribute(AttributionTrainer(**PLAIN), ckpt_path=files(tmp_path)[:1], **own)


def test_weights_alone_serve_what_needs_no_rates(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained(tmp_path, save_weights_only=True)
    path = files(tmp_path)[0]
    attribute(AttributionTrainer(**PLAIN), model=Net(), ckpt_path=path, method=TRAK(exact=True))
    assert "has no optimizer states" in caplog.text
    with pytest.raises(AttributionError, match="learning rate"):
        attribute(AttributionTrainer(**PLAIN), model=Net(), ckpt_path=path, method=TracIn(exact=True))


class Odd:
    pass


def _changed(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    parts = torch.load(path, weights_only=True)
    changed = change(parts)
    torch.save(parts if changed is None else changed, path)
    return path


def _flipped(path: Path) -> Path:
    content = bytearray(path.read_bytes())
    path.write_bytes(content[: len(content) // 2])
    return path


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda path: [], ValueError, "`ckpt_path` of attribute to be .*at least one"),
        (lambda path: 3, TypeError, "`ckpt_path` of attribute"),
        (lambda path: "", ValueError, "`ckpt_path` of attribute"),
        (lambda path: "best", AttributionError, 'ckpt_path="best" asks the ModelCheckpoint of this trainer'),
        (lambda path: path.with_name("nowhere.ckpt"), FileNotFoundError, "There is no checkpoint .*nowhere.ckpt"),
        (lambda path: path.parent, AttributionError, "is a directory: a sharded strategy"),
        (_flipped, CorruptedStoreError, "epoch=0.ckpt is damaged"),
        (lambda path: [path, path], StoreMismatchError, "are of the same step"),
        (lambda path: _changed(path, lambda parts: parts["state_dict"]), AttributionError, "lacks state_dict, epoch"),
        (lambda path: _changed(path, lambda own: own.update(odd=Odd())), AttributionError, "objects that are not read"),
        (
            lambda path: _changed(path, lambda parts: parts["state_dict"].pop("head.bias") is None or None),
            StoreMismatchError,
            "epoch=0.ckpt is a checkpoint of another module than Net: .*head.bias",
        ),
        (
            lambda path: _changed(path, lambda parts: parts["optimizer_states"].append({}) or None),
            StoreMismatchError,
            "has the states of 2 optimizers, but `configure_optimizers` of Net gives 1",
        ),
    ],
)
def test_what_is_wrong_with_a_checkpoint_is_said(
    tmp_path: Path, make: Callable[[Path], Any], error: type[Exception], message: str
) -> None:
    trained(tmp_path)
    wrong = make(files(tmp_path)[0])
    plain = AttributionTrainer(**PLAIN, enable_checkpointing=False)
    with pytest.raises(error, match=message):
        attribute(plain, model=Net(), ckpt_path=wrong, method=GradDot(exact=True))
