"""The user's training loader, over a subset of its data set."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
)


class SubsetShuffle(RandomSampler):
    """Shuffles the whole data set, then passes over what is not in the subset.

    That is a uniform shuffle of the subset; and two subsets that differ by one sample come in the same order from the
    same seed, which makes the difference between their trainings less noisy.

    Args:
        subset: the subset.
        generator: as for ``RandomSampler``; by default seeded from torch's global stream.

    Example:
        >>> few, fewer = Subset(range(6), [0, 1, 2, 4, 5]), Subset(range(6), [0, 1, 4, 5])
        >>> orders = []
        >>> for subset in (few, fewer):
        ...     orders.append([subset[i] for i in SubsetShuffle(subset, torch.Generator().manual_seed(0))])
        >>> [i for i in orders[0] if i != 2] == orders[1]
        True
    """

    def __init__(self, subset: Subset[Any], generator: torch.Generator | None = None) -> None:
        super().__init__(subset, generator=generator)
        self.subset = subset

    def __iter__(self) -> Iterator[int]:
        generator = self.generator
        if generator is None:
            generator = torch.Generator().manual_seed(int(torch.empty((), dtype=torch.int64).random_().item()))
        n_train = len(self.subset.dataset)  # type: ignore[arg-type]  # map-style, as DataSource.of has checked
        position = torch.full((n_train,), -1)
        position[torch.tensor(self.subset.indices)] = torch.arange(len(self.subset))
        order = position[torch.randperm(n_train, generator=generator)]
        yield from order[order >= 0].tolist()


def subset_loader(loader: DataLoader[Any], kept: Tensor) -> DataLoader[Any]:
    """Repeat a loader over some samples of its data set: same batch size, shuffling, collation and workers.

    Shapes: kept (n_train,). Returns the loader of the subset.
    """
    if isinstance(loader.dataset, IterableDataset):
        raise TypeError(
            f"Expected a map-style data set for the training data, but {type(loader.dataset).__name__} is an "
            "IterableDataset: retraining leaves samples out by their index. Wrap it in a Dataset with __getitem__(i) "
            "and __len__()."
        )
    subset: Subset[Any] = Subset(loader.dataset, kept.nonzero().flatten().tolist())
    batches = loader.batch_sampler
    if type(batches) is not BatchSampler:
        raise TypeError(_custom("batch sampler", batches))
    sampler = _sampler(batches.sampler, subset)
    # A copy keeps what subclasses add, such as a collation; DataLoader itself forbids assigning these attributes.
    found = copy.copy(loader)
    vars(found).update(
        dataset=subset,
        sampler=sampler,
        batch_sampler=BatchSampler(sampler, batches.batch_size, batches.drop_last),
        _iterator=None,  # persistent workers of the original have the whole data set
    )
    return found


def _sampler(sampler: Any, subset: Subset[Any]) -> Sampler[int]:
    every = len(subset.dataset)  # type: ignore[arg-type]  # map-style
    plain = type(sampler) in {SequentialSampler, RandomSampler}
    if not plain or len(sampler.data_source) != every:  # one of a part of the data set is a selection by index
        raise TypeError(_custom("sampler", sampler))
    if type(sampler) is SequentialSampler:
        return SequentialSampler(subset)
    if sampler.num_samples == every and not sampler.replacement:
        return SubsetShuffle(subset, sampler.generator)
    count = None if sampler.num_samples == every else sampler.num_samples  # the user's own number of draws stays
    return RandomSampler(subset, sampler.replacement, count, sampler.generator)


def _custom(kind: str, found: object) -> str:
    return (
        f"Expected the training DataLoader to read its data set in order or shuffled, but its {kind} is a "
        f"{type(found).__name__}, whose indices are those of the whole data set: on a subset they would name other "
        "samples. Return a DataLoader with `batch_size`, `shuffle` and `drop_last` from `train_dataloader`; select "
        "samples through the data set (torch.utils.data.Subset) and weight them in the loss."
    )
