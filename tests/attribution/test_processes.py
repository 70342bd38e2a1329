"""Several processes: any method with fewer shards or samples than processes, and an end for all where one fails."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from method_cases import N_TRAIN, scored, target_data, training_data
from process_cases import connect, run
from torch.utils.data import Dataset, Subset

from cases import quiet_trainer
from lightning_attr import AttributionResult
from lightning_attr.attribution import processes
from lightning_attr.attribution.processes import Processes
from lightning_attr.errors import AttributionError
from lightning_attr.methods import TRAK, DropoutEnsemble, GradDot, Influence, KNNShapley, RepresentationSimilarity

METHODS: dict[str, Callable[[], Any]] = {
    "TRAK": lambda: TRAK(proj_dim=16),
    "TRAK, exact": lambda: TRAK(exact=True),
    "GradDot, exact": lambda: GradDot(exact=True),
    "EK-FAC": lambda: Influence(solver="ekfac"),
    "CG": lambda: Influence(solver="cg"),
    "KNN-Shapley": lambda: KNNShapley(k=3),
    "representations": lambda: RepresentationSimilarity(),
    "dropout ensemble": lambda: DropoutEnsemble(TRAK(proj_dim=16), masks=2),
}


# What processes say to each other -------------------------------------------------------------------------------------


def fails_on(rank: int, own: Processes) -> None:
    with own.together():
        if own.rank == rank:
            raise ValueError("no room")


def talk(rank: int, count: int, group: dict[str, str]) -> None:
    connect(rank, count, group)
    torch.distributed.init_process_group("gloo")
    cpu = torch.device("cpu")
    own = Processes(rank, count, cpu)
    assert own.sum(torch.tensor([rank, 1])).tolist() == [3, 3]
    with own.together():
        pass
    message = r"Process 1 of 3 has failed, and all with it\. ValueError: no room"
    with pytest.raises(ValueError if rank == 1 else AttributionError, match="no room" if rank == 1 else message):
        fails_on(1, own)
    own.meet()  # all know: nobody waits
    own.tell(ValueError("another"))
    later = Processes(rank, count, cpu)
    if rank == 2:
        later.tell(KeyError("loss"))
    else:
        with pytest.raises(AttributionError, match=r"Process 2 of 3 has failed.*KeyError: 'loss'"):
            later.sum(torch.ones(4))


def test_a_failure_is_heard_wherever_the_others_wait() -> None:
    assert run(3, talk) == [0, 0, 0]


def speak_to_nobody(rank: int, count: int, group: dict[str, str]) -> None:
    connect(rank, count, group)
    torch.distributed.init_process_group("gloo")
    if rank == 0:
        time.sleep(2)  # it computes, and waits for nobody
        os._exit(0)
    with mock.patch.object(processes, "_PATIENCE", timedelta(seconds=0.2)):
        start = time.monotonic()
        Processes(rank, count, torch.device("cpu")).tell(ValueError("no room"))
        assert time.monotonic() - start < 1.5
    os._exit(0)


def test_a_process_that_failed_does_not_wait_for_those_that_are_busy() -> None:
    assert run(2, speak_to_nobody) == [0, 0]


# Methods --------------------------------------------------------------------------------------------------------------


def settings_of(samples: int) -> dict[str, Any]:
    """One shard of all; batches that no part of it is a multiple of."""
    return {"train": Subset(training_data(), range(samples)), "batch_size": 5, "targets": target_data()}


def attribute_all(rank: int, count: int, group: dict[str, str], samples: int, folder: Path) -> None:
    connect(rank, count, group)
    for name, make in METHODS.items():
        trainer = quiet_trainer(strategy="ddp", devices=count)
        scored(make(), None, trainer=trainer, **settings_of(samples)).save(folder / f"{name}-{rank}")


@pytest.mark.parametrize(("count", "samples"), [(3, N_TRAIN), pytest.param(4, 3, marks=pytest.mark.slow)])
def test_fewer_shards_or_samples_than_processes(count: int, samples: int, tmp_path: Path) -> None:
    assert run(count, attribute_all, samples, tmp_path) == [0] * count
    for name, make in METHODS.items():
        one = scored(make(), None, **settings_of(samples))
        for rank in range(count):
            found = AttributionResult.load(tmp_path / f"{name}-{rank}")
            gap = (found.scores.values - one.scores.values).norm() / one.scores.values.norm()
            assert gap < 1e-4, (name, gap)
            torch.testing.assert_close(found.self_influence, one.self_influence, rtol=1e-4, atol=1e-6, msg=name)
            assert torch.equal(found.loss, one.loss), name
            assert torch.equal(found.labels, one.labels), name


class Unreadable(Dataset[Any]):
    """A sample that one process can not read, on a disk of its own."""

    def __init__(self, row: int, here: bool) -> None:
        self.samples, self.row, self.here = training_data(), row, here

    def __len__(self) -> int:
        return N_TRAIN

    def __getitem__(self, row: int) -> Any:
        if self.here and row == self.row:
            raise OSError("the disk is gone")
        return self.samples[row]


def attribute_an_unreadable_sample(rank: int, count: int, group: dict[str, str], row: int) -> None:
    connect(rank, count, group)
    owner = row * count // N_TRAIN  # which process reads it
    data = Unreadable(row, rank == owner)
    scored(GradDot(exact=True), None, trainer=quiet_trainer(strategy="ddp", devices=count))  # makes the group
    for method in (GradDot(exact=True), Influence(solver="cg")):
        trainer = quiet_trainer(strategy="ddp", devices=count)
        said = "the disk is gone" if rank == owner else f"Process {owner} of {count} has failed.*the disk is gone"
        with pytest.raises(Exception, match=said):
            scored(method, None, trainer=trainer, train=data)
    # The processes are still in step, and may go on together.
    trainer = quiet_trainer(strategy="ddp", devices=count)
    assert scored(GradDot(exact=True), None, trainer=trainer).scores.shape == (N_TRAIN, len(target_data()))


@pytest.mark.parametrize("row", [0, 9, 20])  # the first is looked at before anything runs
def test_where_one_process_fails_all_say_why(row: int) -> None:
    assert run(2, attribute_an_unreadable_sample, row) == [0, 0]
