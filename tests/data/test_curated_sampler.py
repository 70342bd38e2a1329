"""The sampler in front of another: what it draws in place of what is left out."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_attr.data.curated_sampler import CuratedSampler, curable

N = 40
DATA = torch.arange(N)


def curated(sampler: Any, left_out: set[int], weight: float = 0.0, process: int = 0) -> CuratedSampler:
    found = CuratedSampler(sampler, process)
    found.left_out, found.weight = frozenset(left_out), weight
    return found


@pytest.mark.parametrize(
    "sampler",
    [
        RandomSampler(DATA),
        SequentialSampler(DATA),
        SubsetRandomSampler(range(20)),
        SubsetRandomSampler(torch.arange(20)),
        WeightedRandomSampler([1.0] * N, 30),
        DistributedSampler(DATA, 2, 1),
        list(np.arange(N)),
    ],
)
def test_an_epoch_keeps_its_length_and_its_other_samples(sampler: Any) -> None:
    torch.manual_seed(0)
    before = [int(i) for i in sampler]
    torch.manual_seed(0)
    drawn = [int(i) for i in curated(sampler, {1, 3, 8})]
    assert len(drawn) == len(before) == len(curated(sampler, {1}))
    for old, new in zip(before, drawn, strict=True):
        assert new == old if old not in {1, 3, 8} else new in {*before} - {1, 3, 8}


def test_without_rows_to_leave_out_it_is_the_other_sampler() -> None:
    torch.manual_seed(0)
    plain = [list(RandomSampler(DATA)), torch.rand(1)]
    torch.manual_seed(0)
    assert [list(CuratedSampler(RandomSampler(DATA))), torch.rand(1)] == plain


def test_draws_repeat_by_epoch_and_process() -> None:
    sampler = curated(SequentialSampler(DATA), set(range(0, N, 2)))
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(curated(SequentialSampler(DATA), set(range(0, N, 2)), process=1)) != first


def test_a_weight_lets_some_through() -> None:
    sampler, counts = curated(SequentialSampler(DATA), {5}, weight=0.3), Counter[int]()
    for epoch in range(400):
        sampler.set_epoch(epoch)
        counts.update(int(i) for i in sampler)
    assert 80 < counts[5] < 160
    assert min(counts[i] for i in range(N) if i != 5) >= 400


def test_the_epoch_reaches_the_other_sampler() -> None:
    inner = DistributedSampler(DATA, 2, 0)
    CuratedSampler(inner).set_epoch(7)
    assert inner.epoch == 7


def test_where_nothing_is_left_all_are_drawn() -> None:
    assert list(curated(SequentialSampler(DATA[:3]), {0, 1, 2})) == [0, 1, 2]


def test_what_is_no_row_is_drawn_and_remembered() -> None:
    sampler = curated(["a", 1, 2], {1})
    assert next(iter(sampler)) == "a"
    assert sampler.stranger == "a"


class Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(3))


class Buckets(BatchSampler):
    def __iter__(self) -> Any:
        return iter([[0, 1]])


class Lengthless:
    def __iter__(self) -> Any:
        return iter(range(3))


@pytest.mark.parametrize(
    ("loader", "problem"),
    [
        ([1, 2], "the training loader is a list, and no DataLoader"),
        (DataLoader(Stream()), "Stream is a stream"),
        (DataLoader(DATA, batch_size=None), "batch_size=None"),
        (DataLoader(DATA, batch_sampler=Buckets(SequentialSampler(DATA), 2, False)), "batch sampler Buckets makes"),
        (DataLoader(DATA, batch_sampler=[[0], [1]]), "batch sampler list makes"),
        (DataLoader(DATA, batch_sampler=BatchSampler(Lengthless(), 2, False)), "sampler Lengthless has no length"),
    ],
)
def test_what_cannot_be_curated_is_named(loader: Any, problem: str) -> None:
    assert problem in (curable(loader) or "")


def test_what_can_be_curated() -> None:
    for loader in (DataLoader(DATA, 4, shuffle=True), DataLoader(DATA, sampler=SubsetRandomSampler([1, 2]))):
        assert curable(loader) is None
