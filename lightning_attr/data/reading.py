"""Reading samples and collating them, each under random seeds of its own: the same view for any batch and worker."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import TreeSpec, tree_unflatten
from torch.utils.data import Dataset

from lightning_attr.batches.samples_apart import SamplesApart
from lightning_attr.data.sample_errors import collated, first_failure, read_sample, refuse_samples
from lightning_attr.randomness.streams import hashed_seed
from lightning_attr.user_code.generators import find_generators, reseed_generator
from lightning_attr.user_code.kept_state import KeptState
from lightning_attr.user_code.reading_state import unchanged_data


class SampleReader:
    """Reads samples, with all random streams seeded by their rows.

    Args:
        dataset: a map-style data set.
        stream: of the random numbers; all that featurizing reads is of one. None leaves the streams alone: samples are
            read as training reads them.
        collate_fn: what samples go through next, whose own random generators are seeded as well.
        put_back: whether what reading changes is put back after each sample.

    Example:
        >>> SampleReader([3.0, 4.0]).one(1)
        4.0
    """

    def __init__(
        self, dataset: Any, stream: str | None = "sample", collate_fn: Any = None, put_back: bool = False
    ) -> None:
        self.dataset = dataset
        self.collate_fn = collate_fn
        self.stream = stream
        self.put_back = put_back
        self._generators: list[Any] | None = None
        self._state: KeptState | None = None

    def one(self, row: int) -> Any:
        """Read a sample."""
        self._seed(row)
        with self.kept():
            if not hasattr(self.dataset, "__getitems__"):
                return read_sample(self.dataset, row)
            try:
                return self.dataset.__getitems__([row])[0]  # what training calls, if there is one
            except Exception as error:
                refuse_samples(self.dataset, [row], error)

    def fetched(self, rows: list[int], reading: str) -> Any:
        """Read a whole batch from a data set that takes lists of rows, in the way of the loader."""
        self._seed(rows[0])
        try:
            with self.kept():
                return self._list(rows, reading)
        except Exception as error:
            found = first_failure(lambda i: self._list([rows[i]], reading), len(rows) if len(rows) > 1 else 0)
            if found is not None:
                refuse_samples(self.dataset, [rows[found[0]]], found[1])
            refuse_samples(self.dataset, rows, error)

    def _list(self, rows: list[int], reading: str) -> Any:
        return self.dataset.__getitems__(rows) if reading == "batches" else self.dataset[rows]

    def kept(self) -> AbstractContextManager[object]:
        """Put back what reading or collating changes, where that is to be."""
        if not self.put_back:
            return nullcontext()
        if self._state is None:  # in the process that reads
            self._state = KeptState({"dataset": self.dataset, "collate_fn": self.collate_fn}, set(), reading=True)
        return self._state.kept(by_value=True)

    def _seed(self, row: int) -> None:
        if self.stream is None:
            return
        if self._generators is None:  # found in the process that uses them, which may be a worker
            self._generators = find_generators([self.dataset, self.collate_fn])
        seed = hashed_seed(self.stream, row)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 - the legacy stream is what augmentations draw from
        torch.default_generator.manual_seed(seed)
        for generator in self._generators:
            reseed_generator(generator, seed)


class SeededSamples(Dataset[Any]):
    """A data set whose samples are read by a :class:`SampleReader`.

    Args:
        rows: reads them.

    Example:
        >>> SeededSamples(SampleReader([3.0, 4.0]))[0]
        3.0
    """

    def __init__(self, rows: SampleReader) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows.dataset)

    def __getitem__(self, row: int) -> Any:
        return self.rows.one(row)


class Collation:
    """The user's way from rows to a batch, in the structure that training has it.

    Args:
        collate_fn: the user's.
        structure: what a batch comes in.
        reading: "rows", "lists", "batches" or "items"; see :class:`lightning_attr.data.loader.DataSource`.
        apart: collate each sample on its own.

    Example:
        >>> from torch.utils._pytree import tree_flatten
        >>> Collation(torch.tensor, tree_flatten(["batch"])[1], "rows", apart=False)(SampleReader([3.0, 4.0]), [0, 1])
        [tensor([3., 4.])]
    """

    def __init__(self, collate_fn: Callable[[Any], Any], structure: TreeSpec, reading: str, apart: bool) -> None:
        self.collate_fn = collate_fn
        self.structure = structure
        self.reading = reading
        self.apart = apart

    def __call__(self, view: SampleReader, rows: list[int]) -> Any:
        """Read rows and collate them."""
        if self.apart:
            return SamplesApart(self._batch(view, [row]) for row in rows)
        return self._batch(view, rows)

    def _batch(self, view: SampleReader, rows: list[int]) -> Any:
        lists = self.reading in {"lists", "batches"}
        samples = view.fetched(rows, self.reading) if lists else [view.one(row) for row in rows]
        with view.kept():
            batch = collated(self.collate_fn, samples, rows, view.dataset, self.reading)
        return tree_unflatten([batch], self.structure)


def batched_reading(dataset: Any) -> bool:
    """Say whether ``__getitems__`` of a data set gives a whole batch in place of a list of samples.

    Example:
        >>> batched_reading([3.0])
        False
    """
    if not hasattr(dataset, "__getitems__") or type(dataset).__module__.startswith("torch."):
        return False
    with unchanged_data(dataset):
        found = SampleReader(dataset).fetched([0], "batches")
    return not (isinstance(found, list) and len(found) == 1)
