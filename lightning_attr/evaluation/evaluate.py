"""One call from scores and ground truth to the metrics that need retraining."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_attr.arguments.checks import check_instance
from lightning_attr.errors import AttributionError, StoreMismatchError
from lightning_attr.evaluation.ground_truth import GroundTruth
from lightning_attr.methods.support.subset_truth import mask_digests
from lightning_attr.metrics.bootstrap import check_bootstrap
from lightning_attr.metrics.correlation import CorrelationScore
from lightning_attr.metrics.datamodeling import DatamodelingScore, linear_datamodeling_score, plot_datamodeling_score
from lightning_attr.metrics.leave_one_out import (
    LeaveOneOutScore,
    leave_one_out_correlation,
    plot_leave_one_out_correlation,
)
from lightning_attr.results.reranked_scores import RerankedScores
from lightning_attr.results.result import AttributionResult
from lightning_attr.results.score_matrix import ScoreMatrix
from lightning_attr.results.top_scores import TopScores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, repr=False)
class Evaluation:
    """How well scores predict what retraining does.

    Args:
        kind: of the ground truth, "lds", "loo" or "without".
        score: the full figures, with the values of each target.
        shape: retrained models that were compared, and targets: ``(seeds, subsets, n_target)``.

    Attributes:
        metrics: name -> figure, as :func:`evaluate` lists them.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import linear_datamodeling_score
        >>> score = linear_datamodeling_score(torch.eye(4), masks=torch.eye(4), outputs=torch.eye(4), bootstrap=10)
        >>> Evaluation("lds", score, (1, 4, 4))
        subsets: 4, seeds: 1, targets: 4
        lds: 1.000 (1.000 to 1.000), ceiling unknown
    """

    kind: str
    score: DatamodelingScore | LeaveOneOutScore
    shape: tuple[int, int, int]
    metrics: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        metrics = {}
        for name, score in self._correlations().items():
            metrics[name] = score.mean
            metrics |= {f"{name}_{end}": getattr(score, end) for end in ("low", "high", "ceiling")}
            metrics[f"{name}_of_ceiling"] = score.mean / score.ceiling
            metrics[f"{name}_undefined"] = torch.tensor(score.undefined)
        if isinstance(self.score, LeaveOneOutScore):
            metrics[f"{_PREFIXES[self.kind]}_signal_to_noise"] = self.score.signal_to_noise.nanmedian()
        object.__setattr__(self, "metrics", {name: float(figure) for name, figure in metrics.items()})

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw the correlations by target with mean, interval and ceiling.

        Args:
            ax: matplotlib axes to draw on; new ones by default.

        Returns:
            ``(figure, axes)``.
        """
        if isinstance(self.score, DatamodelingScore):
            return plot_datamodeling_score(self.score, ax=ax)
        fig, ax = plot_leave_one_out_correlation(self.score, ax=ax)
        if self.kind == "without":
            ax.set_xlabel("correlation over removed sets")
        return fig, ax

    def __repr__(self) -> str:
        seeds, subsets, targets = self.shape
        lines = [f"{_ROWS[self.kind]}: {subsets:,}, seeds: {seeds:,}, targets: {targets:,}"]
        for name, score in self._correlations().items():
            interval = "" if score.low.isnan() else f" ({score.low:.3f} to {score.high:.3f})"
            ceiling = "unknown" if score.ceiling.isnan() else f"{score.ceiling:.3f}"
            undefined = f", targets left out: {score.undefined:,}" if score.undefined else ""
            lines.append(f"{name}: {score.mean:.3f}{interval}, ceiling {ceiling}{undefined}")
        lines += [f"{name}: {value:.2f}" for name, value in self.metrics.items() if name.endswith("signal_to_noise")]
        return "\n".join(lines)

    def _correlations(self) -> dict[str, CorrelationScore]:
        prefix = _PREFIXES[self.kind]
        if isinstance(self.score, LeaveOneOutScore):
            return {f"{prefix}_pearson": self.score.pearson, f"{prefix}_spearman": self.score.spearman}
        return {prefix: self.score}


_PREFIXES = {"lds": "lds", "loo": "loo", "without": "removal"}
_ROWS = {"lds": "subsets", "loo": "left-out samples", "without": "removed sets"}


