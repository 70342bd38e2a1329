"""Data curation: what is drawn before and after it acts, resumed runs, two processes, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset
from typing_extensions import override

from cases import BlobClassifier, blobs, leave_group_at_exit, loader_of, quiet_trainer, told
from lightning_attr.callbacks import AttributionCallback, DataCuration
from lightning_attr.errors import AttributionError
from lightning_attr.methods import TRAK

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
N = 40


def noisy() -> tuple[TensorDataset, Tensor]:
    """Blobs with every tenth label wrong."""
    x, y = blobs(N).tensors
    wrong = torch.arange(N) % 10 == 3
    return TensorDataset(x, torch.where(wrong, (y + 1) % 3, y)), wrong


class Drawn(L.Callback):
    """Rows that each epoch of training draws."""

    def __init__(self, data: TensorDataset) -> None:
        self.row = {x[0].item(): row for row, x in enumerate(data.tensors[0])}
        self.epochs: dict[int, list[int]] = {}

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.epochs.setdefault(trainer.current_epoch, []).extend(self.row[x[0].item()] for x in batch[0])


def fit(
    folder: Path, curation: DataCuration | None, order: int = 1, loader: Any = None, **settings: Any
) -> tuple[Drawn, Any, Any]:
    data, wrong = noisy()
    drawn = Drawn(data)
    recorder = AttributionCallback(folder / "store", TRAK(16), "all", noise_mask=wrong)
    ours = [recorder] if curation is None else [recorder, curation][::order]
    L.seed_everything(1, verbose=False)
    path, callbacks = settings.pop("ckpt_path", None), [*ours, drawn, *settings.pop("more", [])]
    trainer, model = (
        quiet_trainer(**{"max_epochs": 4, "logger": False, **settings, "callbacks": callbacks}),
        BlobClassifier(),
    )
    trainer.fit(model, loader or loader_of(data, shuffle=True), ckpt_path=path)
    return drawn, trainer, model


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("by", ["self_influence", "loss"])
def test_suspicious_rows_are_drawn_no_more(tmp_path: Path, by: str, order: int) -> None:
    curation = DataCuration(epoch=2, fraction=0.1, by=by)
    loader = loader_of(noisy()[0], shuffle=True)
    sampler = loader.batch_sampler.sampler
    drawn, trainer, _ = fit(tmp_path, curation, order, loader, logger=CSVLogger(tmp_path, version=0))
    assert [sorted(drawn.epochs[epoch]) for epoch in (0, 1)] == [list(range(N))] * 2
    assert [len(rows) for rows in drawn.epochs.values()] == [N] * 4
    assert curation.history.keys() == {2, 3}
    store = trainer.callbacks[0 if order == 1 else 1].store
    for epoch, rows in curation.history.items():
        assert not {*rows.tolist()} & {*drawn.epochs[epoch]}
        if by == "loss":
            key = store.snapshots[epoch - 1].key
            assert torch.equal(rows, store.column(key, "loss").topk(4).indices.sort().values)
    assert torch.equal(curation.left_out, curation.history[3])
    figures = pd.read_csv(next(tmp_path.rglob("metrics.csv")))
    assert figures["curation/left_out"].dropna().tolist() == [4, 4]
    share = noisy()[1][curation.left_out].double().mean()
    assert figures["curation/noise_share"].dropna().iloc[-1] == pytest.approx(float(share))
    assert loader.batch_sampler.sampler is sampler
    result = trainer.attribute(train_dataloaders=loader, target_dataloaders=loader_of(blobs(5, seed=1)))
    assert result.trained_on is None


def test_until_it_acts_training_is_the_same_to_the_last_bit(tmp_path: Path) -> None:
    with_it, _, model = fit(tmp_path / "a", DataCuration(epoch=3), max_epochs=4)
    without, _, _ = fit(tmp_path / "b", None)
    assert [with_it.epochs[epoch] for epoch in range(3)] == [without.epochs[epoch] for epoch in range(3)]
    assert with_it.epochs[3] != without.epochs[3]
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_weight_draws_them_less_often(tmp_path: Path) -> None:
    curation = DataCuration(epoch=1, fraction=0.25, by="loss", weight=0.5)
    drawn, _, _ = fit(tmp_path, curation, max_epochs=12)
    drawn_all_the_same = [
        row in drawn.epochs[epoch] for epoch, rows in curation.history.items() for row in rows.tolist()
    ]
    assert 0.3 < sum(drawn_all_the_same) / len(drawn_all_the_same) < 0.7


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_goes_on_without_them(tmp_path: Path, workers: int) -> None:
    data = noisy()[0]
    saved = ModelCheckpoint(tmp_path / "saved", save_top_k=-1)
    curation = DataCuration(epoch=1)
    fit(tmp_path, curation, max_epochs=3, more=[saved], enable_checkpointing=True)
    again = DataCuration(epoch=1)
    loader = loader_of(data, shuffle=True, num_workers=workers)
    drawn, _, _ = fit(tmp_path, again, loader=loader, max_epochs=5, ckpt_path=saved.best_model_path)
    assert [*drawn.epochs] == [3, 4]
    assert again.history.keys() == {1, 2, 3, 4}
    assert all(torch.equal(again.history[epoch], rows) for epoch, rows in curation.history.items())
    for epoch in (3, 4):
        assert len(again.history[epoch]) == 4
        assert not {*again.history[epoch].tolist()} & {*drawn.epochs[epoch]}


def test_a_loader_made_anew_each_epoch(tmp_path: Path) -> None:
    class Data(L.LightningDataModule):
        def train_dataloader(self) -> Any:
            return loader_of(noisy()[0], shuffle=True)

    curation = DataCuration(epoch=1)
    drawn, _, _ = fit(tmp_path, curation, loader=Data(), reload_dataloaders_every_n_epochs=1)
    for epoch, rows in curation.history.items():
        assert not {*rows.tolist()} & {*drawn.epochs[epoch]}


def test_a_failure_ends_the_curation_and_not_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: DataCuration, trainer: L.Trainer) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(DataCuration, "_draw_through", fails)
    curation = DataCuration(epoch=1)
    with told("DataCuration: RuntimeError: out of luck. Training goes on, with all samples"):
        drawn, _, _ = fit(tmp_path, curation)
    assert [sorted(rows) for rows in drawn.epochs.values()] == [list(range(N))] * 4
    assert curation.stopped == "RuntimeError: out of luck."


def test_a_rehearsal_passes(tmp_path: Path) -> None:
    curation = DataCuration(epoch=3)
    fit(tmp_path, curation, fast_dev_run=True)
    assert (curation.stopped, curation.history) == (None, {})


def test_what_is_no_row_ends_the_curation(tmp_path: Path) -> None:
    class ByName(TensorDataset):
        def __getitem__(self, index: Any) -> Any:
            return super().__getitem__(int(str(index).removeprefix("row ")))

    class Names(SequentialSampler):
        def __iter__(self) -> Any:
            return (f"row {i}" for i in range(N))

    data = ByName(*noisy()[0].tensors)
    with told("The sampler draws 'row 0', which is no row of the data set"):
        fit(tmp_path, DataCuration(epoch=1), loader=loader_of(data, sampler=Names(data)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epoch": 0}, "Expected argument `epoch` of DataCuration to be an integer >= 1, but got 0"),
        ({"epoch": 1, "fraction": 1.0}, r"`fraction` of DataCuration to be a number in \(0, 1\), but got 1.0"),
        ({"epoch": 1, "by": "los"}, "'self_influence' or 'loss', but got 'los'. Did you mean 'loss'"),
        ({"epoch": 1, "weight": 1.0}, r"`weight` of DataCuration to be a number in \[0, 1\), but got 1.0"),
    ],
)
def test_argument_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataCuration(**arguments)


def test_errors_before_training(tmp_path: Path) -> None:
    data = noisy()[0]
    for recorders, found in (([], "none"), ([AttributionCallback(featurize=False)], "one with featurize=False")):
        trainer = quiet_trainer(callbacks=[*recorders, DataCuration(epoch=1)], logger=False)
        with pytest.raises(ValueError, match=f"because DataCuration acts on what it computes, but found {found}"):
            trainer.fit(BlobClassifier(), loader_of(data))
    with pytest.raises(ValueError, match="to be below 4, the epochs of this run, but got 4: it would never act"):
        fit(tmp_path, DataCuration(epoch=4))
    late = AttributionCallback(tmp_path / "late", TRAK(16), [3])
    trainer = quiet_trainer(callbacks=[late, DataCuration(epoch=2)], max_epochs=5, logger=False)
    with pytest.raises(ValueError, match="Expected a snapshot before epoch 2, from which on DataCuration acts"):
        trainer.fit(BlobClassifier(), loader_of(data))

    class Halves(BatchSampler):
        def __iter__(self) -> Any:
            return iter([list(range(N // 2)), list(range(N // 2, N))])

        def __len__(self) -> int:
            return 2

    with pytest.raises(AttributionError, match=r"but its batch sampler Halves makes batches in a way of its own\. Do "):
        fit(tmp_path / "x", DataCuration(1), loader=DataLoader(data, batch_sampler=Halves(range(N), 8, False)))


def run_two(folder: Path) -> None:
    """In each of two processes: what it drew, and what was left out."""
    curation = DataCuration(epoch=1)
    drawn, trainer, _ = fit(folder, curation, strategy="ddp", devices=2)
    rows = {"drawn": drawn.epochs, "history": curation.history}
    torch.save(rows, folder / f"process-{trainer.global_rank}.pt")


@pytest.mark.slow
def test_two_processes_leave_out_the_same_rows(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / f"process-{rank}.pt") for rank in range(2))
    assert one["history"].keys() == {1, 2, 3}
    for epoch, rows in one["history"].items():
        assert torch.equal(rows, two["history"][epoch])
        assert len(one["drawn"][epoch]) == len(two["drawn"][epoch]) == N // 2
        assert not {*rows.tolist()} & {*one["drawn"][epoch], *two["drawn"][epoch]}


if __name__ == "__main__":
    leave_group_at_exit()
    torch.set_num_threads(1)
    run_two(Path(sys.argv[1]))
