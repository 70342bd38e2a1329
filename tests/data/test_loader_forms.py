"""Loaders of forms beyond the plain one: whose rows are read, in the form that training has them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler

from lightning_attr.data import loader_forms
from lightning_attr.data.loader import DataSource, OrderedLoader

X = torch.arange(12.0).reshape(6, 2)


class Fetches(Dataset[Any]):
    """Asked for a list of rows, it gives them as one batch."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, rows: Any) -> Tensor:
        return X[rows if isinstance(rows, list) else [rows]]


class FetchesBoth(Fetches):
    """A loader that batches would ask for samples by another method than the sampler's lists do."""

    def __getitems__(self, rows: list[int]) -> list[Tensor]:
        return [X[row] for row in rows]


class Items(Fetches):
    """Item i is a whole batch."""


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(X)


class Endless(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        while True:
            yield 1


class Normalising(DataLoader[Tensor]):
    def __iter__(self) -> Any:
        return ((x[0] - 5) / 3 for x in super().__iter__())


class Merging(DataLoader[Tensor]):
    def __iter__(self) -> Any:
        yield torch.cat([x[0] for x in super().__iter__()])


def read(source: DataSource, rows: range = range(6)) -> list[Any]:
    return list(OrderedLoader(source, source.batches(rows)))


@pytest.mark.parametrize("dataset", [Fetches(), FetchesBoth()])
def test_data_sets_that_give_whole_batches_are_asked_for_them(dataset: Any) -> None:
    sampler = BatchSampler(RandomSampler(dataset), 4, drop_last=False)
    source = DataSource.of(DataLoader(dataset, batch_size=None, sampler=sampler), "training")
    assert source.batch_size == 4
    (first, batch), (last, rest) = read(source)
    assert (first, last) == ([0, 1, 2, 3], [4, 5])
    assert torch.equal(torch.cat([batch, rest]), X)


def test_items_of_a_loader_that_does_not_batch_are_rows(caplog: pytest.LogCaptureFixture) -> None:
    source = DataSource.of(DataLoader(Items(), batch_size=None), "training")
    assert "each of the 6 items of Items is what one step takes" in caplog.text
    ((_, batches),) = read(source)
    assert [one.tolist() for one in batches] == [[x.tolist()] for x in X]
    with pytest.raises(ValueError, match="`batch_size` to be None, because the training DataLoader does not batch"):
        DataSource.of(DataLoader(Items(), batch_size=None), "training", batch_size=4)


def test_streams_whose_passes_repeat_have_rows_in_their_order() -> None:
    source = DataSource.of(DataLoader(Stream(), batch_size=4), "training")
    assert len(source) == 6
    assert torch.equal(torch.cat([batch for _, batch in read(source)]), X)


def test_endless_streams_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_forms, "_MOST_SAMPLES", 100)
    with pytest.raises(TypeError, match="Endless, an IterableDataset, has not ended after 100 samples"):
        DataSource.of(DataLoader(Endless()), "training")


def test_a_loader_class_that_changes_batches_is_heeded() -> None:
    data = torch.utils.data.TensorDataset(X)
    source = DataSource.of(Normalising(data, batch_size=4, shuffle=True), "training")
    assert source.own_iteration
    source.form.iterates = True
    assert torch.equal(torch.cat([batch for _, batch in read(source)]), (X - 5) / 3)
    merging = DataSource.of(Merging(data, batch_size=4), "training")
    with pytest.raises(TypeError, match="`__iter__` of Merging to give one batch for each"):
        list(merging.iterated([[0, 1], [2, 3]]))
