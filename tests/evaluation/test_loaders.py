"""The user's loader over a subset."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_attr.evaluation.loaders import SubsetShuffle, subset_loader

KEPT = torch.tensor([True, False, True, True, False, True, True])
ROWS = [0, 2, 3, 5, 6]


class Multiplying(DataLoader[Any]):
    """A subclass with another constructor and an attribute of its own."""

    def __init__(self, factor: int, **settings: Any) -> None:
        super().__init__(range(7), collate_fn=self.join, **settings)
        self.factor = factor

    def join(self, samples: list[int]) -> list[int]:
        return [self.factor * sample for sample in samples]


@pytest.mark.parametrize("workers", [0, 1])
def test_order_batches_and_settings_stay(workers: int) -> None:
    given = DataLoader(range(7), batch_size=2, num_workers=workers, persistent_workers=workers > 0)
    list(given)
    loader = subset_loader(given, KEPT)
    assert [batch.tolist() for batch in loader] == [[0, 2], [3, 5], [6]]
    assert len(loader) == 3
    assert (loader.num_workers, loader.batch_size, loader.persistent_workers) == (workers, 2, workers > 0)
    assert [batch.tolist() for batch in given] == [[0, 1], [2, 3], [4, 5], [6]]


def test_drop_last_and_subclasses() -> None:
    loader = subset_loader(Multiplying(10, batch_size=2, drop_last=True), KEPT)
    assert list(loader) == [[0, 20], [30, 50]]
    assert type(loader) is Multiplying
    assert loader.drop_last


def test_shuffles_are_uniform_new_each_epoch_and_follow_the_seed() -> None:
    loader = subset_loader(DataLoader(range(7), shuffle=True, batch_size=5), KEPT)
    torch.manual_seed(1)
    epochs = [tuple(next(iter(loader)).tolist()) for _ in range(3000)]
    assert all(sorted(epoch) == ROWS for epoch in epochs)
    counts = torch.tensor([[sum(epoch[place] == row for epoch in epochs) for row in ROWS] for place in range(5)])
    assert ((counts - 600).abs() < 110).all()  # standard deviation 22
    assert len(set(epochs)) == 120  # all permutations
    torch.manual_seed(1)
    assert tuple(next(iter(loader)).tolist()) == epochs[0]


def test_the_users_generator_shuffles() -> None:
    generator = torch.Generator().manual_seed(5)
    loader = subset_loader(DataLoader(range(7), shuffle=True, batch_size=5, generator=generator), KEPT)
    torch.manual_seed(0)
    first = next(iter(loader)).tolist()
    generator.manual_seed(5)
    torch.manual_seed(1)
    assert next(iter(loader)).tolist() == first


def test_subsets_that_differ_by_a_sample_come_in_the_same_order() -> None:
    whole, less = Subset(range(9), list(range(9))), Subset(range(9), [0, 1, 2, 3, 5, 6, 7, 8])
    torch.manual_seed(0)
    everything = [whole[i] for i in SubsetShuffle(whole)]
    torch.manual_seed(0)
    assert [less[i] for i in SubsetShuffle(less)] == [row for row in everything if row != 4]


@pytest.mark.parametrize(
    ("replacement", "given", "expected"), [(True, None, 5), (True, 12, 12), (False, 3, 3), (False, 12, 12)]
)
def test_random_samplers_keep_their_number_of_draws(replacement: bool, given: int | None, expected: int) -> None:
    sampler = RandomSampler(range(7), replacement, given)
    rows = [row for batch in subset_loader(DataLoader(range(7), batch_size=2, sampler=sampler), KEPT) for row in batch]
    assert len(rows) == expected
    assert {int(row) for row in rows} <= set(ROWS)


class EvenFirst(BatchSampler):
    pass


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"sampler": WeightedRandomSampler([1.0] * 7, 7)}, "its sampler is a WeightedRandomSampler"),
        ({"sampler": SubsetRandomSampler([1, 2])}, "its sampler is a SubsetRandomSampler"),
        ({"sampler": SequentialSampler(range(4))}, "its sampler is a SequentialSampler"),
        ({"sampler": [3, 1]}, "its sampler is a list"),
        ({"batch_sampler": [[3, 1]]}, "its batch sampler is a list"),
        ({"batch_sampler": EvenFirst(SequentialSampler(range(7)), 2, False)}, "its batch sampler is a EvenFirst"),
        (
            {"batch_sampler": BatchSampler(SubsetRandomSampler([1, 2]), 2, False)},
            "its sampler is a SubsetRandomSampler",
        ),
        ({"batch_size": None}, "its batch sampler is a NoneType"),
    ],
)
def test_custom_samplers_are_refused(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(TypeError, match=rf"{name}, whose indices .* select samples through the data set"):
        subset_loader(DataLoader(range(7), **settings), KEPT)
