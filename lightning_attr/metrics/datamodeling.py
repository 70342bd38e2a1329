"""Linear datamodeling score (Ilyas et al. 2022, Park et al. 2023): do summed scores predict retrained models?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from lightning_attr.arguments.checks import check_instance, check_numbers, check_tensor
from lightning_attr.arguments.messages import argument_message
from lightning_attr.metrics.bootstrap import IntervalMetric, check_bootstrap
from lightning_attr.metrics.checks import as_mask, check_finite, check_matrix
from lightning_attr.metrics.correlation import CorrelationScore, correlation_score, warn_undefined
from lightning_attr.metrics.figures import BLACK, BLUE, COLORS, defined, draw_mean, legend_above, new_axes
from lightning_attr.metrics.functional import score_blocks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = "os^Dvph*"


class DatamodelingScore(CorrelationScore):
    """Result of :func:`linear_datamodeling_score`; all tensors float64 on the device of the outputs.

    Attributes:
        mean: The score, `()`: mean of `per_target` over the targets where it is defined.
        low: Lower end of the bootstrap interval, `()`; NaN with `bootstrap=0`.
        high: Upper end of the bootstrap interval, `()`; NaN with `bootstrap=0`.
        ceiling: What perfect scores would reach given the noise of retraining, `()`; NaN with one seed.
        per_target: Spearman correlation over the subsets, `(n_target,)`; NaN where undefined.
        undefined: Number of targets left out because predictions or outputs are constant over the subsets.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import linear_datamodeling_score
        >>> score = linear_datamodeling_score(torch.eye(4), masks=torch.eye(4), outputs=torch.eye(4), bootstrap=10)
        >>> float(score.mean), score.undefined
        (1.0, 0)
    """

    __slots__ = ()


def linear_datamodeling_score(
    scores: Tensor,
    masks: Tensor,
    outputs: Tensor,
    bootstrap: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> DatamodelingScore:
    r"""Rank correlation between summed scores and the outputs of models retrained on random subsets.

    For target j, :math:`\text{LDS}_j = \text{Spearman}_k(\sum_{i \in S_k} \tau_{ij}, \; \bar y_{kj})` over the subsets
    :math:`S_k`, with outputs averaged over seeds; the score is the mean over targets (Park et al. 2023).

    The interval holds the percentiles of a two-way bootstrap, which resamples subsets and targets together, moved so
    that the bootstrap's mean falls on the score: repeated subsets lower every rank correlation of a resample. They are
    drawn together to count the variance of single pairs of subset and target once, not three times (Owen 2007).

    The ceiling comes from the reliability of the outputs: the rank correlation between the means of two halves of the
    seeds, averaged over rotations of the seeds and over targets, and carried to all seeds by the Spearman-Brown
    formula. Scores that predict the expected output exactly would reach about its square root, and less where targets
    differ widely in reliability.

    Args:
        scores: Attribution scores, `(n_train, n_target)`, positive when the sample raises the output. Read in row
            blocks, so they may be memory-mapped.
        masks: Training subsets, `(m, n_train)`, bool or 0/1, one row per subset. Subsets should have equal sizes.
        outputs: Model outputs after retraining on each subset, `(m, n_target)`, or `(s, m, n_target)` for s seeds. For
            a loss pass its negative, as scores are positive when they help.
        bootstrap: Number of resamples; 0 skips the interval.
        confidence: Coverage of the interval, in (0, 1).
        seed: Seed of the bootstrap.

    Returns:
        Mean, interval, ceiling, correlations by target and the number of undefined targets.

    Raises:
        ValueError: If shapes disagree, there are fewer than two subsets, `masks` is not 0/1, `scores` or `outputs` are
            not finite, or `bootstrap` or `confidence` is out of range.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import linear_datamodeling_score
        >>> scores = torch.tensor([[1.0, 0.0], [2.0, 1.0], [4.0, 2.0]])
        >>> masks = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 1, 1]])
        >>> linear_datamodeling_score(scores, masks, outputs=torch.tensor([[3.0, 1.0], [5.0, 3.0], [6.0, 2.0]])).mean
        tensor(0.7500, dtype=torch.float64)
    """
    check_bootstrap(bootstrap, confidence, seed)
    outputs = _with_seeds(scores, masks, outputs)
    predicted, _ = subset_sums(scores, as_mask("masks", masks))
    return _datamodeling_score(predicted.to(outputs.device), outputs, bootstrap, confidence, seed)


class LinearDatamodelingScore(IntervalMetric[DatamodelingScore]):
    """Linear datamodeling score as a metric; the pure function is :func:`linear_datamodeling_score`.

    Several updates append subsets for the same scores. States are the summed scores and the outputs of each subset, so
    they stay small and are concatenated over processes.

    Args:
        bootstrap: Number of resamples behind the interval of :meth:`summary`; 0 skips it.
        confidence: Coverage of the interval, in (0, 1).
        seed: Seed of the bootstrap.
        **kwargs: Passed to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If `bootstrap` or `confidence` is out of range.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import LinearDatamodelingScore
        >>> metric = LinearDatamodelingScore()
        >>> scores = torch.tensor([[1.0, 0.0], [2.0, 1.0], [4.0, 2.0]])
        >>> masks = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 1, 1]])
        >>> metric.update(scores, masks, outputs=torch.tensor([[3.0, 1.0], [5.0, 3.0], [6.0, 2.0]]))
        >>> metric.compute()
        tensor(0.7500, dtype=torch.float64)
        >>> metric.summary().per_target
        tensor([1.0000, 0.5000], dtype=torch.float64)
    """

    plot_lower_bound = -1.0
    plot_upper_bound = 1.0

    predicted: list[Tensor]
    outputs: list[Tensor]
    checksum: list[Tensor]

    def __init__(self, bootstrap: int = 1000, confidence: float = 0.95, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(bootstrap, confidence, seed, **kwargs)
        self.add_state("predicted", default=[], dist_reduce_fx="cat")
        self.add_state("outputs", default=[], dist_reduce_fx="cat")  # (m, s, n_target): subsets first, to concatenate
        self.add_state("checksum", default=[], dist_reduce_fx="cat")  # (updates, n_target)

    def update(self, scores: Tensor, masks: Tensor, outputs: Tensor) -> None:
        """Add subsets and the outputs of the models retrained on them.

        Args:
            scores: `(n_train, n_target)`; the same in every update.
            masks: `(m, n_train)`, bool or 0/1, one row per subset.
            outputs: `(m, n_target)`, or `(s, m, n_target)` for s seeds; the same s in every update.

        Raises:
            ValueError: If an argument is not as :func:`linear_datamodeling_score` wants it, or the scores or the number
                of seeds differ from earlier updates.
        """
        outputs = _with_seeds(scores, masks, outputs).transpose(0, 1)
        if self.outputs and self.outputs[0].shape[1:] != outputs.shape[1:]:
            raise ValueError(
                "Expected argument `outputs` to have as many seeds and targets as in earlier updates,"
                f" {tuple(self.outputs[0].shape[1:])}, but got {tuple(outputs.shape[1:])}."
            )
        predicted, checksum = subset_sums(scores, as_mask("masks", masks))
        _check_same_scores(torch.cat([*self.checksum, checksum]))
        self.predicted.append(predicted)
        self.outputs.append(outputs)
        self.checksum.append(checksum)

    def compute(self) -> Tensor:
        """Return the score, a float64 scalar."""
        return self._score(bootstrap=0).mean

    def _score(self, bootstrap: int) -> DatamodelingScore:
        _check_same_scores(dim_zero_cat(self.checksum))
        predicted, outputs = dim_zero_cat(self.predicted), dim_zero_cat(self.outputs).transpose(0, 1)
        return _datamodeling_score(predicted.to(outputs.device), outputs, bootstrap, self.confidence, self.seed)

    def _draw(self, summary: DatamodelingScore, ax: Axes | None) -> tuple[Figure, Axes]:
        return plot_datamodeling_score(summary, ax)


def _datamodeling_score(
    predicted: Tensor, outputs: Tensor, bootstrap: int, confidence: float, seed: int
) -> DatamodelingScore:
    """Return the score from predictions `(m, n_target)` and outputs `(s, m, n_target)`."""
    score = correlation_score(predicted, outputs.double(), "spearman", bootstrap, confidence, seed)
    warn_undefined(score, "linear datamodeling score", "subsets")
    return DatamodelingScore(*score)


def subset_sums(scores: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Return `masks @ scores` `(m, n_target)` and weighted column sums `(1, n_target)`, a checksum, both float64."""
    sums = torch.zeros(len(masks), scores.shape[1], dtype=torch.float64, device=scores.device)
    checksum = sums.new_zeros(1, scores.shape[1])
    weights = torch.linspace(1, 2, len(scores), dtype=torch.float64, device=scores.device)
    for rows, block in score_blocks(scores):
        sums += masks[:, rows].to(block) @ block
        checksum += weights[rows] @ block
    # Equal sums added in another order differ by rounding; they must tie, or constant scores would rank the subsets.
    step = (sums.abs().amax(0) * 2**-40).clamp(min=torch.finfo(sums.dtype).tiny)
    return (sums / step).round() * step, checksum


