"""Row i is `dataset[i]`, however the user's loader shuffles, drops or samples; random views depend on the row alone."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from lightning_attr.data import reading
from lightning_attr.data.loader import DataSource, OrderedLoader
from lightning_attr.user_code.isolation import undisturbed

pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded",  # newer Pythons, of worker processes
    "ignore:This DataLoader will create .* worker processes",  # on machines with one core
)

N = 11


class Numbers(Dataset[dict[str, Any]]):
    """Sample i says who it is."""

    def __init__(self, n: int = N, offset: int = 0) -> None:
        self.n = n
        self.offset = offset

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.n:
            raise IndexError(index)
        return {"x": torch.full((2,), float(index + self.offset)), "name": f"sample {index + self.offset}"}


def collected(source: DataSource, batch_size: int | None = None) -> list[tuple[list[int], Any]]:
    size = batch_size or source.batch_size
    batches = [range(start, min(start + size, len(source))) for start in range(0, len(source), size)]
    return list(OrderedLoader(source, batches))


class OwnBatches:
    """A batch sampler without the attribute `batch_size`."""

    def __iter__(self) -> Iterator[list[int]]:
        yield from ([5, 3], [0])

    def __len__(self) -> int:
        return 2


LOADERS = {
    "plain": {"batch_size": 4},
    "shuffled": {"batch_size": 4, "shuffle": True},
    "drop_last": {"batch_size": 4, "drop_last": True, "shuffle": True},
    "weighted": {"batch_size": 4, "sampler": WeightedRandomSampler(torch.arange(1.0, N + 1), 30)},
    "subset sampler": {"batch_size": 4, "sampler": SubsetRandomSampler([7, 2])},
    "random with replacement": {"batch_size": 4, "sampler": RandomSampler(Numbers(), replacement=True, num_samples=50)},
    "batch sampler": {"batch_sampler": BatchSampler(SequentialSampler(Numbers()), 4, drop_last=True)},
    "workers": {"batch_size": 2, "shuffle": True, "num_workers": 2},
    "persistent workers": {"batch_size": 2, "num_workers": 2, "persistent_workers": True, "prefetch_factor": 3},
}


@pytest.mark.parametrize("name", LOADERS)
def test_row_i_is_sample_i_of_the_data_set(name: str) -> None:
    source = DataSource.of(DataLoader(Numbers(), **LOADERS[name]), "training")
    assert len(source) == N
    seen = []
    for rows, batch in OrderedLoader(source, source.batches(range(N))):
        assert batch["x"][:, 0].tolist() == rows
        assert batch["name"] == [f"sample {row}" for row in rows]
        seen += rows
    assert seen == list(range(N))


def test_any_rows_in_any_order_a_shard_or_a_share_of_them() -> None:
    source = DataSource.of(DataLoader(Numbers(), batch_size=3, shuffle=True, num_workers=2), "training")
    batches = source.batches(range(10, 0, -2))
    assert [list(rows) for rows in batches] == [[10, 8, 6], [4, 2]]
    loader = OrderedLoader(source, batches)
    assert len(loader) == 2
    for _ in range(2):  # as often as wanted
        assert [(rows, batch["x"][:, 0].tolist()) for rows, batch in loader] == [([10, 8, 6],) * 2, ([4, 2],) * 2]
    assert list(OrderedLoader(source, [])) == []


def test_wrapped_data_sets_count_their_own_rows() -> None:
    data = ConcatDataset([Subset(Numbers(), [9, 4]), Numbers(3, offset=100)])
    (rows, batch), *rest = collected(DataSource.of(DataLoader(data, batch_size=8, shuffle=True), "training"))
    assert rest == []
    assert rows == [0, 1, 2, 3, 4]
    assert batch["x"][:, 0].tolist() == [9, 4, 100, 101, 102]


@dataclass
class Batch:
    inputs: Tensor
    names: list[str]


def collate(samples: list[dict[str, Any]]) -> Batch:
    return Batch(torch.stack([sample["x"] for sample in samples]) * 10, [sample["name"] for sample in samples])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_users_collation_makes_the_batches(num_workers: int) -> None:
    loader = DataLoader(Numbers(), batch_size=2, collate_fn=collate, num_workers=num_workers)
    for rows, batch in collected(DataSource.of(loader, "training")):
        assert isinstance(batch, Batch)
        assert batch.inputs[:, 0].tolist() == [10 * row for row in rows]
        assert batch.names == [f"sample {row}" for row in rows]


@pytest.mark.parametrize(
    ("arguments", "given", "expected"),
    [
        ({"batch_size": 4}, None, 4),
        ({"batch_size": 4}, 7, 7),
        ({"batch_sampler": BatchSampler(SequentialSampler(Numbers()), 5, drop_last=False)}, None, 5),
        ({"batch_sampler": OwnBatches()}, 3, 3),
        ({"batch_sampler": OwnBatches()}, None, 6),
    ],
)
def test_the_batch_size_is_the_given_one_or_the_loaders(arguments: Any, given: int | None, expected: int) -> None:
    source = DataSource.of(DataLoader(Numbers(), **arguments), "training", given)
    assert source.batch_size == expected
    rows, batch = collected(source)[0]
    assert (rows, batch["x"].shape) == (list(range(expected)), (expected, 2))


def test_one_loader_may_come_in_a_list_or_a_dict() -> None:
    loader = DataLoader(Numbers(), batch_size=2)
    for given in ([loader], (loader,), {"train": loader}):
        source = DataSource.of(given, "training")
        assert source.loader is loader
        (_, batch), *_ = collected(source)
        assert type(batch) is type(given)
        (inner,) = batch.values() if isinstance(batch, dict) else batch
        assert inner["x"][:, 0].tolist() == [0, 1]


def test_samples_collated_here_are_those_that_featurizing_sees() -> None:
    source = DataSource.of(DataLoader(Augmented("torch"), batch_size=4, shuffle=True), "training")
    before = torch.get_rng_state()
    batch = source.collated([2, 0, 1])
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(batch, collected(source)[0][1][[2, 0, 1]])


# What has no rows -----------------------------------------------------------------------------------------------------


class Stream(IterableDataset[float]):
    def __iter__(self) -> Iterator[float]:
        yield from torch.rand(3).tolist()


class UnsizedBatches:
    """A batch sampler that tells nothing."""

    def __iter__(self) -> Iterator[list[int]]:
        yield [5, 3]


@pytest.mark.parametrize(
    ("loaders", "error", "message"),
    [
        (DataLoader(Stream()), TypeError, "two passes over Stream, an IterableDataset, differ: .* no index"),
        (DataLoader(Numbers(0)), ValueError, "training data set to have samples, but Numbers is empty"),
        (
            [DataLoader(Numbers())] * 2,
            TypeError,
            "one torch DataLoader for the training data, but got 2 loaders: a step that takes a batch of each.*Concat",
        ),
        ({"a": DataLoader(Numbers()), "b": DataLoader(Numbers())}, TypeError, r"but got 2 loaders \('a', 'b'\)"),
        ([], TypeError, "but got 0 loaders"),
        (None, TypeError, "but got NoneType"),
        (iter([1]), TypeError, "but got list_iterator"),
        (Numbers(), TypeError, "but got Numbers"),
        (DataLoader(Numbers(), batch_sampler=UnsizedBatches()), ValueError, "UnsizedBatches, has neither"),
    ],
)
def test_what_cannot_be_attributed_is_named(loaders: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DataSource.of(loaders, "training")


def test_messages_name_the_role() -> None:
    with pytest.raises(ValueError, match="Expected the target data set to have samples"):
        DataSource.of(DataLoader(Numbers(0)), "target")


# Random augmentation --------------------------------------------------------------------------------------------------


class Augmented(Dataset[Tensor]):
    """Sample i with a random view, from a stream of every kind."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.own = {
            "own python": random.Random(1),
            "own numpy": np.random.default_rng(1),
            "own legacy numpy": np.random.RandomState(1),
            "own torch": torch.Generator().manual_seed(1),
        }.get(kind)

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Tensor:
        noise = {
            "python": random.random,
            "numpy": np.random.rand,
            "torch": lambda: torch.rand(()).item(),
            "own python": lambda: self.own.random(),
            "own numpy": lambda: self.own.random(),
            "own legacy numpy": lambda: self.own.rand(),
            "own torch": lambda: torch.rand((), generator=self.own).item(),
        }[self.kind]
        return torch.tensor([index, noise(), noise()], dtype=torch.float64)


