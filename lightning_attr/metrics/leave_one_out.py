"""Leave-one-out correlation: do scores predict what retraining without one sample changes?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from lightning_attr.arguments.checks import check_instance, check_tensor
from lightning_attr.metrics.bootstrap import IntervalMetric, check_bootstrap
from lightning_attr.metrics.checks import check_finite, check_matrix
from lightning_attr.metrics.correlation import CorrelationScore, correlation_score, signal_to_noise, warn_undefined
from lightning_attr.metrics.figures import BLACK, BLUE, ORANGE, defined, draw_mean, legend_above, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class LeaveOneOutScore(NamedTuple):
    """Result of :func:`leave_one_out_correlation`; float64 on the device of the differences.

    Attributes:
        pearson: Pearson's correlation over the left-out samples.
        spearman: Spearman's correlation over the left-out samples.
        signal_to_noise: Variance of the mean differences over that which the noise of retraining alone gives them,
            `(n_target,)`: near 1 when the differences are noise, whatever the scores; NaN with one seed.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import leave_one_out_correlation
        >>> scores = torch.tensor([[1.0], [2.0], [4.0]])
        >>> score = leave_one_out_correlation(scores, differences=torch.stack([scores - 0.1, scores.square()]))
        >>> float(score.spearman.mean), score.signal_to_noise.shape
        (1.0, torch.Size([1]))
    """

    pearson: CorrelationScore
    spearman: CorrelationScore
    signal_to_noise: Tensor


def leave_one_out_correlation(
    scores: Tensor,
    differences: Tensor,
    bootstrap: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> LeaveOneOutScore:
    r"""Correlation between scores and what leaving each sample out of training changes (Koh and Liang 2017).

    For target j, the correlation over left-out samples i of :math:`\tau_{ij}` with
    :math:`\bar y_j(S) - \bar y_j(S \setminus \{i\})`, both averaged over seeds; then the mean over targets. For deep
    networks the noise of retraining often exceeds the effect of one sample: read `ceiling` and `signal_to_noise` first.

    The interval comes from a two-way bootstrap over left-out samples and targets, as in
    :func:`~lightning_attr.metrics.linear_datamodeling_score`. The ceiling of Pearson's correlation is the root of the
    reliability :math:`1 - 1/F`, with :math:`F` the mean ratio of signal to noise; that of Spearman's comes from halves
    of the seeds.

    Args:
        scores: Attribution scores of the samples left out, `(n_left_out, n_target)`, positive when the sample raises
            the output: the rows of the score matrix in the order of `differences`.
        differences: Output of the model trained on everything less that of the model trained without the sample,
            `(n_left_out, n_target)`, or `(s, n_left_out, n_target)` for s seeds. For a loss, without less everything.
        bootstrap: Number of resamples; 0 skips the interval.
        confidence: Coverage of the interval, in (0, 1).
        seed: Seed of the bootstrap.

    Returns:
        Both correlations with interval, ceiling, values by target and the number of undefined targets; signal to noise.

    Raises:
        ValueError: If shapes disagree, fewer than two samples were left out, an argument is not finite, or `bootstrap`
            or `confidence` is out of range.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import leave_one_out_correlation
        >>> scores = torch.tensor([[1.0], [2.0], [4.0], [3.0]])
        >>> result = leave_one_out_correlation(scores, differences=torch.tensor([[0.1], [0.3], [0.4], [0.2]]))
        >>> round(float(result.pearson.mean), 3), round(float(result.spearman.mean), 3)
        (0.8, 0.8)
    """
    check_bootstrap(bootstrap, confidence, seed)
    measured = _with_seeds(scores, differences)
    return _leave_one_out_score(scores.double(), measured, bootstrap, confidence, seed)


class LeaveOneOutCorrelation(IntervalMetric[LeaveOneOutScore]):
    """Leave-one-out correlation as a metric; the pure function is :func:`leave_one_out_correlation`.

    Several updates append left-out samples.

    Args:
        bootstrap: Number of resamples behind the intervals of :meth:`summary`; 0 skips them.
        confidence: Coverage of the intervals, in (0, 1).
        seed: Seed of the bootstrap.
        **kwargs: Passed to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If `bootstrap` or `confidence` is out of range.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import LeaveOneOutCorrelation
        >>> metric = LeaveOneOutCorrelation()
        >>> metric.update(torch.tensor([[1.0], [2.0]]), differences=torch.tensor([[0.1], [0.3]]))
        >>> metric.update(torch.tensor([[4.0], [3.0]]), differences=torch.tensor([[0.4], [0.2]]))
        >>> {name: round(float(value), 3) for name, value in metric.compute().items()}
        {'pearson': 0.8, 'spearman': 0.8}
    """

    plot_lower_bound = -1.0
    plot_upper_bound = 1.0

    scores: list[Tensor]
    differences: list[Tensor]

    def __init__(self, bootstrap: int = 1000, confidence: float = 0.95, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(bootstrap, confidence, seed, **kwargs)
        self.add_state("scores", default=[], dist_reduce_fx="cat")
        self.add_state("differences", default=[], dist_reduce_fx="cat")  # (n_left_out, s, n_target): to concatenate

    def update(self, scores: Tensor, differences: Tensor) -> None:
        """Add left-out samples.

        Args:
            scores: `(n_left_out, n_target)`.
            differences: `(n_left_out, n_target)`, or `(s, n_left_out, n_target)` for s seeds; the same s in every
                update.

        Raises:
            ValueError: If an argument is not as :func:`leave_one_out_correlation` wants it (one sample will do), or the
                number of seeds or of targets differs from earlier updates.
        """
        measured = _with_seeds(scores, differences, least=1).transpose(0, 1)
        if self.differences and self.differences[0].shape[1:] != measured.shape[1:]:
            raise ValueError(
                "Expected argument `differences` to have as many seeds and targets as in earlier updates,"
                f" {tuple(self.differences[0].shape[1:])}, but got {tuple(measured.shape[1:])}."
            )
        self.scores.append(scores.double())
        self.differences.append(measured)

    def compute(self) -> dict[str, Tensor]:
        """Return the mean correlations over targets, `"pearson"` and `"spearman"`, float64 scalars."""
        score = self._score(bootstrap=0)
        return {"pearson": score.pearson.mean, "spearman": score.spearman.mean}

    def _score(self, bootstrap: int) -> LeaveOneOutScore:
        scores, differences = dim_zero_cat(self.scores), dim_zero_cat(self.differences).transpose(0, 1)
        _check_least(differences.shape[1], 2)
        return _leave_one_out_score(scores, differences, bootstrap, self.confidence, self.seed)

    def _draw(self, summary: LeaveOneOutScore, ax: Axes | None) -> tuple[Figure, Axes]:
        return plot_leave_one_out_correlation(summary, ax)


def _leave_one_out_score(
    scores: Tensor, differences: Tensor, bootstrap: int, confidence: float, seed: int
) -> LeaveOneOutScore:
    scores = scores.to(differences.device)
    pearson = correlation_score(scores, differences, "pearson", bootstrap, confidence, seed)
    spearman = correlation_score(scores, differences, "spearman", bootstrap, confidence, seed)
    warn_undefined(spearman, "leave-one-out correlation", "left-out samples")
    return LeaveOneOutScore(pearson, spearman, signal_to_noise(differences))


def _with_seeds(scores: Tensor, differences: Tensor, least: int = 2) -> Tensor:
    # Differences as (s, n_left_out, n_target), float64, once both arguments fit together.
    check_matrix("scores", scores)
    check_finite("scores", scores)
    _check_least(len(scores), least)
    check_tensor(None, "differences", differences)
    if differences.ndim not in {2, 3} or differences.shape[-2:] != scores.shape or differences.numel() == 0:
        raise ValueError(
            "Expected argument `differences` to have shape (n_left_out, n_target) ="
            f" {tuple(scores.shape)} as `scores`, or (s, n_left_out, n_target), but got {tuple(differences.shape)}."
        )
    check_finite("differences", differences)
    return differences.double().reshape(-1, *scores.shape)


def _check_least(n_left_out: int, least: int) -> None:
    if n_left_out < least:
        raise ValueError(f"Expected at least {least} left-out samples, but got {n_left_out}.")


def plot_leave_one_out_correlation(score: LeaveOneOutScore, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Plot both correlations by target as histograms, with their means, intervals and the ceiling of Spearman's.

    Args:
        score: Result of :func:`~lightning_attr.metrics.leave_one_out_correlation`.
        ax: Where to draw; a new figure by default.

    Returns:
        The figure and its axes.

    Raises:
        TypeError: If `score` is none.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import leave_one_out_correlation, plot_leave_one_out_correlation
        >>> scores = torch.tensor([[1.0, 2.0], [2.0, 1.0], [4.0, 0.0]])
        >>> fig, ax = plot_leave_one_out_correlation(leave_one_out_correlation(scores, scores, bootstrap=0))
        >>> ax.get_xlabel()
        'correlation over left-out samples'
    """
    check_instance(
        "plot_leave_one_out_correlation", "score", score, LeaveOneOutScore, "what `leave_one_out_correlation` returns"
    )
    fig, ax = new_axes(ax)
    results = {"Pearson": (score.pearson, BLUE), "Spearman": (score.spearman, ORANGE)}
    values = {name: defined(result.per_target) for name, (result, _) in results.items()}
    lowest = min((float(v.min()) for v in values.values() if len(v)), default=0.0)
    bins = torch.linspace(min(0.0, lowest), 1, 25).tolist()
    for name, (result, color) in results.items():
        ax.hist(values[name].clamp(max=1).numpy(), bins=bins, color=color, alpha=0.35)
        draw_mean(ax, name, result, color)
    if not score.spearman.ceiling.isnan():
        ceiling = float(score.spearman.ceiling)
        ax.axvline(ceiling, linestyle="--", color=BLACK, label=f"ceiling of Spearman's {ceiling:.3f}")
    ax.set(xlabel="correlation over left-out samples", ylabel="targets")
    legend_above(ax)
    return fig, ax
