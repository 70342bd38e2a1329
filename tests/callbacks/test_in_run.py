"""In-run data value: against autograd in float64, beside an untouched training, resumed, in two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from cases import BlobClassifier, blobs, leave_group_at_exit, loader_of, quiet_trainer, told
from lightning_attr.callbacks import AttributionCallback, InRunDataValue
from lightning_attr.errors import AttributionError
from lightning_attr.methods import TRAK

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
N, M = 20, 7


class Plain(L.LightningModule):
    """No mixin: what is attributed is the loss of the training step. Two groups, a schedule, float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    @override
    def configure_optimizers(self) -> Any:
        groups = [{"params": self.net[0].parameters(), "lr": 0.3}, {"params": self.net[2].parameters(), "lr": 0.05}]
        optimizer = torch.optim.SGD(groups, momentum=0.9)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Marginal(BlobClassifier):
    """With the mixin: the output is a margin."""

    def __init__(self) -> None:
        super().__init__()
        self.double()


def doubled(data: TensorDataset) -> TensorDataset:
    return TensorDataset(data.tensors[0].double(), data.tensors[1])


TRAIN, VAL = doubled(blobs(N)), doubled(blobs(M, seed=1))


class Reference(L.Callback):
    """Gradients of one sample after the other, at each step looked at."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.values, self.counts = torch.zeros(N, dtype=torch.float64), torch.zeros(N, dtype=torch.int64)
        self.row = {x[0].item(): row for row, x in enumerate(TRAIN.tensors[0])}

    @override
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % self.every:
            return
        forward = pl_module.net if isinstance(pl_module, Plain) else pl_module
        params = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
        rates = [group["lr"] for group in trainer.optimizers[0].param_groups for _ in group["params"]]

        def gradients(x: Tensor, y: Tensor) -> list[Tensor]:
            return list(torch.autograd.grad(nn.functional.cross_entropy(forward(x), y), params))

        validation = gradients(*VAL.tensors)
        for x, y in zip(*batch, strict=True):
            row = self.row[x[0].item()]
            own = gradients(x[None], y[None])
            self.counts[row] += 1
            terms = zip(rates, validation, own, strict=True)
            self.values[row] += sum(float(rate * (v * g).sum()) for rate, v, g in terms)


def fit(
    folder: Path, model: L.LightningModule, every: int, *, more: Any = (), loader: Any = None, **settings: Any
) -> Any:
    recorder = AttributionCallback(folder / "store", TRAK(8), featurize=False)
    own = InRunDataValue(DataLoader(VAL, batch_size=3), every=every)
    reference = Reference(every)
    path = settings.pop("ckpt_path", None)
    trainer = quiet_trainer(**{"max_epochs": 3, **settings}, callbacks=[recorder, own, reference, *more])
    torch.manual_seed(7)
    trainer.fit(model, loader or loader_of(TRAIN, batch_size=6, shuffle=True), ckpt_path=path)
    return own, reference, trainer


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", [Plain, Marginal])
@pytest.mark.parametrize("every", [1, 3])
def test_values_are_those_of_autograd(tmp_path: Path, every: int, kind: Any, accumulate: int) -> None:
    own, reference, _ = fit(tmp_path, kind(), every, accumulate_grad_batches=accumulate)
    assert own.stopped is None
    torch.testing.assert_close(own.values, reference.values, rtol=1e-9, atol=1e-12)
    assert torch.equal(own.counts, reference.counts)
    assert own.counts.sum() > 0
    values, counts = InRunDataValue.load(tmp_path / "store")
    assert torch.equal(values, own.values)
    assert torch.equal(counts, own.counts)


def test_they_add_up_to_the_fall_of_the_validation_loss(tmp_path: Path) -> None:
    """A step of plain SGD on a batch, with a learning rate that is nothing."""

    class Slow(Plain):
        @override
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-6)

    model = Slow()
    before = nn.functional.cross_entropy(model.net(VAL.tensors[0]), VAL.tensors[1]).item()
    own, _, _ = fit(tmp_path, model, 1, max_epochs=1, loader=loader_of(TRAIN, batch_size=N))
    after = nn.functional.cross_entropy(model.net(VAL.tensors[0]), VAL.tensors[1]).item()
    assert own.values.sum().item() / N == pytest.approx(before - after, rel=1e-4)


def test_training_is_the_same_to_the_last_bit(tmp_path: Path) -> None:
    class Dropping(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.net.insert(2, nn.Dropout(0.3))

        @override
        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.05)

    def weights(callbacks: list[Any]) -> list[Tensor]:
        model = Dropping()
        trainer = quiet_trainer(max_epochs=2, callbacks=callbacks)
        torch.manual_seed(7)
        trainer.fit(model, loader_of(TRAIN, batch_size=6, shuffle=True))
        return [*model.parameters(), torch.get_rng_state()]

    own = InRunDataValue(DataLoader(VAL, batch_size=3, shuffle=True), every=2)
    with_it = weights([AttributionCallback(tmp_path, TRAK(8), featurize=False), own])
    assert own.counts.any()
    assert all(torch.equal(one, other) for one, other in zip(with_it, weights([]), strict=True))


def test_a_resumed_run_goes_on(tmp_path: Path) -> None:
    saved = ModelCheckpoint(tmp_path / "saved", save_top_k=-1)
    data = loader_of(TRAIN, batch_size=6)
    whole, _, _ = fit(tmp_path / "whole", Plain(), 2, loader=data)
    fit(tmp_path / "part", Plain(), 2, loader=data, max_epochs=2, more=[saved], enable_checkpointing=True)
    again, _, _ = fit(tmp_path / "part", Plain(), 2, loader=data, ckpt_path=saved.best_model_path)
    torch.testing.assert_close(again.values, whole.values, rtol=1e-12, atol=0)
    assert torch.equal(again.counts, whole.counts)


def test_logged(tmp_path: Path) -> None:
    fit(tmp_path, Plain(), 4, logger=CSVLogger(tmp_path, version=0), log_every_n_steps=1)
    text = next(tmp_path.rglob("metrics.csv")).read_text()
    assert "in_run/mean" in text
    assert "in_run/share_negative" in text


def test_no_recorder_before_it(tmp_path: Path) -> None:
    own = InRunDataValue(DataLoader(VAL))
    for callbacks in ([own], [own, AttributionCallback(tmp_path)]):
        trainer = quiet_trainer(max_epochs=1, callbacks=callbacks)
        with pytest.raises(ValueError, match=r"Expected an AttributionCallback before InRunDataValue"):
            trainer.fit(Plain(), loader_of(TRAIN))


def test_no_validation_data(tmp_path: Path) -> None:
    callbacks = [AttributionCallback(tmp_path, TRAK(8)), InRunDataValue()]
    with pytest.raises(ValueError, match=r"Expected targets of the kind 'val'"):
        quiet_trainer(max_epochs=1, callbacks=callbacks).fit(Plain(), loader_of(TRAIN))


def test_rows_that_are_not_known_end_it_and_not_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AttributionCallback, "batch_rows", None, raising=False)
    with told(r"InRunDataValue: It is not known which samples the batches of training hold.*goes on"):
        own, _, trainer = fit(tmp_path, Plain(), 1)
    assert own.stopped is not None
    assert trainer.global_step == 12


def test_a_rehearsal_passes(tmp_path: Path) -> None:
    own, _, _ = fit(tmp_path, Plain(), 1, fast_dev_run=True)
    assert own.stopped is None
    assert not own.counts.any()


def test_only_some_of_the_validation_samples(tmp_path: Path) -> None:
    recorder = AttributionCallback(tmp_path / "a", TRAK(8), featurize=False)
    part = InRunDataValue(DataLoader(VAL, batch_size=3), every=1, samples=4)
    trainer = quiet_trainer(max_epochs=1, callbacks=[recorder, part])
    trainer.fit(Plain(), loader_of(TRAIN, batch_size=6))
    recorder = AttributionCallback(tmp_path / "b", TRAK(8), featurize=False)
    whole = InRunDataValue(DataLoader(TensorDataset(*(t[:4] for t in VAL.tensors)), batch_size=9), every=1)
    trainer = quiet_trainer(max_epochs=1, callbacks=[recorder, whole])
    trainer.fit(Plain(), loader_of(TRAIN, batch_size=6))
    torch.testing.assert_close(part.values, whole.values, rtol=1e-10, atol=1e-14)


def test_what_is_refused_before_training(tmp_path: Path) -> None:
    class Noisy(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step((nn.functional.dropout(batch[0], training=self.training), batch[1]), 0)

    callbacks = [AttributionCallback(tmp_path, TRAK(8), featurize=False, mode="train"), InRunDataValue(DataLoader(VAL))]
    with pytest.raises(AttributionError, match=r"Noisy to have nothing random where InRunDataValue.*in train mode"):
        quiet_trainer(max_epochs=1, callbacks=callbacks).fit(Noisy(), loader_of(TRAIN))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"every": 0}, r"argument `every` of InRunDataValue"),
        ({"samples": 0}, r"argument `samples` of InRunDataValue"),
    ],
)
def test_bad_arguments(arguments: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        InRunDataValue(**arguments)


def run_two(folder: Path) -> None:
    """In each of two processes: the values, and those of the samples that it drew itself."""
    own, reference, trainer = fit(folder, Plain(), 2, strategy="ddp", devices=2, use_distributed_sampler=True)
    found = {"values": own.values, "counts": own.counts}
    saved = {**found, "own": reference.values, "own_counts": reference.counts}
    torch.save(saved, folder / f"process-{trainer.global_rank}.pt")


@pytest.mark.slow
def test_two_processes_add_up(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / f"process-{rank}.pt") for rank in range(2))
    assert torch.equal(one["values"], two["values"])
    torch.testing.assert_close(one["values"], one["own"] + two["own"], rtol=1e-9, atol=1e-12)
    assert torch.equal(one["counts"], one["own_counts"] + two["own_counts"])


if __name__ == "__main__":
    leave_group_at_exit()
    torch.set_num_threads(1)
    run_two(Path(sys.argv[1]))
