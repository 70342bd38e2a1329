"""What an attribution run returns: scores, self-influence, data value and metrics, with the figures people expect."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_attr.arguments.checks import check_instance, check_path
from lightning_attr.errors import CorruptedStoreError
from lightning_attr.files.headers import config_digest
from lightning_attr.files.io import read_tensors, write_bytes, write_tensors
from lightning_attr.files.paths import inside
from lightning_attr.metrics.coreset import PredictedEffect
from lightning_attr.report.overview import overview, overview_html
from lightning_attr.report.page import write_report
from lightning_attr.results import selection
from lightning_attr.results.columns import check_columns
from lightning_attr.results.frames import data_frame
from lightning_attr.results.reranked_scores import RerankedScores
from lightning_attr.results.result_figures import ResultFigures
from lightning_attr.results.result_metrics import result_metrics
from lightning_attr.results.saved_scores import REMEDY, check_tensors, saved_scores
from lightning_attr.results.score_matrix import ScoreMatrix
from lightning_attr.results.top_scores import TopScores

if TYPE_CHECKING:
    import pandas as pd

_SAVED = {
    **dict.fromkeys(("self_influence", "loss"), (1, True)),
    **dict.fromkeys(("labels", "noise_mask", "trained_on", "exposure"), (1, False)),
}
"""Dimensions of each saved column, and whether it holds floating-point numbers."""
_OPTIONAL = frozenset({"labels", "noise_mask", "trained_on", "exposure"})
_KINDS: Mapping[str, type[ScoreMatrix | TopScores]] = {
    "matrix": ScoreMatrix,
    "top": TopScores,
    "reranked": RerankedScores,
}


@dataclass(frozen=True)
class AttributionResult(ResultFigures):
    """Scores of every training sample for every target, and what follows from them.

    Args:
        scores: ``(n_train, n_target)``, or with ``topk`` the extremes of each target only; with ``rerank`` a
            :class:`lightning_attr.results.RerankedScores`.
        self_influence: ``(n_train,)``, float32: the score of each training sample for its own model output. High values
            are suspicious: the sample is explained by nothing but itself. NaN where the method leaves it out.
        loss: ``(n_train,)``, float32: training loss of each sample at the last snapshot.
        labels: ``(n_train,)``, int64 class labels, None if the targets of the model output are no class labels.
        noise_mask: ``(n_train,)``, bool: samples known to be mislabelled, None if unknown.
        trained_on: ``(n_train,)``, bool: False for samples that training never drew, by the run's journal, or else as
            far as the loader of the recorded run tells (subset samplers, limits, dropped ends): their scores and
            self-influence are zero, and they are neither proponents nor chosen. None where nothing says that there are
            any.
        exposure: ``(n_train,)``, int64: how often each sample was trained on up to the last snapshot, by the run's
            journal; None where it is not known.

    Raises:
        TypeError: if an argument is of another kind.
        ValueError: if a column has not one entry for each training sample.

    Example:
        >>> import torch
        >>> result = AttributionResult(
        ...     ScoreMatrix(torch.tensor([[2.0, 1.0], [-1.0, 0.0], [0.5, 0.5]])),
        ...     self_influence=torch.tensor([0.1, 0.9, 0.2]), loss=torch.tensor([0.1, 2.0, 0.3]))
        >>> result.data_value, round(result.metrics["share_harmful"], 3)
        (tensor([ 1.5000, -0.5000,  0.5000]), 0.333)
    """

    scores: ScoreMatrix | TopScores
    self_influence: Tensor
    loss: Tensor
    labels: Tensor | None = None
    noise_mask: Tensor | None = None
    trained_on: Tensor | None = None
    exposure: Tensor | None = None
    data_value: Tensor = field(init=False)
    metrics: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        check_instance(self, "scores", self.scores, (ScoreMatrix, TopScores), "a ScoreMatrix or TopScores")
        check_columns(self, self.scores.shape[0])
        object.__setattr__(self, "data_value", self.scores.data_value)
        object.__setattr__(self, "metrics", result_metrics(self))

    def select(
        self, fraction: float, by: str = "data_value", per_class: bool = False, objective: str | None = None
    ) -> Tensor:
        """Choose training samples to keep.

        A ranking asks each sample alone, an objective what the choice is for. "prune" drops what hurts the targets, and
        nothing else: more than ``fraction`` may stay. "coreset" builds a small training set in which each sample adds
        to the others, see :func:`lightning_attr.metrics.greedy_coreset`.

        Args:
            fraction: share of the samples to keep, in (0, 1].
            by: "data_value" keeps the samples that help the targets most, "self_influence" the least suspicious ones.
            per_class: keep this share of every class; needs class labels.
            objective: "prune" or "coreset"; None ranks by ``by``.

        Returns:
            Indices into the training data set, ascending, int64.

        Raises:
            ValueError: if an argument is out of range or fits no other, or there are no labels for ``per_class``.
            AttributionError: for a coreset, if the result was computed with ``topk``.

        Example:
            >>> import torch
            >>> values = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
            >>> result = AttributionResult(ScoreMatrix(values), torch.zeros(4), torch.zeros(4))
            >>> result.select(0.5), result.select(0.5, objective="coreset"), result.select(0.5, objective="prune")
            (tensor([0, 1]), tensor([0, 2]), tensor([0, 1, 2]))
        """
        return selection.select(self, fraction, by, per_class, objective)

    def predicted_effect(self, keep: Any) -> PredictedEffect:
        """Predict how the targets change with training on some samples alone: trust its sign more than its size.

        Args:
            keep: indices into the training data set, such as :meth:`select` gives.

        Returns:
            Changes of mean loss and mean output, each with its standard error over targets.

        Raises:
            ValueError: if an index is no training sample's, or comes twice; AttributionError with ``topk``.

        Example:
            >>> import torch
            >>> result = AttributionResult(ScoreMatrix(torch.tensor([[1.0], [-2.0]])), torch.ones(2), torch.ones(2))
            >>> float(result.predicted_effect([0]).loss)  # without the second
            -2.0
        """
        return selection.effect_of(self.scores, keep)

    @property
    def reranked(self) -> Tensor | None:
        """Which scores are those of a second method, ``(n_train, n_target)``, bool; None without ``rerank``."""
        return self.scores.reranked if isinstance(self.scores, RerankedScores) else None

    def __repr__(self) -> str:
        return overview(self)

    def _repr_html_(self) -> str:
        return overview_html(self)

    def report(self, path: str | Path, train: Any = None, targets: Any = None, **options: Any) -> Path:
        """Write a page that opens in any browser, without a network.

        It shows what was attributed and how, the most suspicious training samples, distributions by class, and each
        target beside its proponents and opponents; rows can be searched, sorted, filtered and saved as indices.

        Args:
            path: the file; it is replaced when the page is complete.
            train: ``train[i]`` is the training sample of index ``i``, or a tuple or mapping of it and its label; None
                shows numbers alone.
            targets: the same for targets.
            **options: ``k=5`` proponents and opponents; ``renderer``, from a sample to HTML, see
                :mod:`lightning_attr.report`; ``outputs`` of each target, numbers or words; ``classes``, names of the
                labels; ``title``.

        Returns:
            The path.

        Raises:
            ValueError: if an argument is out of range, or a sample cannot be read or drawn.
        """
        return write_report(self, path, train, targets, **options)

    def save(self, path: str | Path) -> None:
        """Write everything into a directory.

        Args:
            path: the directory; made if it is not there.
        """
        folder = check_path("AttributionResult.save", "path", path)
        self.scores.save(folder)
        columns = {name: getattr(self, name) for name in _SAVED}
        known = {name: column for name, column in columns.items() if column is not None}
        write_tensors(folder / "result.safetensors", known, _place(saved_scores(folder)))
        write_bytes(folder / "metrics.json", json.dumps(self.metrics, indent=1).encode())

    @classmethod
    def load(cls, path: str | Path) -> AttributionResult:
        """Read what :meth:`save` wrote.

        Args:
            path: the directory.

        Returns:
            The result; large scores are mapped from the file.

        Raises:
            CorruptedStoreError: if a file is missing, damaged, or of another result.
        """
        folder = check_path("AttributionResult.load", "path", path)
        record = saved_scores(folder)
        scores = _KINDS[record["kind"]].load(folder)
        file = inside(folder, "result.safetensors")
        columns = read_tensors(file, remedy=REMEDY, place=_place(record))
        check_tensors(file, columns, _SAVED, optional=_OPTIONAL)
        try:
            return cls(scores, **columns)
        except (ValueError, TypeError) as error:
            raise CorruptedStoreError(f"{file} is damaged: {error} {REMEDY}") from error

    def to_pandas(self) -> pd.DataFrame:
        """Give what is known of each training sample to pandas.

        Returns:
            A row a training sample, labelled ``train_indices``, with the columns ``self_influence``, ``data_value`` and
            ``loss``, and ``label``, ``noise``, ``trained_on`` and ``exposure`` where they are known.

        Raises:
            MissingDependencyError: if pandas is not installed.
        """
        columns = {
            "self_influence": self.self_influence,
            "data_value": self.data_value,
            "loss": self.loss,
            "label": self.labels,
            "noise": self.noise_mask,
            "trained_on": self.trained_on,
            "exposure": self.exposure,
        }
        known = {name: column.numpy() for name, column in columns.items() if column is not None}
        return data_frame(known, ("train_index", self.scores.train_indices.numpy()))


def _place(scores: Mapping[str, Any]) -> dict[str, str]:
    """What the file of the columns is: that of these very scores."""
    return {"kind": "result", "scores": scores["content"], "provenance": config_digest(scores["provenance"])}
