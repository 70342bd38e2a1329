"""The strongest scores of each target, where the whole score matrix would be too large to keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_attr.arguments.checks import check_int, check_path
from lightning_attr.errors import AttributionError, CorruptedStoreError
from lightning_attr.metrics.checks import check_finite
from lightning_attr.metrics.functional import participation, positive_sums
from lightning_attr.results.saved_scores import REMEDY, load_scores, save_scores

SAVED = {
    **dict.fromkeys(("proponents", "opponents"), (2, False)),
    **dict.fromkeys(("proponent_scores", "opponent_scores"), (2, True)),
    **dict.fromkeys(("train_indices", "target_indices"), (1, False)),
    "data_value": (1, True),
    "effective_proponents": (0, True),
}
"""Dimensions of each saved tensor, and whether it holds floating-point numbers."""


def check_topk(topk: Any, n_train: int) -> int | None:
    """Check how many scores a target keeps.

    Returns the number as Python's int, or None.
    """
    if topk is None:
        return None
    remedy = f"There are {n_train} training samples."
    return check_int("attribute", "topk", topk, 1, n_train, "None for all scores", remedy)


@dataclass(frozen=True)
class TopScores:
    """The strongest proponents and opponents of each target, without the other scores.

    What :class:`lightning_attr.ScoreMatrix` answers for the extremes, this answers too; what needs every score,
    ``values``, is an error.

    Args:
        proponents: ``(n_target, k)``, int64: rows of the highest scores, strongest first.
        proponent_scores: ``(n_target, k)``, float32, descending.
        opponents: ``(n_target, k)``, int64: rows of the lowest scores, most negative first.
        opponent_scores: ``(n_target, k)``, float32, ascending.
        data_value: ``(n_train,)``, float32: what each training sample is worth to the targets, see
            :attr:`lightning_attr.ScoreMatrix.data_value`.
        effective_proponents: of all scores, see :func:`lightning_attr.metrics.effective_proponents`.
        train_indices: ``(n_train,)``, int64: indices into the training data set.
        target_indices: ``(n_target,)``, int64: indices into the target data set.
        provenance: method, its arguments and snapshots, as plain values.

    Example:
        >>> import torch
        >>> found = TopScoresSum(n_train=3, n_target=2, k=2)
        >>> found.add(range(3), slice(0, 2), torch.tensor([[1.0, -2.0], [3.0, 4.0], [2.0, 0.0]]))
        >>> scores = found.total()
        >>> scores.topk(2)
        (tensor([[1, 2],
                [1, 2]]), tensor([[3., 2.],
                [4., 0.]]))
        >>> scores.shape, scores.data_value
        ((3, 2), tensor([-0.5000,  3.5000,  1.0000]))
    """

    proponents: Tensor
    proponent_scores: Tensor
    opponents: Tensor
    opponent_scores: Tensor
    data_value: Tensor
    effective_proponents: float
    train_indices: Tensor = field(default=None)  # type: ignore[assignment]  # filled in below
    target_indices: Tensor = field(default=None)  # type: ignore[assignment]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, size in zip(("train_indices", "target_indices"), self.shape, strict=True):
            if getattr(self, name) is None:
                object.__setattr__(self, name, torch.arange(size))

    @property
    def shape(self) -> tuple[int, int]:
        """``(n_train, n_target)``, of all scores."""
        return len(self.data_value), len(self.proponents)

    @property
    def depth(self) -> int:
        """Proponents and opponents that each target has at most."""
        return self.proponents.shape[1]

    @property
    def values(self) -> Tensor:
        """Not there.

        Raises:
            AttributionError: always.
        """
        k, (n, m) = self.proponents.shape[1], self.shape
        raise AttributionError(
            f"This result was computed with `topk={k}`: it has the {k} strongest proponents and opponents of each "
            f"target (`topk`, `bottomk`), and no matrix of {n:,} x {m:,} scores. Attribute without `topk` to get one."
        )

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """Find the strongest proponents of each target.

        Args:
            k: how many, at most as many as were kept.

        Returns:
            Indices into the training data set and scores, each ``(n_target, k)``, strongest first.
        """
        return self._first(k, self.proponents, self.proponent_scores)

    def bottomk(self, k: int) -> tuple[Tensor, Tensor]:
        """Find the strongest opponents of each target.

        Args:
            k: how many, at most as many as were kept.

        Returns:
            Indices into the training data set and scores, each ``(n_target, k)``, most negative first.
        """
        return self._first(k, self.opponents, self.opponent_scores)

    def save(self, path: str | Path) -> None:
        """Write ``top_scores.safetensors`` and ``scores.json`` into a directory.

        Args:
            path: the directory; made if it is not there.
        """
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        tensors["effective_proponents"] = torch.tensor(self.effective_proponents, dtype=torch.float64)
        save_scores(check_path("TopScores.save", "path", path), "top", tensors, self.provenance)

    @classmethod
    def load(cls, path: str | Path) -> TopScores:
        """Read what :meth:`save` wrote.

        Args:
            path: the directory.

        Returns:
            The scores.

        Raises:
            CorruptedStoreError: if a file is missing, damaged, or of other scores.
        """
        tensors, provenance = load_scores(check_path("TopScores.load", "path", path), "top", SAVED)
        effective = tensors.pop("effective_proponents").item()
        found = cls(**tensors, effective_proponents=effective, provenance=provenance)
        found.check_fit(path)
        return found

    def check_fit(self, path: str | Path) -> None:
        """Refuse what was read from a file where shapes and rows do not fit together.

        Args:
            path: where it was.

        Raises:
            CorruptedStoreError: if they do not.
        """
        (n, m), shape = self.shape, self.proponents.shape
        beside = self.proponent_scores, self.opponents, self.opponent_scores
        fits = (self.train_indices.shape, self.target_indices.shape) == ((n,), (m,))
        fits = fits and all(tensor.shape == shape for tensor in beside)
        if not fits or any(((rows < 0) | (rows >= n)).any() for rows in (self.proponents, self.opponents)):
            raise CorruptedStoreError(f"{path} is damaged: shapes or rows of the scores do not fit together. {REMEDY}")

    def _first(self, k: int, rows: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        k = check_int(self, "k", k, 1, rows.shape[1], remedy="It is at most the `topk` of this result.")
        return self.train_indices[rows[:, :k]], scores[:, :k]


class TopScoresSum:
    """Adds up :class:`TopScores` from blocks of scores, in any order, never holding more than one.

    Args:
        n_train: training samples.
        n_target: targets.
        k: scores kept of each target, at either end.
        slopes: ``(n_target,)``: how fast each target's loss falls as its model output rises; None for ones.

    Example:
        >>> found = TopScoresSum(n_train=4, n_target=1, k=1)
        >>> for start in (0, 2):
        ...     found.add(range(start, start + 2), slice(0, 1), torch.tensor([[1.0], [2.0]]) * (start + 1))
        >>> found.total().topk(1)
        (tensor([[3]]), tensor([[6.]]))
    """

    def __init__(self, n_train: int, n_target: int, k: int, slopes: Tensor | None = None) -> None:
        self.slopes = torch.ones(n_target, dtype=torch.float64) if slopes is None else slopes.double()
        self.ends = (_Extremes(n_target, k, largest=True), _Extremes(n_target, k, largest=False))
        self.sums = torch.zeros(n_train, dtype=torch.float64)
        self.positive = torch.zeros(2, n_target, dtype=torch.float64)

    def add(self, rows: range, targets: slice, scores: Tensor, left_out: Tensor | None = None) -> None:
        """Add a block."""
        if not scores.sum().isfinite():  # a sum needs no memory of the block's size
            check_finite("scores", scores)
        for end in self.ends:
            out = -torch.inf if end.largest else torch.inf
            end.add(rows, targets, scores if left_out is None else scores.masked_fill(left_out[:, None], out))
        self.sums[rows.start : rows.stop] += scores.double() @ self.slopes[targets]
        self.positive[:, targets] += positive_sums(scores.clamp(min=0).double())

    def total(
        self, share: tuple[int, int] = (0, 1), reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor
    ) -> TopScores:
        """Join what the processes found.

        Returns the scores, the same in all processes.
        """
        (up, up_scores), (down, down_scores) = (end.total(share, reduce) for end in self.ends)
        value = reduce(self.sums) / max(1, self.positive.shape[1])
        effective = float(participation(reduce(self.positive)))
        return TopScores(up, up_scores, down, down_scores, value.float(), effective)


class _Extremes:
    """The running k highest or lowest scores of each target."""

    def __init__(self, n_target: int, k: int, largest: bool) -> None:
        self.k, self.largest = k, largest
        self.rows = torch.full((k, n_target), -1)
        self.scores = torch.full((k, n_target), -torch.inf if largest else torch.inf)

    def add(self, rows: range, targets: slice, scores: Tensor) -> None:
        worst = self.scores[-1, targets]
        better = scores.amax(0) > worst if self.largest else scores.amin(0) < worst
        columns = better.nonzero().flatten()  # soon most blocks have news for few targets
        found, order = scores[:, columns].topk(min(self.k, len(scores)), dim=0, largest=self.largest)
        columns += targets.start
        both = torch.cat([self.scores[:, columns], found.float()])
        origin = torch.cat([self.rows[:, columns], order + rows.start])
        self.scores[:, columns], order = both.topk(self.k, dim=0, largest=self.largest)
        self.rows[:, columns] = origin.gather(0, order)

    def total(self, share: tuple[int, int], reduce: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        rank, world = share
        everyone = [tensor.new_zeros(world, *tensor.shape) for tensor in (self.rows, self.scores)]
        for tensor, own in zip(everyone, (self.rows, self.scores), strict=True):
            tensor[rank] = own
        rows, scores = (reduce(tensor).flatten(0, 1) for tensor in everyone)
        best, order = scores.topk(self.k, dim=0, largest=self.largest)
        return rows.gather(0, order).T.contiguous(), best.T.contiguous()
