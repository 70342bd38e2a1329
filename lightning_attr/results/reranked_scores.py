"""The strongest scores of a quick method, scored again by a dearer one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_attr.arguments.checks import check_int, check_path
from lightning_attr.errors import AttributionError, CorruptedStoreError
from lightning_attr.metrics.checks import check_finite
from lightning_attr.results.saved_scores import REMEDY, load_scores, save_scores, saved_scores
from lightning_attr.results.score_matrix import ScoreMatrix
from lightning_attr.results.top_scores import SAVED, TopScores

_FIRST = "first"


@dataclass(frozen=True)
class RerankedScores(TopScores):
    """Candidates in the order of a second method, and behind them all others in the order of the first.

    ``proponents`` and ``opponents`` are the candidates of each target, the strongest of the first method's scores, in
    the order of the second's, whose scores stand beside them. :meth:`topk` and :meth:`bottomk` go on with the first
    method where more are wanted; the scores of the two are in units of their own. Figures that add up scores, such as
    ``data_value``, are those of the first method, which knows all of them.

    Args:
        first: all scores of the first method, or the extremes that it kept.

    Example:
        >>> first = ScoreMatrix(torch.tensor([[1.0], [3.0], [2.0], [0.0]]))
        >>> dear = CandidateScores.of(first, 2)
        >>> dear.add(range(4), slice(0, 1), torch.tensor([[50.0], [10.0], [20.0], [-5.0]]))
        >>> found = reranked(first, dear.total())
        >>> found.topk(3)                             # 1 and 2 change their places, 0 stays behind them
        (tensor([[2, 1, 0]]), tensor([[20., 10.,  1.]]))
        >>> found.reranked.flatten(), found.data_value
        (tensor([True, True, True, True]), tensor([1., 3., 2., 0.]))
    """

    first: ScoreMatrix | TopScores = None  # type: ignore[assignment]  # a field behind those that have defaults

    @property
    def depth(self) -> int:
        """Proponents and opponents that each target has at most, of both methods together."""
        return self.first.depth

    @property
    def candidates(self) -> int:
        """Proponents, and opponents, of each target that the second method has scored."""
        return self.proponents.shape[1]

    @property
    def reranked(self) -> Tensor:
        """Which scores are the second method's, ``(n_train, n_target)``, bool."""
        mask = torch.zeros(self.shape[1], self.shape[0], dtype=torch.bool)
        return mask.scatter_(1, self.proponents, True).scatter_(1, self.opponents, True).T

    @property
    def values(self) -> Tensor:
        """Not there.

        Raises:
            AttributionError: always.
        """
        raise AttributionError(
            f"This result was reranked: the {self.candidates} strongest proponents and opponents of each target have "
            "scores of a second method (`topk`, `bottomk`), in units of its own, and there is no one matrix. "
            "`result.scores.first.values` has the first method's, where it was run without `topk`."
        )

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """Find the strongest proponents of each target: first the candidates.

        Args:
            k: how many.

        Returns:
            Indices into the training data set and scores, each ``(n_target, k)``; behind :attr:`candidates` they are
            the first method's.
        """
        return self._joined("topk", k, self.proponents, self.proponent_scores)

    def bottomk(self, k: int) -> tuple[Tensor, Tensor]:
        """Find the strongest opponents of each target: first the candidates.

        Args:
            k: how many.

        Returns:
            Indices into the training data set and scores, each ``(n_target, k)``; behind :attr:`candidates` they are
            the first method's.
        """
        return self._joined("bottomk", k, self.opponents, self.opponent_scores)

    def save(self, path: str | Path) -> None:
        """Write ``reranked_scores.safetensors`` and ``scores.json`` into a directory, and the first's into one in it.

        Args:
            path: the directory; made if it is not there.
        """
        folder = check_path("RerankedScores.save", "path", path)
        self.first.save(folder / _FIRST)
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        tensors["effective_proponents"] = torch.tensor(self.effective_proponents, dtype=torch.float64)
        content = saved_scores(folder / _FIRST)["content"]
        save_scores(folder, "reranked", tensors, {**self.provenance, _FIRST: content})

    @classmethod
    def load(cls, path: str | Path) -> RerankedScores:
        """Read what :meth:`save` wrote.

        Args:
            path: the directory.

        Returns:
            The scores.

        Raises:
            CorruptedStoreError: if a file is missing, damaged, or of other scores.
        """
        folder = check_path("RerankedScores.load", "path", path)
        tensors, provenance = load_scores(folder, "reranked", SAVED)
        content = provenance.pop(_FIRST, None)
        record = saved_scores(folder / _FIRST)
        if record["content"] != content:
            raise CorruptedStoreError(f"{folder / _FIRST} holds other scores than {folder} was saved with. {REMEDY}")
        first = (TopScores if record["kind"] == "top" else ScoreMatrix).load(folder / _FIRST)
        effective = tensors.pop("effective_proponents").item()
        found = cls(**tensors, effective_proponents=effective, provenance=provenance, first=first)
        found.check_fit(folder)
        if found.shape != first.shape:
            raise CorruptedStoreError(f"{folder} is damaged: its scores are of another size than the first. {REMEDY}")
        return found

    def _joined(self, name: str, k: int, rows: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        k = check_int(f"RerankedScores.{name}", "k", k, 1, self.depth)
        found = self.train_indices[rows[:, :k]], scores[:, :k]
        if k <= self.candidates:
            return found
        # The candidates are the first method's strongest: behind them come the others.
        beyond = getattr(self.first, name)(k)
        joined = [torch.cat([own, more[:, self.candidates :]], 1) for own, more in zip(found, beyond, strict=True)]
        return joined[0], joined[1]


class CandidateScores:
    """Gathers the scores of chosen training rows from blocks of scores, in any order.

    Args:
        n_train: training samples.
        proponents: ``(n_target, c)``, int64: chosen rows of each target.
        opponents: likewise.

    Example:
        >>> found = CandidateScores(3, torch.tensor([[2, 0]]), torch.tensor([[1, 0]]))
        >>> found.add(range(3), slice(0, 1), torch.tensor([[5.0], [-1.0], [3.0]]))
        >>> found.total().topk(2), found.total().bottomk(2)
        ((tensor([[0, 2]]), tensor([[5., 3.]])), (tensor([[1, 0]]), tensor([[-1.,  5.]])))
    """

    def __init__(self, n_train: int, proponents: Tensor, opponents: Tensor) -> None:
        self.n_train = n_train
        self.rows = torch.cat([proponents, opponents], 1)
        self.scores = torch.zeros(self.rows.shape)

    @classmethod
    def of(cls, first: ScoreMatrix | TopScores, candidates: int) -> CandidateScores:
        """Choose the strongest of some scores."""
        return cls(first.shape[0], first.topk(candidates)[0], first.bottomk(candidates)[0])

    @property
    def wanted(self) -> frozenset[int]:
        """The rows of all targets together."""
        return frozenset(self.rows.unique().tolist())

    def add(self, rows: range, targets: slice, scores: Tensor) -> None:
        """Take what is wanted of a block."""
        own = self.rows[targets]
        target, place = ((own >= rows.start) & (own < rows.stop)).nonzero(as_tuple=True)
        found = scores[own[target, place] - rows.start, target]
        check_finite("scores", found)
        self.scores[target + targets.start, place] = found.float()

    def total(self, reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> TopScores:
        """Order what the processes found.

        Returns the candidates alone: what is said of all scores is zero.
        """
        half = self.rows.shape[1] // 2
        scores = reduce(self.scores)
        (up, up_scores), (down, down_scores) = (
            _ordered(self.rows[:, part], scores[:, part], largest)
            for part, largest in ((slice(0, half), True), (slice(half, None), False))
        )
        return TopScores(up, up_scores, down, down_scores, torch.zeros(self.n_train), 0.0)


def reranked(first: ScoreMatrix | TopScores, second: TopScores) -> RerankedScores:
    """Put candidates before the other scores.

    Returns the scores, with the first's provenance, and under ``rerank`` the second's.
    """
    found = RerankedScores(
        second.proponents,
        second.proponent_scores,
        second.opponents,
        second.opponent_scores,
        first.data_value.float(),
        first.effective_proponents,
        first.train_indices,
        first.target_indices,
        first=first,
    )
    rerank: dict[str, Any] = {"candidates": found.candidates, **second.provenance}
    return replace(found, provenance={**first.provenance, "rerank": rerank})


def _ordered(rows: Tensor, scores: Tensor, largest: bool) -> tuple[Tensor, Tensor]:
    order = scores.argsort(dim=1, descending=largest, stable=True)
    return rows.gather(1, order), scores.gather(1, order)
