"""Loaders of every form: what of them is the data set, what a batch, and what has no rows at all."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_flatten
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data.dataloader import _BaseDataLoaderIter

from lightning_attr.data.sample_digest import sample_digest
from lightning_attr.data.sample_errors import stream_samples
from lightning_attr.user_code.reading_state import unchanged_data

_MOST_SAMPLES, _MOST_BYTES, _MOST_SECONDS = 1_000_000, 2**30, 60.0
"""How much of a stream is read to see that its passes repeat."""


def single_loader(loaders: Any, role: str) -> tuple[DataLoader[Any], TreeSpec]:
    """Find the one loader in what Lightning takes, and how its batches are wrapped.

    Returns the loader, and the structure that batches come in.

    Example:
        >>> loader, spec = single_loader({"a": DataLoader([1.0])}, "training")
        >>> torch.utils._pytree.tree_unflatten(["batch"], spec)
        {'a': 'batch'}
    """
    given = getattr(loaders, "iterables", loaders)
    found, spec = tree_flatten(given)
    if len(found) == 1 and isinstance(found[0], DataLoader):
        return found[0], spec
    if found and all(isinstance(loader, DataLoader) for loader in found):
        keys = f" ({', '.join(map(repr, given))})" if isinstance(given, dict) else ""
        raise TypeError(
            f"Expected one torch DataLoader for the {role} data, but got {len(found)} loaders{keys}: a step that takes "
            "a batch of each has no one sample dataset[i] behind it, and scores have one row for each dataset[i]. Pass "
            "one DataLoader: over torch.utils.data.ConcatDataset where each sample is its own, or over a Dataset whose "
            "item i holds one sample of each where they belong together."
        )
    what = f"{len(found)} loaders" if isinstance(given, (list, tuple, dict)) else type(given).__name__
    raise TypeError(
        f"Expected one torch DataLoader for the {role} data, but got {what}. Scores have one row for each "
        "dataset[i]: pass one DataLoader over one map-style data set (torch.utils.data.ConcatDataset joins several)."
    )


def fetches_lists(loader: DataLoader[Any]) -> bool:
    """Say whether training asks the data set for lists of rows, and gets whole batches.

    Example:
        >>> sampler = BatchSampler(SequentialSampler(range(4)), 2, drop_last=False)
        >>> fetches_lists(DataLoader(range(4), batch_size=None, sampler=sampler))
        True
    """
    sampler = loader.sampler
    if isinstance(sampler, BatchSampler):
        return True
    if isinstance(sampler, (SequentialSampler, RandomSampler)):
        return False
    with unchanged_data(sampler):
        first = next(iter(copy.copy(sampler)), None)
    return isinstance(first, (list, tuple)) or (isinstance(first, torch.Tensor) and first.ndim > 0)


def batch_size_of(loader: DataLoader[Any], rows: int) -> int | None:
    """Find how many samples the batches of a loader have.

    Returns the number; the mean of those of a batch sampler that does not say; None where nothing tells.

    Example:
        >>> batch_size_of(DataLoader(range(7), batch_sampler=[[0, 1], [2, 3, 4], [5, 6]]), 7)
        3
    """
    sampler: Any = loader.batch_sampler if loader.batch_sampler is not None else loader.sampler
    size = loader.batch_size or getattr(sampler, "batch_size", None)
    if isinstance(size, int) and size > 0:
        return size
    return -(-rows // len(sampler)) if isinstance(sampler, Sized) and 0 < len(sampler) <= rows else None


def iterating_copy(loader: DataLoader[Any], dataset: Dataset[Any], batches: list[list[int]]) -> DataLoader[Any]:
    """Copy a loader of a class of its own, to iterate over other batches in this process.

    Returns the copy. Iterators over its batches that the user's class keeps are made anew.

    Example:
        >>> list(iterating_copy(DataLoader([3.0, 4.0, 5.0]), [3.0, 4.0, 5.0], [[2], [0, 1]]))
        [tensor([5.], dtype=torch.float64), tensor([3., 4.], dtype=torch.float64)]
    """
    own = copy.copy(loader)
    # A DataLoader that was made refuses to have these set.
    vars(own).update(dataset=dataset, batch_sampler=_GivenBatches(batches), num_workers=0, persistent_workers=False)
    vars(own).update(_iterator=None, generator=torch.Generator(), prefetch_factor=None)
    kept = [name for name, value in vars(own).items() if isinstance(value, _BaseDataLoaderIter)]
    vars(own).update({name: DataLoader.__iter__(own) for name in kept})
    return own


class _GivenBatches(list[list[int]]):
    """In the place of a batch sampler; some classes ask that for its own sampler."""

    @property
    def sampler(self) -> list[list[int]]:
        return self


class OnePass(Dataset[Any]):
    """The samples of an iterable-style data set in the order of a pass, kept in memory; every pass must be the same.

    Args:
        dataset: the data set; it is iterated twice, in this process.
        role: "training" or "target".

    Raises:
        TypeError: if two passes differ, or if it is too long to be kept.

    Example:
        >>> class Stream(IterableDataset):
        ...     def __iter__(self):
        ...         return iter([3.0, 4.0])
        >>> stream = OnePass(Stream(), "training")
        >>> len(stream), stream[1]
        (2, 4.0)
    """

    def __init__(self, dataset: IterableDataset[Any], role: str) -> None:
        self.kind = type(dataset).__name__
        self._samples: list[Any] = []
        with unchanged_data(dataset):
            self._samples.extend(self._bounded(dataset, role))
            again = [sample_digest([sample]) for sample in self._bounded(dataset, role)]
        if again != [sample_digest([sample]) for sample in self._samples]:
            raise TypeError(
                f"Expected the {role} data set to give the same samples in every pass, but two passes over "
                f"{self.kind}, an IterableDataset, differ: its samples have no index, so that no score could be traced "
                "back to them. Wrap it in a Dataset with __getitem__(i) and __len__(), or let every pass begin anew "
                "with the same seed."
            )

    def _bounded(self, dataset: IterableDataset[Any], role: str) -> Iterator[Any]:
        size, start = 0, time.monotonic()
        for number, sample in enumerate(stream_samples(dataset, role)):
            size += _bytes(sample)
            if number >= _MOST_SAMPLES or size > _MOST_BYTES or time.monotonic() - start > _MOST_SECONDS:
                raise TypeError(
                    f"Expected the {role} data set to be one whose passes can be compared, but {self.kind}, an "
                    f"IterableDataset, has not ended after {number:,} samples ({size / 2**20:,.0f} MiB, "
                    f"{time.monotonic() - start:.0f} s): it is endless, or too large to be kept in memory. Wrap it in "
                    "a Dataset with __getitem__(i) and __len__()."
                )
            yield sample

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, row: int) -> Any:
        return self._samples[row]


def _bytes(sample: Any) -> int:
    found, _ = tree_flatten(sample)
    return sum(int(getattr(leaf, "nbytes", 64)) for leaf in found)
