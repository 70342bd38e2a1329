"""The score matrix: training samples by targets."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightning_attr.arguments.checks import check_instance, check_int, check_path, check_tensor
from lightning_attr.arguments.messages import argument_message
from lightning_attr.errors import AttributionError, CorruptedStoreError
from lightning_attr.metrics import functional
from lightning_attr.results.columns import check_column
from lightning_attr.results.frames import data_frame
from lightning_attr.results.saved_scores import REMEDY, load_scores, save_scores

if TYPE_CHECKING:
    import pandas as pd

_IN_MEMORY = 2**30
"""Bytes up to which scores are kept in memory; larger ones live in a memory-mapped file."""
_BLOCK_ELEMENTS = 2**24
"""Scores read at once: 64 MiB."""


@dataclass(frozen=True)
class ScoreMatrix:
    """Scores of every training sample (rows) for every target (columns).

    ``values[i, j]`` estimates how much the model output of target ``j`` would fall without training sample ``i``, in
    units of the model output; positive scores are proponents. Row ``i`` is ``dataset[train_indices[i]]``.

    Args:
        values: ``(n_train, n_target)``, float32, mapped from a file when large.
        train_indices: ``(n_train,)``, int64: indices into the training data set.
        target_indices: ``(n_target,)``, int64: indices into the target data set.
        provenance: method, its arguments and snapshots, as plain values.
        trained_on: ``(n_train,)``, bool: False for samples that training never drew. Their scores are zero, and they
            are neither proponents nor opponents. None where nothing says that there are any.
        target_slopes: ``(n_target,)``, float32: how fast the loss of each target falls as its model output rises, at
            the last snapshot. None where nothing says: ones.

    Raises:
        TypeError: if an argument holds numbers of another kind.
        ValueError: if the shapes do not fit.

    Example:
        >>> import torch
        >>> scores = ScoreMatrix(torch.tensor([[1.0, -2.0], [3.0, 4.0], [2.0, 0.0]]))
        >>> scores.topk(2)
        (tensor([[1, 2],
                [1, 2]]), tensor([[3., 2.],
                [4., 0.]]))
        >>> scores.bottomk(1)[0].flatten()
        tensor([0, 0])
    """

    values: Tensor
    train_indices: Tensor = field(default=None)  # type: ignore[assignment]  # filled in below
    target_indices: Tensor = field(default=None)  # type: ignore[assignment]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    trained_on: Tensor | None = None
    target_slopes: Tensor | None = None

    def __post_init__(self) -> None:
        check_tensor(self, "values", self.values, "(n_train, n_target)", [2])
        if self.values.dtype == torch.bool:
            raise TypeError(argument_message(self, "values", "a tensor of numbers", self.values))
        check_instance(self, "provenance", self.provenance, Mapping, "a mapping of plain values")
        n_train, n_target = self.values.shape
        for name, size in (("train_indices", n_train), ("target_indices", n_target)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, torch.arange(size))
            check_column(self, name, size, "int")
        check_column(self, "trained_on", n_train, "bool")
        check_column(self, "target_slopes", n_target, "float")

    @property
    def shape(self) -> tuple[int, int]:
        """``(n_train, n_target)``."""
        return self.values.shape[0], self.values.shape[1]

    @property
    def depth(self) -> int:
        """Proponents and opponents that each target has at most."""
        return self.values.shape[0]

    @property
    def data_value(self) -> Tensor:
        r"""What each training sample is worth to the targets, ``(n_train,)``, positive for helpful samples.

        .. math:: v_i = \frac1m \sum_j q_j S_{ij}, \qquad q_j = -\partial \ell_j / \partial f_j

        To first order that is how much the mean loss of the targets would rise without sample ``i``, in units of the
        loss. The slopes ``q`` leave out the targets that are safe: their output may fall far before anything is lost.
        Without :attr:`target_slopes` it is the mean score, in units of the model output.
        """
        m = self.values.shape[1]
        slopes = torch.ones(m) if self.target_slopes is None else self.target_slopes
        means = [values @ slopes.double() / m for _, values in functional.score_blocks(self.values)]
        return torch.cat(means).to(self.values.dtype)

    @property
    def effective_proponents(self) -> float:
        """Effective number of proponents, see :func:`lightning_attr.metrics.effective_proponents`."""
        return float(functional.effective_proponents(self.values))

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """Find the strongest proponents of each target.

        Args:
            k: how many.

        Returns:
            Indices into the training data set and scores, each ``(n_target, k)``, strongest first.
        """
        return self._extreme(k, largest=True)

    def bottomk(self, k: int) -> tuple[Tensor, Tensor]:
        """Find the strongest opponents of each target.

        Args:
            k: how many.

        Returns:
            Indices into the training data set and scores, each ``(n_target, k)``, most negative first.
        """
        return self._extreme(k, largest=False)

    def row_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Read the values in blocks of rows that fit into memory.

        Yields:
            ``(rows, values[rows])``.
        """
        yield from _row_blocks(self.values)

    def to_numpy(self) -> np.ndarray:
        """Give the values to numpy.

        Returns:
            ``(n_train, n_target)``, sharing memory (or the mapped file) with ``values``.
        """
        return self.values.numpy()

    def to_pandas(self) -> pd.DataFrame:
        """Give the values to pandas.

        Returns:
            A row a training sample, a column a target, labelled ``train_indices`` and ``target_indices``.

        Raises:
            MissingDependencyError: if pandas is not installed.
        """
        rows, columns = self.train_indices.numpy(), self.target_indices.numpy()
        return data_frame(self.to_numpy(), ("train_index", rows), ("target_index", columns))

    def save(self, path: str | Path) -> None:
        """Write ``scores.safetensors`` and ``scores.json`` into a directory.

        Args:
            path: the directory; made if it is not there.
        """
        folder = check_path("ScoreMatrix.save", "path", path)
        tensors = {"values": self.values, "train_indices": self.train_indices, "target_indices": self.target_indices}
        beside = {"trained_on": self.trained_on, "target_slopes": self.target_slopes}
        tensors |= {name: values for name, values in beside.items() if values is not None}
        save_scores(folder, "matrix", tensors, self.provenance)

    @classmethod
    def load(cls, path: str | Path) -> ScoreMatrix:
        """Read what :meth:`save` wrote.

        Args:
            path: the directory.

        Returns:
            The scores, mapped from the file.

        Raises:
            CorruptedStoreError: if a file is missing, damaged, or of other scores.
        """
        folder = check_path("ScoreMatrix.load", "path", path)
        expected = {"values": (2, True), "train_indices": (1, False), "target_indices": (1, False)}
        beside = {"trained_on": (1, False), "target_slopes": (1, True)}
        tensors, provenance = load_scores(folder, "matrix", {**expected, **beside}, optional=frozenset(beside))
        try:
            return cls(**tensors, provenance=provenance)
        except (ValueError, TypeError) as error:
            raise CorruptedStoreError(f"{path} is damaged: {error} {REMEDY}") from error

    def _extreme(self, k: int, largest: bool) -> tuple[Tensor, Tensor]:
        count = self.shape[0] if self.trained_on is None else int(self.trained_on.sum())
        remedy = f"There are {count} training samples{'' if self.trained_on is None else ' that training drew'}."
        k = check_int("ScoreMatrix.topk" if largest else "ScoreMatrix.bottomk", "k", k, 1, count, remedy=remedy)
        best: Tensor | None = None
        rows: Tensor | None = None
        for block, values in self.row_blocks():
            index = torch.arange(block.start, block.stop)[:, None].expand(-1, values.shape[1])
            if self.trained_on is not None:
                left_out = ~self.trained_on[block, None]
                values = values.masked_fill(left_out, -torch.inf if largest else torch.inf)
            values = values if best is None else torch.cat([best, values])
            index = index if rows is None else torch.cat([rows, index])
            best, order = values.topk(min(k, len(values)), dim=0, largest=largest)
            rows = index.gather(0, order)
        assert best is not None  # k >= 1 means at least one row
        assert rows is not None
        return self.train_indices[rows].T, best.T


def _row_blocks(values: Tensor) -> Iterator[tuple[slice, Tensor]]:
    step = max(1, _BLOCK_ELEMENTS // max(1, values.shape[1]))
    for start in range(0, len(values), step):
        rows = slice(start, min(start + step, len(values)))
        yield rows, values[rows]


def zeros(n: int, m: int, folder: Callable[[], Path], dtype: torch.dtype = torch.float32) -> Tensor:
    """Make room for scores, in memory or, when large, in a file.

    Returns zeros ``(n, m)``.
    """
    size = n * m * dtype.itemsize
    if size <= _IN_MEMORY:
        return torch.zeros(n, m, dtype=dtype)
    place = folder()
    place.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(place).free
    if size > free:  # found out here: a write to mapped memory that has no place on the disk kills the process
        raise AttributionError(
            f"The scores of {n:,} training samples for {m:,} targets need {size:,} bytes, but {place} has {free:,} "
            "free. Make room, set the environment variable TMPDIR to a larger disk, or attribute fewer targets."
        )
    handle, file = tempfile.mkstemp(".bin", "scores-", place)  # each process its own
    os.close(handle)
    return torch.from_file(file, shared=True, size=n * m, dtype=dtype).view(n, m)