def _with_seeds(scores: Tensor, masks: Tensor, outputs: Tensor) -> Tensor:
    # Outputs as (s, m, n_target), once the three arguments fit together.
    check_matrix("scores", scores)
    check_matrix("masks", masks)
    if masks.shape[1] != len(scores):
        raise ValueError(
            f"Expected argument `masks` to have shape (m, n_train) with n_train = {len(scores)} as in `scores`,"
            f" but got {tuple(masks.shape)}."
        )
    if len(masks) < 2:
        raise ValueError(f"Expected argument `masks` to hold at least 2 subsets, but got {len(masks)}.")
    expected = (len(masks), scores.shape[1])
    check_tensor(None, "outputs", outputs)
    if outputs.ndim not in {2, 3} or outputs.shape[-2:] != expected or outputs.numel() == 0:
        raise ValueError(
            f"Expected argument `outputs` to have shape (m, n_target) = {expected} or (s, m, n_target),"
            f" but got {tuple(outputs.shape)}."
        )
    check_finite("outputs", outputs)
    return outputs.reshape(-1, *expected)


def _check_same_scores(checksum: Tensor) -> None:
    if ((checksum - checksum[0]).abs() > 1e-6 * checksum[0].abs().max()).any():
        raise ValueError(
            "Expected argument `scores` to be the same in every update of LinearDatamodelingScore, but it differs."
            " Use one metric for each attribution method, or call `reset()`."
        )


