"""Batches in data set order, with their row numbers: row ``i`` is ``dataset[i]``, however training shuffles."""

from __future__ import annotations

import hashlib
import pickle
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    default_collate,
    default_convert,
)

from lightning_attr.batch import dense_parts
from lightning_attr.isolation import find_generators, preserved_rng, reseed_generator
from lightning_attr.randomness import hashed_seed

__all__ = ["DataSource", "OrderedLoader"]


@dataclass(frozen=True)
class DataSource:
    """A map-style data set and the way its samples become batches, taken from a user's loader.

    Args:
        dataset: the data set; ``dataset[i]`` is row ``i``.
        batch_size: samples a batch.
        loader: the user's loader, for its ``collate_fn``, workers and pinning.
        role: what it is called in messages, "training" or "target".

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

    @classmethod
    def of(cls, loaders: Any, role: str, batch_size: int | None = None) -> DataSource:
        """Take the data set and the collation of a loader; its sampler is not used.

        Args:
            loaders: a ``DataLoader``, or a list or dict that holds just one.
            role: "training" or "target".
            batch_size: samples a batch; by default the loader's.

        Returns:
            The source.

        Raises:
            TypeError: if it is no DataLoader, holds several, or its data set is iterable-style.
            ValueError: if the data set is empty, or the loader does not batch.
        """
        found = list(loaders.values()) if isinstance(loaders, dict) else loaders
        if isinstance(found, (list, tuple)) and len(found) == 1:
            found = found[0]
        if not isinstance(found, DataLoader):
            what = f"{len(found)} loaders" if isinstance(found, (list, tuple)) else type(found).__name__
            raise TypeError(
                f"Expected one torch DataLoader for the {role} data, but got {what}. Scores have one row for each "
                "dataset[i]: pass one DataLoader over one map-style data set (torch.utils.data.ConcatDataset joins "
                "several)."
            )
        if isinstance(found.dataset, IterableDataset):
            raise TypeError(
                f"Expected a map-style data set for the {role} data, but {type(found.dataset).__name__} is an "
                "IterableDataset: its samples have no index, so that no score could be traced back to them. Wrap it in "
                "a Dataset with __getitem__(i) and __len__()."
            )
        if len(found.dataset) == 0:  # type: ignore[arg-type]  # map-style data sets are sized
            raise ValueError(
                f"Expected the {role} data set to have samples, but {type(found.dataset).__name__} is empty."
            )
        size = batch_size or found.batch_size or getattr(found.batch_sampler, "batch_size", None)
        if size is None:
            raise ValueError(
                f"Expected the {role} DataLoader to have a batch size, but it has none (batch_size=None, or a batch "
                "sampler without the attribute `batch_size`). Pass `batch_size` to AttributionCallback, or give the "
                "loader one."
            )
        return cls(found.dataset, size, found, role)

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # checked in `of`

    def batches(self, rows: Sequence[int]) -> list[Sequence[int]]:
        """Cut rows into batches.

        Args:
            rows: row numbers.

        Returns:
            The rows of each batch, in order; the last may be short.
        """
        return [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]

    def first(self, count: int) -> tuple[list[int], Any]:
        """Collate the first samples, with the random view that featurizing will see.

        Args:
            count: how many at most.

        Returns:
            ``(rows, batch)``.
        """
        rows = list(range(min(count, len(self))))
        with preserved_rng(self.dataset):
            return self.collate([_Rows(self.dataset)[row] for row in rows])

    @property
    def collate(self) -> _Collate:
        """The user's collation, for samples with their rows."""
        own = self.loader.collate_fn
        # A loader with batch_size=None converts samples and joins none.
        return _Collate(default_collate if own is default_convert else own)

    @property
    def stacks(self) -> bool:
        """Whether samples are only stacked to a batch, so that any batch size costs the same padding: none."""
        return self.loader.collate_fn in {default_collate, default_convert}

    @property
    def indexes(self) -> bool:
        """Whether a batch is nothing but rows of tensors, which can be taken all at once."""
        dataset: Any = self.dataset
        while type(dataset) is Subset:
            dataset = dataset.dataset
        dense = type(dataset) is TensorDataset and all(values.layout is torch.strided for values in dataset.tensors)
        return dense and self.stacks

    def digest(self) -> str | None:
        """Hash a few samples across the data set, to tell another data set of equal length.

        Returns:
            The hash, or None if reading a sample twice gives different values.
        """
        rows = sorted({0, len(self) // 3, 2 * len(self) // 3, len(self) - 1})
        with preserved_rng(self.dataset):
            once, twice = (self._hash(rows) for _ in range(2))
        return once if once == twice else None

    def _hash(self, rows: Sequence[int]) -> str:
        view = _Rows(self.dataset)
        digest = hashlib.sha256()
        for row in rows:
            _update(digest.update, view[row][1])
        return digest.hexdigest()[:16]


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
        # Workers are worth their start-up only when each has several batches to prepare.
        workers = given.num_workers if len(self) > 2 * given.num_workers else 0
        indexes = self.source.indexes
        loader = DataLoader(
            _Indexed(self.source.dataset) if indexes else _Rows(self.source.dataset),
            batch_sampler=self.batches,
            collate_fn=_same if indexes else self.source.collate,
            num_workers=workers,
            pin_memory=given.pin_memory,
            timeout=given.timeout if workers else 0,
            worker_init_fn=given.worker_init_fn,
            multiprocessing_context=given.multiprocessing_context if workers else None,
            prefetch_factor=given.prefetch_factor if workers else None,
            generator=torch.Generator(),  # else making an iterator draws from the global stream
        )
        return iter(loader)


class _Rows(Dataset[Any]):
    """The data set with each sample's row beside it, read under seeds of its own."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset
        self.generators: list[Any] | None = None

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # checked by DataSource.of

    def __getitem__(self, row: int) -> tuple[int, Any]:
        if self.generators is None:  # found in the process that uses them, which may be a worker
            self.generators = find_generators(self.dataset)
        seed = hashed_seed("sample", row)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 - the legacy stream is what augmentations draw from
        torch.default_generator.manual_seed(seed)
        for generator in self.generators:
            reseed_generator(generator, seed)
        return row, self.dataset[row]


class _Indexed(Dataset[Any]):
    """A data set of tensors, whose batches are indexed at once: nothing in it can be random."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitems__(self, rows: list[int]) -> tuple[list[int], list[torch.Tensor]]:
        dataset: Any = self.dataset
        indices = rows
        while type(dataset) is Subset:
            dataset, indices = dataset.dataset, [int(dataset.indices[i]) for i in indices]
        index = torch.tensor(indices)
        return rows, [values[index] for values in dataset.tensors]


def _same(batch: Any) -> Any:
    return batch


class _Collate:
    """The user's collation, with the rows beside it."""

    def __init__(self, collate_fn: Callable[[list[Any]], Any]) -> None:
        self.collate_fn = collate_fn

    def __call__(self, items: list[tuple[int, Any]]) -> tuple[list[int], Any]:
        return [row for row, _ in items], self.collate_fn([sample for _, sample in items])


def _update(update: Callable[[bytes], None], sample: Any) -> None:
    """Feed the content of a sample to a hash: bytes of arrays, pickles of anything else, where it has one."""
    if isinstance(sample, torch.Tensor) and sample.layout != torch.strided:
        _update(update, dense_parts(sample.detach()))
    elif isinstance(sample, torch.Tensor):
        sample = sample.detach().cpu()
        update(str((sample.dtype, tuple(sample.shape))).encode())
        update(sample.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if sample.numel() else b"")
    elif isinstance(sample, dict):
        for key, value in sample.items():
            update(str(key).encode())
            _update(update, value)
    elif isinstance(sample, (list, tuple)):
        for value in sample:
            _update(update, value)
    elif isinstance(sample, (np.ndarray, np.generic)) and not sample.dtype.hasobject:
        update(str((sample.dtype.str, sample.shape)).encode())
        update(sample.tobytes())
    else:
        try:
            update(pickle.dumps(sample, protocol=4))
        except Exception:  # whatever its own hooks raise; samples need not be picklable
            update(type(sample).__qualname__.encode())