def evaluate(
    result: AttributionResult,
    ground_truth: GroundTruth,
    *,
    bootstrap: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Evaluation:
    """Compare scores with what retraining did.

    ================  =============================================================================================
    kind              metrics
    ================  =============================================================================================
    lds               ``lds``: rank correlation over subsets of summed scores with outputs, mean over targets
    loo               ``loo_pearson``, ``loo_spearman``: correlation over left-out samples of scores with effects
    without           ``removal_pearson``, ``removal_spearman``: of the scores summed over each removed set with its
                      effect
    ================  =============================================================================================

    Each comes with ``_low`` and ``_high``, the ends of its interval, ``_ceiling``, what perfect scores would reach
    given the noise of retraining, ``_of_ceiling``, its ratio to that, and ``_undefined``, the number of targets left
    out. Beside "loo" and "without" stands ``_signal_to_noise``, the median over targets. What does not exist is NaN:
    the interval without bootstrap, the ceiling with one seed. :func:`lightning_attr.evaluation.brittleness` has the
    curve for sets of top proponents.

    Scores and ground truth must be of the same data: the numbers of samples are compared, and where the provenance of
    the scores tells hashes of the data (``train_data``, ``target_probe``), these too. Scores that were fitted to
    retrained models, a datamodel's for instance, are compared with others only: ``fitted_on`` in their provenance names
    the subsets.

    Args:
        result: all scores of all training samples.
        ground_truth: finished.
        bootstrap: resamples behind the intervals; 0 leaves them out.
        confidence: coverage of the intervals, in (0, 1).
        seed: of the bootstrap.

    Returns:
        The figures, in ``metrics`` as plain numbers.

    Raises:
        AttributionError: if the scores are only the extremes of each target, the ground truth is not finished, or the
            scores were fitted to one of its subsets.
        StoreMismatchError: if the ground truth is of other data.
        ValueError: if fewer than two sets were retrained on, or an argument is out of range.

    Example:
        >>> from pathlib import Path
        >>> masks = torch.tensor([[True, True, False], [True, False, True], [False, True, True]])
        >>> outputs = torch.tensor([[[3.0], [5.0], [6.0]]])
        >>> truth = GroundTruth(Path(), "lds", masks, outputs, torch.zeros(1, 3, dtype=torch.int64), {})
        >>> result = AttributionResult(ScoreMatrix(torch.tensor([[1.0], [2.0], [4.0]])), torch.ones(3), torch.ones(3))
        >>> evaluate(result, truth, bootstrap=0).metrics["lds"]
        1.0
    """
    check_instance("evaluate", "result", result, AttributionResult, "an AttributionResult, as `attribute` returns")
    remedy = "Open a directory with `GroundTruth.open(dirpath)`."
    check_instance("evaluate", "ground_truth", ground_truth, GroundTruth, "a GroundTruth", remedy)
    check_bootstrap(bootstrap, confidence, seed)
    scores = _all_scores(result)
    _check_finished(ground_truth)
    _check_same_data(scores, ground_truth)
    _check_not_fitted(scores, ground_truth)
    values = _in_order(scores)
    seeds, subsets, targets = ground_truth.outputs.shape
    least = 2 if ground_truth.kind == "lds" else 3  # with the full set
    if subsets < least:
        raise ValueError(
            f"Expected ground truth with at least 2 sets of training samples to correlate over, but there is "
            f"{subsets - least + 2} in {ground_truth.dirpath}."
        )
    score: DatamodelingScore | LeaveOneOutScore
    if ground_truth.kind == "lds":
        outputs = ground_truth.outputs
        score = linear_datamodeling_score(values, ground_truth.masks, outputs, bootstrap, confidence, seed)
    else:
        subsets -= 1
        predicted = torch.stack([values[indices].double().sum(0) for indices in ground_truth.removed])
        score = leave_one_out_correlation(predicted, ground_truth.effects, bootstrap, confidence, seed)
    return Evaluation(ground_truth.kind, score, (seeds, subsets, targets))


def _all_scores(result: AttributionResult) -> ScoreMatrix:
    if isinstance(result.scores, RerankedScores):
        raise AttributionError(
            "Expected a result with one score for every training sample, but this one was reranked: its candidates "
            "have scores of a second method, in units of its own. Evaluate the two apart: attribute without `rerank`."
        )
    if isinstance(result.scores, TopScores):
        raise AttributionError(
            f"Expected a result with the scores of all training samples, but this one was computed with "
            f"`topk={result.scores.proponents.shape[1]}` and has only the extremes of each target. Attribute without "
            "`topk` to compare with retraining."
        )
    return result.scores


def _check_finished(truth: GroundTruth) -> None:
    if not truth.complete:
        missing = int((~truth.finished).sum())
        raise AttributionError(
            f"Expected finished ground truth, but {missing} of {truth.finished.numel()} retrainings in {truth.dirpath} "
            "have no outputs yet. Run the same `retrain_*` call again: it goes on where it stopped."
        )


_HASHES = {"train_data": "training data", "target_probe": "targets"}  # what both sides may know, by its key


def _check_same_data(scores: ScoreMatrix, truth: GroundTruth) -> None:
    wrong = []
    sizes = {"training samples": truth.masks.shape[1], "targets": truth.outputs.shape[2]}
    for (name, size), own in zip(sizes.items(), scores.shape, strict=True):
        if size != own:
            wrong.append(f"it has {size:,} {name}, the scores have {own:,}")
    if not wrong:
        for key, name in _HASHES.items():
            expected, found = truth.provenance.get(key), scores.provenance.get(key)
            if expected is not None and found is not None and expected != found:
                wrong.append(f"its {name} differ from those of the scores, though there are as many")
    if wrong:
        raise StoreMismatchError(
            f"This is ground truth of another dataset ({truth.dirpath}): {', and '.join(wrong)}. Attribute with the "
            "datamodule and `targets` that the models were retrained with; a random split needs a fixed seed."
        )


def _check_not_fitted(scores: ScoreMatrix, truth: GroundTruth) -> None:
    fitted = set(scores.provenance.get("fitted_on", ()))
    count = sum(name in fitted for name in mask_digests(truth.masks)) if fitted else 0
    if count:
        raise AttributionError(
            f"These scores were fitted to models retrained on {count} of the subsets (of {len(truth.masks)}) in "
            f"{truth.dirpath}: there they would be right by construction. Compare with other subsets; `retrain_lds` "
            "draws others from another `seed`, and the same first ones from the same."
        )


def _in_order(scores: ScoreMatrix) -> Tensor:
    """Give the scores with row i for ``dataset[i]`` and column j for ``dataset[j]``, as the ground truth has them."""
    values = scores.values
    for dim, name in enumerate(("train_indices", "target_indices")):
        order = getattr(scores, name)
        everything = torch.arange(len(order))
        if not torch.equal(order.sort().values, everything):
            raise StoreMismatchError(
                f"Expected scores of all samples that the ground truth is about, but their `{name}` are not the "
                f"numbers from 0 to {len(order) - 1}: they are of another dataset, or of a part of one."
            )
        if not torch.equal(order, everything):
            values = values.index_select(dim, order.argsort())
    return values
