"""The journal of a run equals what a data set that returns its own index shows, for loaders of every form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_attr import AttributionMixin
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.journal import Journal

ROWS = 10


class OwnIndex(Dataset[Any]):
    """Returns the row of each sample beside it."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return torch.tensor(row), torch.tensor([row / ROWS, 1.0])


class Recorder(AttributionMixin, L.LightningModule):
    """Remembers which rows it was trained on."""

    def __init__(self, optimizers: int = 0, skipped: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)
        self.seen: list[list[int]] = []
        self.skipped = skipped
        self.by_itself = optimizers
        self.automatic_optimization = not optimizers

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        loss = self.loss(batch)
        if not self.by_itself:
            return None if batch_idx in self.skipped else loss
        for optimizer in self.optimizers() if self.by_itself > 1 else [self.optimizers()]:
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
        return None

    def attribution_step(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self.layer(batch[1]), batch[0] % 2

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(*self.attribution_step(batch))

    def configure_optimizers(self) -> Any:
        made = [torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=0.01) for _ in range(max(1, self.by_itself))]
        return made if self.by_itself > 1 else made[0]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


class Watcher(Callback):
    """Keeps the rows of each batch whose step training has taken, as the batch itself says them."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(batch[0].tolist())


def fitted(
    path: Path,
    loader: Any,
    module: Recorder | None = None,
    ckpt_path: str | None = None,
    val: Any = None,
    **settings: Any,
) -> tuple[Journal, list[list[int]], L.Trainer]:
    """Train with a journal, and beside it what the batches themselves say."""
    watcher = Watcher()
    callbacks = [AttributionCallback(path), watcher, *settings.pop("callbacks", [])]
    defaults: dict[str, Any] = {"max_epochs": 3, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    trainer = L.Trainer(
        callbacks=callbacks, enable_progress_bar=False, enable_model_summary=False, **{**defaults, **settings}
    )
    trainer.fit(module or Recorder(), loader, val, ckpt_path=ckpt_path)
    journal = callbacks[0].store.journal()
    assert journal is not None
    return journal, watcher.seen, trainer


def told(journal: Journal) -> list[list[int]]:
    """Rows of the batches, each once, in the order of training."""
    return [rows.tolist() for step in journal.steps() for rows in step.rows]


class OwnSampler:
    """Draws when it is asked for an iterator, and uses one list again and again."""

    def __iter__(self) -> Iterator[list[int]]:
        order, batch = torch.randperm(ROWS).tolist(), []

        def batches() -> Iterator[list[int]]:
            for start in (0, 4, 8):
                batch[:] = order[start : start + 4]
                yield batch

        return batches()

    def __len__(self) -> int:
        return 3


def _shuffled(**settings: Any) -> DataLoader[Any]:
    return DataLoader(OwnIndex(), batch_size=4, shuffle=True, **settings)


LOADERS: dict[str, Callable[[], Any]] = {
    "sequential": lambda: DataLoader(OwnIndex(), batch_size=4),
    "shuffled": _shuffled,
    "drop_last": lambda: _shuffled(drop_last=True),
    "with replacement": lambda: DataLoader(
        OwnIndex(), batch_size=4, sampler=RandomSampler(OwnIndex(), replacement=True, num_samples=20)
    ),
    "weighted": lambda: DataLoader(OwnIndex(), batch_size=4, sampler=WeightedRandomSampler([1.0] * 3 + [0.0] * 7, 9)),
    "subset": lambda: DataLoader(OwnIndex(), batch_size=2, sampler=SubsetRandomSampler([1, 4, 7])),
    "batch sampler": lambda: DataLoader(
        OwnIndex(), batch_sampler=BatchSampler(SequentialSampler(range(ROWS)), 3, drop_last=True)
    ),
    "a batch sampler of its own": lambda: DataLoader(OwnIndex(), batch_sampler=OwnSampler()),
    "in a dict": lambda: CombinedLoader([_shuffled()], "max_size_cycle").iterables[0],
}


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_rows_are_those_of_the_batches(make: Callable[[], Any], tmp_path: Path) -> None:
    journal, seen, trainer = fitted(tmp_path / "store", make())
    assert journal.unknown is None
    assert told(journal) == seen
    assert journal.gap(trainer.global_step) is None
    counts = torch.bincount(torch.tensor([row for rows in seen for row in rows]), minlength=ROWS)
    assert torch.equal(journal.exposure(ROWS), counts)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"persistent_workers": True}, {"prefetch_factor": 5}], ids=str)
def test_workers_draw_ahead(settings: dict[str, Any], tmp_path: Path) -> None:
    journal, seen, _ = fitted(tmp_path / "store", _shuffled(num_workers=2, **settings))
    assert told(journal) == seen


TRAINERS: dict[str, dict[str, Any]] = {
    "limit_train_batches": {"limit_train_batches": 2},
    "overfit_batches": {"overfit_batches": 2},
    "reloaded": {"reload_dataloaders_every_n_epochs": 1},
    "validation between": {"val_check_interval": 1, "num_sanity_val_steps": 1},
    "clipped": {"gradient_clip_val": 1e-3},
}


@pytest.mark.filterwarnings("ignore:You requested to overfit")
@pytest.mark.parametrize("settings", TRAINERS.values(), ids=TRAINERS)
def test_the_trainer_leaves_the_journal_right(settings: dict[str, Any], tmp_path: Path) -> None:
    journal, seen, _ = fitted(tmp_path / "store", _shuffled(), val=_shuffled(), **settings)
    assert journal.unknown is None
    assert told(journal) == seen


def test_accumulated_batches_are_of_one_step(tmp_path: Path) -> None:
    scheduled = GradientAccumulationScheduler({0: 1, 1: 2})
    journal, seen, _ = fitted(tmp_path / "store", _shuffled(), callbacks=[scheduled])
    assert told(journal) == seen
    assert [len(step.batches) for step in journal.steps()] == [1, 1, 1, 2, 1, 2, 1]


def test_one_validation_loader_for_both_is_told_apart(tmp_path: Path) -> None:
    loader = _shuffled()
    journal, seen, _ = fitted(tmp_path / "store", loader, val=loader)
    assert told(journal) == seen


@pytest.mark.parametrize("optimizers", [1, 2])
def test_manual_optimization(optimizers: int, tmp_path: Path) -> None:
    journal, seen, trainer = fitted(tmp_path / "store", _shuffled(), Recorder(optimizers))
    steps = list(journal.steps())
    assert [step.optimizer for step in steps] == [number % optimizers for number in range(trainer.global_step)]
    assert [step.rows[0].tolist() for step in steps if step.optimizer == 0] == seen
    assert all(len(step.rows) == 1 for step in steps)
    assert journal.exposure(ROWS).tolist() == [3] * ROWS


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_batches_without_a_gradient_do_not_count(tmp_path: Path) -> None:
    journal, seen, _ = fitted(tmp_path / "store", _shuffled(), Recorder(skipped=(1,)))
    assert told(journal) == [rows for number, rows in enumerate(seen) if number % 3 != 1]
    assert [len(step.batches) for step in journal.steps()] == [1, 0, 1] * 3


def test_settings_of_steps(tmp_path: Path) -> None:
    journal, _, _ = fitted(tmp_path / "store", _shuffled(), gradient_clip_val=1e-3)
    step = next(journal.steps())
    assert (step.groups[0].lr, step.groups[0].weight_decay, step.loss_scale) == (0.1, 0.01, 1.0)
    assert step.clip_factor is not None
    assert 0 < step.clip_factor < 1
    group = journal.settings["optimizers"][0]["groups"][0]
    assert group["parameters"] == ["layer.weight", "layer.bias"]
    assert group["settings"]["momentum"] == 0


class _Stop(Callback):
    """Ends a run in the middle of an epoch, as a crash would."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 5:
            raise KeyboardInterrupt


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_resumed_run_drops_what_lies_beyond_its_checkpoint(tmp_path: Path) -> None:
    kept = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_epochs=1)
    with pytest.raises(SystemExit):
        fitted(tmp_path / "store", _shuffled(), callbacks=[kept, _Stop()], enable_checkpointing=True)
    saved = next(tmp_path.glob("*.ckpt"))
    before = Journal.open(tmp_path / "store", _id(tmp_path / "store"))
    assert before is not None
    first = told(before)
    assert len(first) == 5
    journal, seen, trainer = fitted(
        tmp_path / "store", _shuffled(), ckpt_path=str(saved), callbacks=[kept], enable_checkpointing=True
    )
    assert told(journal) == [*first[:3], *seen]
    assert journal.gap(trainer.global_step) is None
    assert journal.exposure(ROWS).tolist() == [3] * ROWS


