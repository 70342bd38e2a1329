"""Journals on disk: damaged, exchanged, of another run; written by two processes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import lightning as L
import process_cases
import pytest
import torch
from torch.utils.data import DataLoader

from cases import BlobClassifier, blobs, leave_group_at_exit, quiet_trainer
from lightning_attr import FeatureStore
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.errors import AttributionError, CorruptedStoreError
from lightning_attr.journal import Journal
from lightning_attr.journal.folder import JournalRecord
from lightning_attr.journal.steps import GroupStep
from lightning_attr.journal.writer import JournalWriter

ROWS = 12
STORE = "ab" * 16


def written(path: Path, store: str = STORE, rank: int = 0, chunks: int = 3) -> Path:
    """A journal of some chunks, each of two steps."""
    path.mkdir(exist_ok=True)
    writer = JournalWriter(path, JournalRecord(store, rank, ROWS), 0, 1)
    for step in range(2 * chunks):
        writer.batch([step, step + 1], epoch=0, batch_idx=step)
        writer.step(step, 0, 0, [GroupStep(0.1, 0.0)])
        if step % 2:
            writer.flush(close=True)
    return path / "journal" / f"rank-{rank:05d}"


def read(path: Path) -> None:
    journal = Journal.open(path, STORE)
    assert journal is not None
    list(journal.steps())
    journal.exposure(ROWS)


def test_it_is_as_written(tmp_path: Path) -> None:
    written(tmp_path)
    journal = Journal.open(tmp_path, STORE)
    assert journal is not None
    assert [step.rows[0].tolist() for step in journal.steps()] == [[step, step + 1] for step in range(6)]
    assert [step.global_step for step in journal.steps(2, 4)] == [2, 3]
    assert journal.complete
    assert journal.gap(7) == "the steps from 6 on are missing"


@pytest.mark.parametrize("place", [0.1, 0.5, 0.97])
@pytest.mark.parametrize("number", range(3))
def test_no_changed_byte_passes(number: int, place: float, tmp_path: Path) -> None:
    file = written(tmp_path) / f"{number:08d}.safetensors"
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 0x10
    file.write_bytes(content)
    with pytest.raises(CorruptedStoreError, match=r"Delete .*journal to go on without the journal"):
        read(tmp_path)


def _cut(folder: Path) -> None:
    file = folder / "00000001.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


def _exchange(folder: Path) -> None:
    first, second = folder / "00000000.safetensors", folder / "00000001.safetensors"
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def _of_another_run(folder: Path) -> None:
    other = written(folder.parents[2] / "other", store="cd" * 16)
    shutil.copy(other / "00000001.safetensors", folder / "00000001.safetensors")


def _edited(folder: Path) -> None:
    (record,) = folder.glob("*.json")
    text = json.loads(record.read_text("utf-8"))
    text["length"] = 5
    record.write_text(json.dumps(text), "utf-8")


def _led_outside(folder: Path) -> None:
    file = folder / "00000001.safetensors"
    file.rename(folder.parents[2] / "elsewhere")
    file.symlink_to(folder.parents[2] / "elsewhere")


@pytest.mark.parametrize("damage", [_cut, _exchange, _of_another_run, _edited, _led_outside], ids=lambda f: f.__name__)
def test_damages_are_named(damage: Callable[[Path], None], tmp_path: Path) -> None:
    damage(written(tmp_path / "store"))
    with pytest.raises(AttributionError, match="journal"):
        read(tmp_path / "store")


def test_a_missing_chunk_is_a_gap(tmp_path: Path) -> None:
    (written(tmp_path) / "00000001.safetensors").unlink()
    journal = Journal.open(tmp_path, STORE)
    assert journal is not None
    assert journal.gap(6) == "the steps from 2 on are missing"


def test_a_journal_of_another_store_is_refused(tmp_path: Path) -> None:
    written(tmp_path)
    with pytest.raises(CorruptedStoreError, match="is not the journal that belongs here"):
        Journal.open(tmp_path, "cd" * 16)


def test_steps_beyond_a_checkpoint_are_dropped(tmp_path: Path) -> None:
    written(tmp_path)
    writer = JournalWriter(tmp_path, JournalRecord(STORE, 0, ROWS), 3, 1)
    writer.batch([9], epoch=0, batch_idx=3)
    writer.step(3, 0, 0, [GroupStep(0.2, 0.0)])
    writer.flush()
    journal = Journal.open(tmp_path, STORE)
    assert journal is not None
    assert [step.rows[0].tolist() for step in journal.steps()] == [[0, 1], [1, 2], [2, 3], [9]]
    assert journal.complete


class Seen(L.Callback):
    """Counts, in each process, the samples that training steps saw."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.row = {tuple(x.tolist()): row for row, x in enumerate(blobs(ROWS - 1).tensors[0])}
        self.steps: list[list[int]] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: object, outputs: object, batch: object, idx: int) -> None:
        self.steps.append([self.row[tuple(x.tolist())] for x in batch[0]])  # type: ignore[index]

    def on_train_end(self, trainer: L.Trainer, module: object) -> None:
        (self.path / f"seen-{trainer.global_rank}.json").write_text(json.dumps(self.steps), "utf-8")


def trained_together(rank: int, count: int, group: dict[str, str], path: Path) -> None:
    """One process of two, whose sampler pads eleven rows to twelve."""
    process_cases.connect(rank, count, group)
    leave_group_at_exit()
    torch.manual_seed(0)
    callbacks = [AttributionCallback(path / "store", featurize=False), Seen(path)]
    trainer = quiet_trainer(max_epochs=2, callbacks=callbacks, devices=count, strategy="ddp")
    trainer.fit(BlobClassifier(), DataLoader(blobs(ROWS - 1), 2, shuffle=True))


@pytest.mark.slow
def test_two_processes_write_one_journal(tmp_path: Path) -> None:
    assert process_cases.run(2, trained_together, tmp_path) == [0, 0]
    journal = FeatureStore.open(tmp_path / "store").journal()
    assert journal is not None
    assert journal.unknown is None
    assert journal.complete
    seen = [json.loads((tmp_path / f"seen-{rank}.json").read_text("utf-8")) for rank in range(2)]
    assert [[rows.tolist() for rows in step.rows] for step in journal.steps()] == [
        list(pair) for pair in zip(*seen, strict=True)
    ]
    assert all(step.ranks == (0, 1) for step in journal.steps())
    rows = torch.tensor([row for steps in seen for step in steps for row in step])
    assert torch.equal(journal.exposure(ROWS - 1), torch.bincount(rows, minlength=ROWS - 1))
