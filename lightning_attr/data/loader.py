"""Batches in data set order, with their row numbers: row ``i`` is ``dataset[i]``, however training shuffles."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    default_collate,
    default_convert,
)

from lightning_attr.batches.form import BatchForm
from lightning_attr.batches.samples_apart import SamplesApart
from lightning_attr.data.loader_forms import OnePass, batch_size_of, fetches_lists, iterating_copy, single_loader
from lightning_attr.data.reading import Collation, SampleReader, SeededSamples, batched_reading
from lightning_attr.data.sample_digest import sample_digest
from lightning_attr.data.sample_errors import failed_batch, named_batches, refuse_samples
from lightning_attr.errors import AttributionError
from lightning_attr.user_code.reading_state import unchanged_data

log = logging.getLogger(__name__)

_PLAIN = tree_flatten(0)[1]
_ITEMS = 16
"""Items of a loader that does not batch that are read at a time."""


@dataclass(frozen=True)
class DataSource:
    """A map-style data set and the way its samples become batches, taken from a user's loader.

    Args:
        dataset: the data set; ``dataset[i]`` is row ``i``.
        batch_size: samples per batch.
        loader: the user's loader, for its ``collate_fn``, workers and pinning.
        role: what it is called in messages, "training" or "target".
        structure: what a batch comes in where the loader came in a collection; see :func:`single_loader`.
        reading: "rows" where the data set is asked for one row after the other, "lists" where ``dataset[rows]`` gives
            whole batches, "batches" where its ``__getitems__`` does, "items" where the loader does not batch, so that
            each row is the whole batch of a step.
        form: how samples lie in a batch, as the first look at it has found.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> source = DataSource.of(DataLoader([3.0, 4.0, 5.0], batch_size=2, shuffle=True), "training")
        >>> len(source), source.batch_size
        (3, 2)
    """

    dataset: Dataset[Any]
    batch_size: int
    loader: DataLoader[Any]
    role: str
    structure: TreeSpec = _PLAIN
    reading: str = "rows"
    form: BatchForm = field(default_factory=BatchForm, compare=False)

    @classmethod
    def of(cls, loaders: Any, role: str, batch_size: int | None = None) -> DataSource:
        """Take the data set and the collation of a loader; its sampler is not used."""
        found, structure = single_loader(loaders, role)
        dataset: Any = OnePass(found.dataset, role) if isinstance(found.dataset, IterableDataset) else found.dataset
        name = type(found.dataset).__name__
        if not hasattr(dataset, "__len__"):
            raise TypeError(
                f"Expected the {role} data set to have a length, but {name} has no `__len__`. Scores have one row for "
                "each dataset[i]: let `__len__` return how many there are."
            )
        if len(dataset) == 0:
            raise ValueError(f"Expected the {role} data set to have samples, but {name} is empty.")
        reading = "rows"
        if found.batch_size is None and found.batch_sampler is None:
            streams = isinstance(found.dataset, IterableDataset)
            reading = "lists" if not streams and fetches_lists(found) else "items"
        if reading == "items":
            if batch_size is not None:
                raise ValueError(
                    f"Expected argument `batch_size` to be None, because the {role} DataLoader does not batch "
                    f"(batch_size=None): each dataset[i] of {name} is what one step takes, and so is one row, but got "
                    f"{batch_size}. To have a row for each sample inside, let the data set give one sample for each i, "
                    "and the DataLoader batch them (`DataLoader(dataset, batch_size=...)`)."
                )
            log.warning(
                "The %s DataLoader does not batch (batch_size=None): each of the %d items of %s is what one step "
                "takes, and so each is one row of the scores, run on its own.",
                role,
                len(dataset),
                name,
            )
            return cls(dataset, _ITEMS, found, role, structure, reading, BatchForm(apart=True))
        size = batch_size or batch_size_of(found, len(dataset))
        if size is None:
            sampler = type(found.batch_sampler).__name__
            raise ValueError(
                f"Expected the {role} DataLoader to have a batch size, but its batch sampler, {sampler}, has neither "
                "the attribute `batch_size` nor a length. Give it one of them."
            )
        if reading == "rows" and batched_reading(dataset):
            reading = "batches"
        return cls(dataset, size, found, role, structure, reading)

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # checked in `of`

    def wrapped_as(self, train: DataSource) -> DataSource:
        """Give targets the form of training batches, for the step that takes them is that of training.

        Returns the targets; their batches come in a collection such as ``{"a": batch}`` where those of training do, and
        only there: Lightning evaluates one loader after the other, in whatever collection they came.
        """
        return replace(self, structure=train.structure)

    def batches(self, rows: Sequence[int]) -> list[Sequence[int]]:
        """Cut rows into batches.

        Returns the rows of each batch, in order; the last may be short.
        """
        return [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]

    def collated(self, rows: Sequence[int], stream: str = "sample") -> Any:
        """Read samples and collate them, in this process, with the random view that featurizing will see."""
        with unchanged_data(self.dataset, self.loader.collate_fn):
            return self.collate(self.sample_reader(stream), list(rows))

    def read_whole(self, rows: Sequence[int], stream: str | None = "sample") -> Any:
        """Read samples and collate them as one batch of training, whether or not samples could be told apart there."""
        with unchanged_data(self.dataset, self.loader.collate_fn):
            whole = Collation(self.loader.collate_fn, self.structure, self.reading, apart=False)
            return whole(self.sample_reader(stream), list(rows))

    def sample_reader(self, stream: str | None = "sample") -> SampleReader:
        """Give what reads samples with random numbers of their own, or with None as training reads them."""
        return SampleReader(self.dataset, stream, self.loader.collate_fn, self.form.put_back)

    def example(self) -> Any:
        """Collate the first sample.

        Returns a batch of one, as training has it.
        """
        batch = self.collated([0])
        return batch[0] if isinstance(batch, SamplesApart) else batch

    def iterated(self, batches: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], Any]]:
        """Read batches through the ``__iter__`` of the loader's own class, which may change them.

        Yields ``(rows, batch)``.
        """
        singly = [[row] for rows in batches for row in rows] if self.form.apart else [list(rows) for rows in batches]
        found = iter(iterating_copy(self.loader, SeededSamples(self.sample_reader()), singly))
        for rows in batches:
            try:
                parts = list(islice(found, len(rows) if self.form.apart else 1))
            except Exception as error:
                if isinstance(error, AttributionError):
                    raise
                refuse_samples(self.dataset, rows, error, f"`__iter__` of {type(self.loader).__name__}")
            if len(parts) != (len(rows) if self.form.apart else 1):
                break
            batch = [tree_unflatten([part], self.structure) for part in parts]
            yield list(rows), SamplesApart(batch) if self.form.apart else batch[0]
        else:
            if next(found, None) is None:
                return
        raise TypeError(
            f"Expected `__iter__` of {type(self.loader).__name__} to give one batch for each of its batch sampler, but "
            f"it gives another number for {len(singly)}: no batch tells which rows it holds. Let `collate_fn` or "
            "`on_after_batch_transfer` do what it does."
        )

    @property
    def own_iteration(self) -> bool:
        """Whether the loader's class iterates in its own way, in which it may change batches."""
        kind = type(self.loader)
        known = kind.__module__.split(".")[0] in {"torch", "torchdata"}
        return not known and kind.__iter__ is not DataLoader.__iter__

    @property
    def collate(self) -> Collation:
        """The user's collation of samples."""
        return Collation(self.loader.collate_fn, self.structure, self.reading, self.form.apart)

    @property
    def description(self) -> str:
        """What makes the batches, in the user's own names."""
        own = self.loader.collate_fn
        name = getattr(own, "__qualname__", type(own).__qualname__)
        return f"`collate_fn` of the {self.role} DataLoader ({name})"

    @property
    def stacks(self) -> bool:
        """Whether samples are only stacked to a batch, so that any batch size costs the same padding: none."""
        return self.loader.collate_fn in {default_collate, default_convert} and self.reading == "rows"

    @property
    def indexes(self) -> bool:
        """Whether a batch is nothing but rows of tensors, which can be taken all at once."""
        dataset: Any = self.dataset
        while type(dataset) is Subset:
            dataset = dataset.dataset
        dense = type(dataset) is TensorDataset and all(values.layout is torch.strided for values in dataset.tensors)
        return dense and self.stacks and self.structure == _PLAIN and not self.form.apart

    def digest(self) -> str | None:
        """Hash a few samples across the data set, to tell another data set of equal length.

        Returns the hash, or None if reading a sample twice gives different values.
        """
        rows = sorted({0, len(self) // 3, 2 * len(self) // 3, len(self) - 1})
        with unchanged_data(self.dataset):
            once, twice = (sample_digest(map(self.reader(), rows)) for _ in range(2))
        return once if once == twice else None

    def reader(self) -> Callable[[int], Any]:
        """Give what reads single samples, as the collate function gets them.

        Returns ``row -> sample``; it draws from all random streams.
        """
        view = SampleReader(self.dataset)
        return (lambda row: view.fetched([row], self.reading)) if self.reading in {"lists", "batches"} else view.one


class OrderedLoader:
    """Yields ``(rows, batch)`` for the wanted rows.

    Every sample is read with all random streams seeded by its row, so that a random augmentation gives the same view
    for any batch size, number of workers and rank.

    Args:
        source: the data.
        batches: the rows of each batch.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> source = DataSource.of(DataLoader([3.0, 4.0, 5.0], batch_size=2, shuffle=True), "training")
        >>> for rows, batch in OrderedLoader(source, source.batches(range(3))):
        ...     print(rows, batch)
        [0, 1] tensor([3., 4.], dtype=torch.float64)
        [2] tensor([5.], dtype=torch.float64)
    """

    def __init__(self, source: DataSource, batches: Sequence[Sequence[int]]) -> None:
        self.source = source
        self.batches = [list(rows) for rows in batches]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[list[int], Any]]:
        given = self.source.loader
        if self.source.form.iterates:
            return self.source.iterated(self.batches)
        # Workers are worth their start-up only when each has several batches to prepare.
        workers = given.num_workers if len(self) > 2 * given.num_workers else 0
        indexes = self.source.indexes
        loader = DataLoader(
            _Indexed(self.source.dataset) if indexes else _Batches(self.source),
            batch_sampler=self.batches,
            collate_fn=_same,
            num_workers=workers,
            pin_memory=given.pin_memory,
            timeout=given.timeout if workers else 0,
            worker_init_fn=given.worker_init_fn,
            multiprocessing_context=given.multiprocessing_context if workers else None,
            prefetch_factor=given.prefetch_factor if workers else None,
            generator=torch.Generator(),  # else making an iterator draws from the global stream
        )
        return named_batches(iter(loader), self.source.dataset, self.batches, self.source.role, workers)


class _Batches(Dataset[Any]):
    """The batches of rows, collated, with the rows beside them."""

    def __init__(self, source: DataSource) -> None:
        self.rows = source.sample_reader()
        self.collate = source.collate

    def __getitems__(self, rows: list[int]) -> Any:
        try:
            return rows, self.collate(self.rows, rows)
        except Exception as error:
            return failed_batch(error)


class _Indexed(Dataset[Any]):
    """A data set of tensors, whose batches are indexed at once: nothing in it can be random."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitems__(self, rows: list[int]) -> Any:
        try:
            return rows, self._indexed(rows)
        except Exception as error:
            return failed_batch(error)

    def _indexed(self, rows: list[int]) -> list[torch.Tensor]:
        dataset: Any = self.dataset
        indices = rows
        while type(dataset) is Subset:
            dataset, indices = dataset.dataset, [int(dataset.indices[i]) for i in indices]
        index = torch.tensor(indices)
        return [values[index] for values in dataset.tensors]


def _same(batch: Any) -> Any:
    return batch