def _id(path: Path) -> str:
    from lightning_attr.store import FeatureStore

    return FeatureStore.open(path).manifest.id


def test_the_loader_stays_the_users(tmp_path: Path) -> None:
    loader = _shuffled()
    before = dict(vars(loader))
    _, _, trainer = fitted(tmp_path / "store", loader)
    assert vars(loader) == before
    assert "process_dataloader" not in vars(trainer.strategy)


class _Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return (OwnIndex()[row] for row in range(ROWS))


class _OwnBatches(DataLoader[Any]):
    def __iter__(self) -> Any:
        return iter(list(super().__iter__())[::-1])


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: DataLoader(_Stream(), batch_size=4), "_Stream is an IterableDataset, whose samples have no index"),
        (lambda: _OwnBatches(OwnIndex(), batch_size=4), "_OwnBatches makes its batches in an `__iter__` of its own"),
    ],
)
def test_an_order_that_nobody_can_know_says_why(make: Callable[[], Any], why: str, tmp_path: Path) -> None:
    journal, seen, _ = fitted(tmp_path / "store", make())
    assert journal.unknown == why
    assert all(len(rows) == 0 for rows in told(journal))
    assert len(list(journal.steps())) == len(seen)


class _Swaps(Callback):
    """Changes batches before they are trained on."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        batch[1].zero_()


def test_a_batch_of_other_samples_is_found(tmp_path: Path) -> None:
    callbacks = [_Swaps(), AttributionCallback(tmp_path / "store")]
    trainer = L.Trainer(
        max_epochs=1, callbacks=callbacks, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(Recorder(), _shuffled())
    journal = callbacks[1].store.journal()
    assert journal.unknown.startswith("batch 1 does not hold the samples that its sampler drew")
