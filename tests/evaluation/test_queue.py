"""Going through a plan, with a function that trains nothing."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_attr.evaluation import queue as work
from lightning_attr.evaluation.ground_truth import GroundTruth, Records
from lightning_attr.evaluation.queue import fill
from lightning_attr.evaluation.subsets import Retraining, random_subsets

PLAN = random_subsets(6, num_subsets=4, alpha=0.5, repeats=2, seed=0)


@pytest.fixture
def records(tmp_path: Path) -> Records:
    return Records.prepare(tmp_path / "truth", PLAN, {"n_target": 1})


class Counting:
    """Trains nothing, and remembers what it was asked for."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.calls: list[tuple[Retraining, Tensor, Path | None]] = []
        self.fails_at = fails_at

    def __call__(
        self, retraining: Retraining, kept: Tensor, beat: Callable[[], None], checkpoint: Path | None
    ) -> tuple[Tensor, dict[str, object]]:
        beat()
        self.calls.append((retraining, kept, checkpoint))
        if len(self.calls) == self.fails_at:
            raise RuntimeError("out of memory")
        return torch.tensor([float(retraining.seed % 1000)]), {}


def test_each_is_trained_once_with_its_subset(records: Records) -> None:
    train = Counting()
    fill(records, train, keep_checkpoints=True, progress=False)
    assert [one for one, _, _ in train.calls] == list(PLAN)
    assert all(torch.equal(kept, PLAN.masks[one.subset]) for one, kept, _ in train.calls)
    assert [path.name for _, _, path in train.calls if path][:2] == ["subset=0-repeat=0.ckpt", "subset=1-repeat=0.ckpt"]
    assert torch.equal(
        GroundTruth.open(records.dirpath).outputs[..., 0], GroundTruth.open(records.dirpath).seeds % 1000
    )
    fill(records, train, progress=False)
    assert len(train.calls) == 8


def test_a_failure_gives_the_claim_back_and_keeps_what_is_there(records: Records) -> None:
    with pytest.raises(RuntimeError, match="out of memory"):
        fill(records, Counting(fails_at=3), progress=False)
    assert len(records.unfinished()) == 6
    assert list((records.dirpath / "claims").iterdir()) == []


def test_it_stops_when_asked(records: Records) -> None:
    train = Counting()
    fill(records, train, progress=False, stopped=lambda: len(train.calls) == 3)
    assert len(train.calls) == 3


def test_it_waits_for_what_another_process_is_at(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    claim, train = records.claim(list(PLAN)[1]), Counting()
    assert claim is not None
    running = threading.Thread(target=fill, args=(records, train), kwargs={"progress": False})
    running.start()
    running.join(1)
    assert running.is_alive()
    assert len(train.calls) == 7
    records.write(list(PLAN)[1], torch.zeros(1))
    claim.release()
    running.join(10)
    assert not running.is_alive()
    assert len(train.calls) == 7


def test_it_takes_over_what_another_process_gave_up(records: Records) -> None:
    claim, train = records.claim(list(PLAN)[1]), Counting()
    assert claim is not None
    running = threading.Thread(target=fill, args=(records, train), kwargs={"progress": False})
    running.start()
    running.join(0.5)
    claim.release()
    running.join(10)
    assert [one.name for one, _, _ in train.calls][-1] == "subset=1-repeat=0"


def test_progress_begins_where_the_last_run_ended(records: Records, capfd: pytest.CaptureFixture[Any]) -> None:
    with pytest.raises(RuntimeError):
        fill(records, Counting(fails_at=5), progress=False)
    assert not "".join(capfd.readouterr())
    fill(records, Counting())
    printed = "".join(capfd.readouterr())
    assert "50%" in printed
    assert "8/8" in printed


def test_a_dead_claim_from_the_future_is_waited_for_no_longer_than_others_and_named(
    records: Records, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a machine whose clock is days ahead."""
    monkeypatch.setattr(work, "_SILENCE", 0.1)
    records.claims.stale_after = 0.6
    first = next(iter(PLAN))
    claim = records.dirpath / "claims" / f"{first.name}.0"
    claim.write_text(json.dumps({"host": "elsewhere", "pid": 7}))
    os.utime(claim, (time.time() + 1e6,) * 2)
    with caplog.at_level(logging.WARNING):
        fill(records, Counting(), progress=False)
    assert GroundTruth.open(records.dirpath).complete
    assert (
        f"Waiting for 1 retrainings that other processes have in {records.dirpath}: subset 0, repeat 0 is"
        in caplog.text
    )
    assert "with process 7 on elsewhere (1000000 s ahead of the clock here)" in caplog.text
