"""What a data set, its collate function or a worker raises while samples are read names them, and is the cause."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    Subset,
    TensorDataset,
)

from cases import BlobClassifier, blobs, loader_of, quiet_trainer, told
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.data.loader import DataSource, OrderedLoader
from lightning_attr.data.sample_errors import named_batches
from lightning_attr.errors import SampleReadError
from lightning_attr.methods import TRAK

pytestmark = pytest.mark.usefixtures("few_waits")
N, BAD = 12, 7
POINTS = blobs(N)


class MissingFileError(OSError):
    """An error of the user's own, which nothing but its pickle can make again."""

    def __init__(self, path: str, *, code: int) -> None:
        super().__init__(path)
        self.code = code


class Rows(Dataset[Any]):
    """Points, one of which cannot be read."""

    def __init__(
        self, error: Callable[[], BaseException] = lambda: ValueError("broken image."), bad: int = BAD
    ) -> None:
        self.error, self.bad = error, bad

    def __len__(self) -> int:
        return N

    def __getitem__(self, row: int) -> Any:
        if row == self.bad:
            raise self.error()
        return POINTS[row]


class Lists(Rows):
    """The same, asked for lists of rows that it gives as whole batches."""

    def __getitem__(self, rows: Any) -> Any:
        if self.bad in rows:
            raise self.error()
        return torch.stack([POINTS[row][0] for row in rows]), torch.stack([POINTS[row][1] for row in rows])


class Many(Rows):
    """The same with ``__getitems__``, as a list of samples."""

    def __getitems__(self, rows: list[int]) -> Any:
        return [self[row] for row in rows]


@pytest.fixture(name="few_waits", scope="module")
def few_waits_fixture() -> Iterator[None]:
    """Iterators of torch that an error leaves behind wait this long for each worker when they are collected."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
        yield
        gc.collect()


def read(loader: DataLoader[Any]) -> None:
    source = DataSource.of(loader, "training")
    for _ in OrderedLoader(source, source.batches(range(N))):
        pass


def picky() -> BaseException:
    return MissingFileError("a.png", code=3)


def unpicklable() -> BaseException:
    error = ValueError("with a lock")
    error.lock = lambda: None  # type: ignore[attr-defined]
    return error


LOADERS: dict[str, tuple[Any, str, Any]] = {
    "rows": (
        lambda **own: DataLoader(Rows(), 2, **own),
        r"dataset\[7\] of Rows could.*: ValueError: broken",
        ValueError,
    ),
    "getitems": (lambda **own: DataLoader(Many(), 2, **own), r"dataset\[7\] of Many could not be read", ValueError),
    "subset": (
        lambda **own: DataLoader(Subset(Rows(), [5, 6, 7, *range(9)]), 2, **own),
        r"dataset\[2\] of Subset \(which is dataset\[7\] of Rows\) could not be read",
        ValueError,
    ),
    "lists": (
        lambda **own: DataLoader(Lists(), None, sampler=BatchSampler(SequentialSampler(range(N)), 2, False), **own),
        r"dataset\[7\] of Lists could not be read",
        ValueError,
    ),
    "own error": (lambda **own: DataLoader(Rows(picky), 2, **own), "MissingFileError: a.png", None),
    "not to be pickled": (lambda **own: DataLoader(Rows(unpicklable), 2, **own), "ValueError: with a lock", None),
    "tensors": (
        lambda **own: DataLoader(Subset(TensorDataset(torch.ones(9)), [*range(8), 9, 0, 1, 2]), 2, **own),
        r"dataset\[8\], dataset\[9\] of Subset.*: IndexError",
        IndexError,
    ),
}


@pytest.mark.parametrize(
    ("name", "workers"), [*((name, 0) for name in LOADERS), ("rows", 1), ("own error", 1), ("not to be pickled", 1)]
)
def test_the_row_is_named_and_the_users_error_kept(name: str, workers: int) -> None:
    loader, where, cause = LOADERS[name]
    with pytest.raises(SampleReadError, match=where) as caught:
        read(loader(num_workers=workers))
    found = caught.value.__cause__
    assert found is not None
    assert cause is None or type(found) is cause
    if workers:
        assert "in a DataLoader worker" in str(found.__cause__)
        assert "test_sample_errors.py" in str(found.__cause__)


def ragged(samples: list[Any]) -> Any:
    return torch.tensor([[1.0] * (3 if sample[1] else 2) for sample in samples])


def needs_an_image(samples: list[Any]) -> Any:
    for sample in samples:
        if sample is POINTS.tensors[0][BAD] or (sample[0] == POINTS[BAD][0]).all():
            raise LookupError("no image")
    return torch.zeros(len(samples))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_collate_function_names_the_sample_that_fails_alone_or_else_its_batch(workers: int) -> None:
    with pytest.raises(SampleReadError, match=r"^`collate_fn` \(needs_an_image\) failed for dataset\[7\] of .*no im"):
        read(DataLoader(Rows(bad=-1), 4, collate_fn=needs_an_image, num_workers=workers))
    with pytest.raises(SampleReadError, match=r"failed for dataset\[0\], .* dataset\[3\] and 2 more of Rows: Value"):
        read(DataLoader(Rows(bad=-1), 6, collate_fn=ragged, num_workers=workers))


def test_a_worker_that_ends_names_what_was_waited_for() -> None:
    def ends() -> Iterator[Any]:
        yield "first"
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    batches = named_batches(ends(), Rows(), [[0, 1], [2, 3]], "training", workers=1)
    assert next(batches) == "first"
    with pytest.raises(SampleReadError, match=r"^The training DataLoader failed while dataset\[2\], dataset\[3\] of R"):
        next(batches)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return (Rows()[row] for row in range(N))


def test_a_stream_names_the_position() -> None:
    with pytest.raises(SampleReadError, match=r"Sample 7 of Stream, the stream of target data, .*: broken image\. It"):
        DataSource.of(DataLoader(Stream(), 2), "target")


def test_a_data_set_without_a_length_is_told_so() -> None:
    class Endless(Dataset[Any]):
        def __getitem__(self, row: int) -> Any:
            return POINTS[row % N]

    with pytest.raises(TypeError, match="Endless has no `__len__`"):
        DataSource.of(DataLoader(Endless(), 2, sampler=range(4)), "training")  # type: ignore[arg-type]


class Moves(BlobClassifier):
    """Changes batches on the device, but not all of them."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if (batch[0] == POINTS[BAD][0]).all(1).any():
            raise ArithmeticError("no scale")
        return batch