def plot_datamodeling_score(score: DatamodelingScore, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Plot the correlations by target as a histogram, with their mean, its interval and the ceiling.

    Args:
        score: Result of :func:`~lightning_attr.metrics.linear_datamodeling_score`.
        ax: Where to draw; a new figure by default.

    Returns:
        The figure and its axes.

    Raises:
        TypeError: If `score` is none.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import linear_datamodeling_score, plot_datamodeling_score
        >>> scores, masks = torch.eye(4), 1 - torch.eye(4)
        >>> fig, ax = plot_datamodeling_score(linear_datamodeling_score(scores, masks, outputs=masks, bootstrap=0))
        >>> ax.get_xlabel()
        'Spearman correlation over subsets'
    """
    check_instance(
        "plot_datamodeling_score", "score", score, DatamodelingScore, "what `linear_datamodeling_score` returns"
    )
    fig, ax = new_axes(ax)
    values = defined(score.per_target).numpy()
    ax.hist(values, bins="auto", range=(min(0.0, values.min(initial=0)), 1), color=BLUE, alpha=0.35)
    draw_mean(ax, "mean", score)
    if not score.ceiling.isnan():
        ax.axvline(float(score.ceiling), linestyle="--", color=BLACK, label=f"ceiling {float(score.ceiling):.3f}")
    ax.set(xlabel="Spearman correlation over subsets", ylabel="targets")
    legend_above(ax)
    return fig, ax


def plot_datamodeling_score_against_cost(
    rows: Mapping[str, tuple[float, float, float, float]],
    ceiling: float | Tensor | None = None,
    cost: str = "cost in seconds",
    score: str = "LDS",
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Plot the score of several methods against their cost, with intervals and the noise ceiling.

    Args:
        rows: `(cost, score, low, high)` of each method by name. Costs are positive, on a logarithmic axis; `low` and
            `high` are the ends of the score's interval, NaN for none. Names that share what stands before the first
            comma share colour and marker, and are joined by a line: `"TRAK, 1 model"`, `"TRAK, 10 models"`.
        ceiling: Score that perfect scores would reach given the noise of retraining.
        cost: Label of the horizontal axis, with its unit.
        score: Label of the vertical axis.
        ax: Where to draw; a new figure by default.

    Returns:
        The figure and its axes.

    Raises:
        TypeError: If `rows` is no mapping to numbers.
        ValueError: If there are no rows, a cost is not positive, a score is not finite, or an interval does not hold
            its score.

    Example:
        >>> from lightning_attr.metrics import plot_datamodeling_score_against_cost
        >>> rows = {"TracIn": (3.0, 0.15, 0.12, 0.18), "TRAK": (20.0, 0.4, 0.37, 0.43)}
        >>> fig, ax = plot_datamodeling_score_against_cost(rows, ceiling=0.9)
        >>> ax.get_xscale()
        'log'
    """
    families = _families(rows)
    fig, ax = new_axes(ax)
    for i, (family, points) in enumerate(families.items()):
        x, y, low, high = zip(*sorted(points), strict=True)
        spread = [[a - b for a, b in zip(y, low, strict=True)], [b - a for a, b in zip(y, high, strict=True)]]
        color, marker = COLORS[i % len(COLORS)], _MARKERS[i % len(_MARKERS)]
        ax.errorbar(x, y, yerr=spread, fmt=f"{marker}-", color=color, markersize=5, capsize=2.5, label=family)
    if ceiling is not None:
        ax.axhline(float(ceiling), linestyle="--", color=BLACK, linewidth=1, label="ceiling")
    ax.set(xlabel=cost, ylabel=score, xscale="log")
    ax.margins(x=0.12)
    legend_above(ax)
    return fig, ax


def _families(rows: Mapping[str, tuple[float, float, float, float]]) -> dict[str, list[tuple[float, ...]]]:
    # Rows by what stands before the first comma of their name; a lone row keeps its whole name.
    expected = "a mapping from the name of a method to its (cost, score, low, high)"
    check_instance("plot_datamodeling_score_against_cost", "rows", rows, Mapping, expected)
    if not rows:
        raise ValueError("Expected argument `rows` to hold at least one method, but it is empty.")
    families: dict[str, list[tuple[float, ...]]] = {}
    names: dict[str, list[str]] = {}
    for name, row in rows.items():
        place = f"rows[{name!r}]"
        found = check_numbers("plot_datamodeling_score_against_cost", place, row, "(cost, score, low, high)")
        if found.shape != (4,):
            raise ValueError(
                argument_message("plot_datamodeling_score_against_cost", place, "(cost, score, low, high)", row)
            )
        cost, score, low, high = (float(value) for value in row)
        if not 0 < cost < math.inf or not math.isfinite(score) or low > score or high < score:
            raise ValueError(
                "Expected argument `rows` to hold (cost, score, low, high) with a positive cost and low <= score <="
                f" high, but got {(cost, score, low, high)} for {name!r}."
            )
        family = name.split(",")[0]
        families.setdefault(family, []).append((cost, score, low, high))
        names.setdefault(family, []).append(name)
    return {names[family][0] if len(points) == 1 else family: points for family, points in families.items()}