KINDS = ["python", "numpy", "torch", "own python", "own numpy", "own legacy numpy", "own torch"]


def views(source: DataSource, batch_size: int, reverse: bool = False) -> Tensor:
    rows = range(N)[::-1] if reverse else range(N)
    batches = [rows[start : start + batch_size] for start in range(0, N, batch_size)]
    table = torch.cat([batch for _, batch in OrderedLoader(source, batches)])
    return table[table[:, 0].argsort()]


@pytest.mark.parametrize("kind", KINDS)
def test_random_views_depend_on_the_row_alone(kind: str) -> None:
    source = DataSource.of(DataLoader(Augmented(kind), batch_size=4, shuffle=True), "training")
    expected = views(source, 4)
    assert expected[:, 1].unique().numel() == N  # they are random
    assert (expected[:, 1] != expected[:, 2]).all()
    for batch_size, reverse in ((1, False), (3, True), (N, False)):
        torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002 - what happened before does not matter
        assert torch.equal(views(source, batch_size, reverse), expected)
    again = DataSource.of(DataLoader(Augmented(kind), batch_size=2, num_workers=2), "training")
    assert torch.equal(views(again, 2, reverse=True), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_iterating_leaves_all_random_streams_untouched(kind: str, num_workers: int) -> None:
    data, twin = Augmented(kind), Augmented(kind)
    source = DataSource.of(DataLoader(data, batch_size=2, num_workers=num_workers), "training")
    global_streams = random.getstate(), torch.get_rng_state().tolist(), str(np.random.get_state())  # noqa: NPY002
    with undisturbed(nn.Dropout(), data):
        collected(source)
        source.digest()
        source.collated([0, 1])
    assert (random.getstate(), torch.get_rng_state().tolist(), str(np.random.get_state())) == global_streams  # noqa: NPY002
    if kind.startswith("own"):
        assert torch.equal(data[0], twin[0])


@pytest.mark.parametrize("kind", KINDS)
def test_looking_at_the_data_leaves_all_random_streams_untouched(kind: str) -> None:
    data, twin = Augmented(kind), Augmented(kind)
    source = DataSource.of(DataLoader(data, batch_size=2), "training")
    before = random.getstate(), torch.get_rng_state().tolist(), str(np.random.get_state())  # noqa: NPY002
    source.digest()
    source.collated([0, 1])
    assert (random.getstate(), torch.get_rng_state().tolist(), str(np.random.get_state())) == before  # noqa: NPY002
    if kind.startswith("own"):
        assert torch.equal(data[0], twin[0])


def test_workers_alone_touch_no_stream_of_this_process() -> None:
    source = DataSource.of(DataLoader(Augmented("torch"), batch_size=2, num_workers=2), "training")
    before = torch.get_rng_state()
    collected(source)
    assert torch.equal(torch.get_rng_state(), before)


# The hash of the data -------------------------------------------------------------------------------------------------


def digest(data: Dataset[Any], **arguments: Any) -> str | None:
    return DataSource.of(DataLoader(data, **{"batch_size": 2, **arguments}), "training").digest()


def test_the_digest_is_that_of_the_data_not_of_the_loader() -> None:
    assert digest(Numbers()) is not None
    assert digest(Numbers()) == digest(Numbers(), batch_size=5, shuffle=True) == digest(Subset(Numbers(), range(N)))
    assert digest(Augmented("own numpy")) == digest(Augmented("own numpy")) is not None


@pytest.mark.parametrize("row", [0, N // 3, 2 * N // 3, N - 1])
@pytest.mark.parametrize("part", [0, 1])
def test_the_digest_changes_with_a_sample(row: int, part: int) -> None:
    x, y = torch.randn(N, 3), torch.arange(N)
    before = digest(TensorDataset(x, y))
    (x, y)[part][row] += 1
    assert digest(TensorDataset(x, y)) != before


class Samples(Dataset[Any]):
    def __init__(self, *samples: object) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


def test_the_digest_tells_kinds_of_samples_apart() -> None:
    different = [
        torch.zeros(2),
        torch.zeros(2, dtype=torch.bfloat16),
        torch.zeros(1, 2),
        torch.tensor(True),
        torch.zeros(0),
        np.zeros(2),
        np.zeros(2, dtype=np.float32),
        np.float32(0),
        np.array(["a"], dtype=object),
        np.array(["b"], dtype=object),
        "text",
        3,
        None,
        {"a": 1},
        {"b": 1},
        Batch(torch.zeros(1), []),
    ]
    digests = [digest(Samples(sample)) for sample in different]
    assert None not in digests
    assert len(set(digests)) == len(different)
    assert digests == [digest(Samples(sample)) for sample in different]


def test_samples_that_cannot_be_pickled_do_no_harm() -> None:
    assert digest(Samples((threading.Lock(), 1))) == digest(Samples((threading.Lock(), 1)))
    assert digest(Samples((threading.Lock(), 1))) != digest(Samples((threading.Lock(), 2)))


def test_arrays_are_hashed_by_content_whatever_their_strides() -> None:
    array = np.arange(6.0).reshape(2, 3)
    assert digest(Samples(array)) == digest(Samples(np.asfortranarray(array))) == digest(Samples(array.T.copy().T))


def test_data_that_differs_each_time_has_no_digest() -> None:
    class Unstable(Numbers):
        reads = 0

        def __getitem__(self, index: int) -> dict[str, Any]:
            Unstable.reads += 1
            return {"reads": Unstable.reads}

    assert digest(Unstable()) is None


class Noted(TensorDataset):
    """Tensors, and the first random number that reading a sample would draw."""

    def __getitem__(self, index: int) -> Any:
        return (*super().__getitem__(index), torch.rand(()))


IMAGES = TensorDataset(torch.randn(9, 2, 3), torch.arange(9), torch.randn(9, dtype=torch.float64))


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    "dataset",
    [
        TensorDataset(torch.arange(6.0)),
        IMAGES,
        Subset(IMAGES, [8, 0, -1, 3, 3]),
        Subset(Subset(IMAGES, torch.arange(8, 0, -1)), np.array([7, 2, 5])),  # type: ignore[arg-type]
    ],
    ids=["one", "three", "subset", "nested"],
)
def test_plain_tensors_are_indexed_without_seeds(
    dataset: Any, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "hashed_seed", lambda *key: pytest.fail("seeded"))
    source = DataSource.of(DataLoader(dataset, batch_size=2, num_workers=num_workers), "training")
    rows = [0, 1, 2, 1, 0]
    batches = list(OrderedLoader(source, source.batches(rows)))
    assert [numbers for numbers, _ in batches] == [[0, 1], [2, 1], [0]]
    for numbers, batch in batches:
        expected = default_collate([dataset[row] for row in numbers])
        assert type(batch) is type(expected)
        torch.testing.assert_close(batch, expected, rtol=0, atol=0)


def test_tensors_that_cannot_be_indexed_at_once_are_read_one_by_one() -> None:
    data = TensorDataset(torch.eye(3).to_sparse(), torch.arange(3))
    source = DataSource.of(DataLoader(data, batch_size=2), "training")
    assert not source.indexes
    assert DataSource.of(DataLoader(IMAGES, batch_size=2), "training").indexes


@pytest.mark.parametrize("case", ["subclass", "collation"])
def test_what_may_be_random_is_read_with_seeds(case: str) -> None:
    def noisy(samples: list[Any]) -> Any:
        return torch.rand(len(samples))

    data = Noted(torch.arange(6.0)) if case == "subclass" else TensorDataset(torch.arange(6.0))
    source = DataSource.of(
        DataLoader(data, batch_size=4, collate_fn=noisy if case == "collation" else None), "training"
    )
    first, second = (list(OrderedLoader(source, source.batches(range(6)))) for _ in range(2))
    assert str(first) == str(second)