@pytest.mark.parametrize("role", ["training", "target"])
def test_attribute_names_the_sample_of_either_data_set(role: str) -> None:
    loaders = {"training": loader_of(POINTS), "target": loader_of(POINTS), role: loader_of(Rows())}
    with pytest.raises(SampleReadError, match=r"dataset\[7\] of Rows could not be read: ValueError: broken image"):
        quiet_trainer().attribute(
            model=BlobClassifier(), train_dataloaders=loaders["training"], target_dataloaders=loaders["target"]
        )


def test_a_transfer_hook_that_fails_names_hook_and_sample() -> None:
    named = r"`on_after_batch_transfer` of Moves failed for dataset\[7\] of TensorDataset: ArithmeticError: no scale\."
    with pytest.raises(SampleReadError, match=named):
        quiet_trainer().attribute(model=Moves(), train_dataloaders=loader_of(POINTS), targets="train")


class Fails:
    """Reads well until training has begun."""

    def __init__(self) -> None:
        self.begun = False

    def __len__(self) -> int:
        return N

    def __getitem__(self, row: int) -> Any:
        if self.begun and torch.utils.data.get_worker_info() is None and row == BAD:
            raise OSError("the disk is gone")
        return POINTS[row]


def test_beside_training_it_is_told_and_training_goes_on(tmp_path: Any) -> None:
    class Begins(BlobClassifier):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            data.begun = batch_idx == 1  # the last

        def on_train_epoch_start(self) -> None:
            data.begun = False

    data = Fails()
    trainer = quiet_trainer(max_epochs=2, callbacks=[AttributionCallback(tmp_path, TRAK(8), log=False)])
    with told(r"dataset\[7\] of Fails could not be read: OSError: the disk is gone.*Training goes on"):
        trainer.fit(Begins(), loader_of(data))
    assert trainer.global_step == 4
