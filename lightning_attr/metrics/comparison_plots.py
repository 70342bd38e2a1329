"""Figures of the metrics that need retraining, an annotation, or a second method.

Made as in :mod:`lightning_attr.metrics.plotting`: outside pyplot, blue for the method, grey for chance, red for the
opposite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_attr.metrics.plotting import (
    _COLORS,
    BLACK,
    BLUE,
    GREY,
    _draw_inspection,
    _legend_above,
    _percent_ticks,
    new_axes,
)
from lightning_attr.metrics.precision import noisy_label_precision, noisy_label_precision_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_attr.metrics.agreement import RankAgreementScore
    from lightning_attr.metrics.brittleness import FlipCurve
    from lightning_attr.metrics.correlation import CorrelationScore
    from lightning_attr.metrics.datamodeling import DatamodelingScore
    from lightning_attr.metrics.leave_one_out import LeaveOneOutScore
    from lightning_attr.metrics.output_change import OutputChange
    from lightning_attr.metrics.retrieval import RetrievalScore

ORANGE = _COLORS[1]
_MARKERS = "os^Dvph*"


def plot_datamodeling_score(score: DatamodelingScore, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Plot the correlations by target as a histogram, with their mean, its interval and the ceiling.

    Args:
        score: Result of :func:`~lightning_attr.metrics.linear_datamodeling_score`.
        ax: Where to draw; a new figure by default.

    Returns:
        The figure and its axes.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import linear_datamodeling_score, plot_datamodeling_score
        >>> scores, masks = torch.eye(4), 1 - torch.eye(4)
        >>> fig, ax = plot_datamodeling_score(linear_datamodeling_score(scores, masks, outputs=masks, bootstrap=0))
        >>> ax.get_xlabel()
        'Spearman correlation over subsets'
    """
    fig, ax = new_axes(ax)
    defined = _defined(score.per_target).numpy()
    ax.hist(defined, bins="auto", range=(min(0.0, defined.min(initial=0)), 1), color=BLUE, alpha=0.35)
    _draw_mean(ax, "mean", score)
    if not score.ceiling.isnan():
        ax.axvline(float(score.ceiling), linestyle="--", color=BLACK, label=f"ceiling {float(score.ceiling):.3f}")
    ax.set(xlabel="Spearman correlation over subsets", ylabel="targets")
    _legend_above(ax)
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
        color, marker = _COLORS[i % len(_COLORS)], _MARKERS[i % len(_MARKERS)]
        ax.errorbar(x, y, yerr=spread, fmt=f"{marker}-", color=color, markersize=5, capsize=2.5, label=family)
    if ceiling is not None:
        ax.axhline(float(ceiling), linestyle="--", color=BLACK, linewidth=1, label="ceiling")
    ax.set(xlabel=cost, ylabel=score, xscale="log")
    ax.margins(x=0.12)
    _legend_above(ax)
    return fig, ax


def _families(rows: Mapping[str, tuple[float, float, float, float]]) -> dict[str, list[tuple[float, ...]]]:
    # Rows by what stands before the first comma of their name; a lone row keeps its whole name.
    if not rows:
        raise ValueError("Expected argument `rows` to hold at least one method, but it is empty.")
    families: dict[str, list[tuple[float, ...]]] = {}
    names: dict[str, list[str]] = {}
    for name, row in rows.items():
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


def plot_precision_curve(
    self_influence: Tensor | Mapping[str, Tensor],
    noise_mask: Tensor,
    fraction: float | None = None,
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Plot the share of mislabelled samples among those inspected, with random and ideal inspection.

    Args:
        self_influence: Shape `(n_train,)`, high means suspicious; or several such vectors by name, to compare.
        noise_mask: Shape `(n_train,)`, bool or 0/1; True marks a mislabelled sample.
        fraction: Share inspected at which the precision is marked and given in the legend.
        ax: Where to draw; a new figure by default.

    Returns:
        The figure and its axes.

    Raises:
        ValueError: If the values are not a non-empty finite vector, the mask is not 0/1 of the same length with samples
            of both kinds, or `fraction` is outside (0, 1].

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import plot_precision_curve
        >>> fig, ax = plot_precision_curve(torch.tensor([0.9, 0.1, 0.4]), torch.tensor([True, False, False]))
        >>> ax.get_ylabel()
        'mislabelled among inspected'
    """
    fig, ax = _draw_inspection(
        self_influence, noise_mask, fraction, noisy_label_precision_curve, noisy_label_precision, ax
    )
    share = float(noise_mask.double().mean())
    inspected = torch.linspace(0, 1, len(noise_mask) + 1, dtype=torch.float64)[1:]
    ax.plot(inspected, (share / inspected).clamp(max=1), "--", color=BLACK, linewidth=1, label="ideal")
    ax.plot([0, 1], [share, share], ":", color=GREY, label="random")
    ax.set_ylabel("mislabelled among inspected")
    _legend_above(ax)
    return fig, ax


def plot_leave_one_out_correlation(score: LeaveOneOutScore, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Plot both correlations by target as histograms, with their means, intervals and the ceiling of Spearman's.

    Args:
        score: Result of :func:`~lightning_attr.metrics.leave_one_out_correlation`.
        ax: Where to draw; a new figure by default.

    Returns:
        The figure and its axes.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import leave_one_out_correlation, plot_leave_one_out_correlation
        >>> scores = torch.tensor([[1.0, 2.0], [2.0, 1.0], [4.0, 0.0]])
        >>> fig, ax = plot_leave_one_out_correlation(leave_one_out_correlation(scores, scores, bootstrap=0))
        >>> ax.get_xlabel()
        'correlation over left-out samples'
    """
    fig, ax = new_axes(ax)
    results = {"Pearson": (score.pearson, BLUE), "Spearman": (score.spearman, ORANGE)}
    values = {name: _defined(result.per_target) for name, (result, _) in results.items()}
    lowest = min((float(v.min()) for v in values.values() if len(v)), default=0.0)
    bins = torch.linspace(min(0.0, lowest), 1, 25).tolist()
    for name, (result, color) in results.items():
        ax.hist(values[name].clamp(max=1).numpy(), bins=bins, color=color, alpha=0.35)
        _draw_mean(ax, name, result, color)
    if not score.spearman.ceiling.isnan():
        ceiling = float(score.spearman.ceiling)
        ax.axvline(ceiling, linestyle="--", color=BLACK, label=f"ceiling of Spearman's {ceiling:.3f}")
    ax.set(xlabel="correlation over left-out samples", ylabel="targets")
    _legend_above(ax)
    return fig, ax


def plot_brittleness_curve(curve: FlipCurve, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Plot the share of targets that removal flips against the number of samples removed, with 95 % bands.

    Args:
        curve: Result of :func:`~lightning_attr.metrics.brittleness_curve`.
        ax: Where to draw; a new figure by default.

    Returns:
        The figure and its axes.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import brittleness_curve, plot_brittleness_curve
        >>> curve = brittleness_curve([10, 20], torch.tensor([1.0, 2.0]), torch.tensor([[0.1, 1.0], [-1.0, 0.5]]))
        >>> fig, ax = plot_brittleness_curve(curve)
        >>> ax.get_ylabel()
        'targets flipped'
    """
    fig, ax = new_axes(ax)
    styles = {"method": ("o-", BLUE), "random": ("s:", GREY), "same_class": ("^--", ORANGE)}
    counts = curve.counts.cpu()
    for arm, (style, color) in styles.items():
        if arm not in curve.success:
            continue
        success, low, high = (values[arm].cpu() for values in (curve.success, curve.low, curve.high))
        ax.plot(counts, success, style, color=color, markersize=4, label=arm.replace("_", " "))
        ax.fill_between(counts, low, high, color=color, alpha=0.15, linewidth=0)
    ax.set(xlabel="training samples removed", ylabel="targets flipped", ylim=(-0.02, 1.02))
    if len(counts) > 2 and counts[-1] - counts[-2] >= 4 * (counts[1] - counts[0]):  # doubling counts
        ax.set_xscale("log")
        ax.minorticks_off()
        ax.set_xticks(counts[:: math.ceil(len(counts) / 8)].tolist())
        ax.xaxis.set_major_formatter("{x:.0f}")
    _percent_ticks(ax, "y")
    _legend_above(ax)
    return fig, ax


def plot_output_change(
    change: OutputChange, label: str = "change of output", ax: Axes | None = None
) -> tuple[Figure, Axes]:
    """Plot for each target the change by the method's samples against that by random ones.

    Targets above the diagonal are those for which the method's samples matter more.

    Args:
        change: Result of :func:`~lightning_attr.metrics.query_loss_difference` or
            :func:`~lightning_attr.metrics.tail_patch`.
        label: What changed, for the axes.
        ax: Where to draw; a new figure by default.

    Returns:
        The figure and its axes.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import plot_output_change, tail_patch
        >>> change = tail_patch(torch.zeros(2), method=torch.tensor([0.5, 0.3]), random=torch.tensor([0.1, 0.1]))
        >>> fig, ax = plot_output_change(change)
        >>> ax.get_xlabel()
        'change of output, random samples'
    """
    fig, ax = new_axes(ax)
    random, method = change.random.cpu(), change.method.cpu()
    above = float((method > random).double().mean())
    mean = _with_interval(change.mean, change.low, change.high)
    ax.plot(random, method, "o", color=BLUE, markersize=3.5, alpha=0.5, label=f"targets ({above:.0%} above)")
    ax.axline((float(random.mean()),) * 2, slope=1, linestyle=":", color=GREY, label="no difference")
    shifted = (float(random.mean()), float(random.mean() + change.mean))
    ax.axline(shifted, slope=1, color=BLUE, linewidth=1, label=f"mean difference {mean}")
    ax.set(xlabel=f"{label}, random samples", ylabel="top proponents")
    _legend_above(ax)
    return fig, ax


def plot_retrieval(
    score: RetrievalScore, label: str = "reciprocal rank", ax: Axes | None = None
) -> tuple[Figure, Axes]:
    """Plot the values by target as a histogram, with their mean and its interval.

    Args:
        score: Result of :func:`~lightning_attr.metrics.mean_reciprocal_rank` or
            :func:`~lightning_attr.metrics.recall_at_k`.
        label: Name of the value, the label of the horizontal axis.
        ax: Where to draw; a new figure by default.

    Returns:
        The figure and its axes.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import mean_reciprocal_rank, plot_retrieval
        >>> fig, ax = plot_retrieval(mean_reciprocal_rank(torch.tensor([[0.1], [0.7]]), [[0]]))
        >>> ax.get_xlabel()
        'reciprocal rank'
    """
    fig, ax = new_axes(ax)
    ax.hist(_defined(score.per_target).numpy(), bins=torch.linspace(0, 1, 21).tolist(), color=BLUE, alpha=0.35)
    _draw_mean(ax, "mean", score)
    ax.set(xlabel=label, ylabel="targets", xlim=(-0.02, 1.02))
    _legend_above(ax)
    return fig, ax


def plot_rank_agreement(
    agreement: RankAgreementScore, k: int | None = None, ax: Axes | None = None
) -> tuple[Figure, Axes]:
    """Plot the spread of each statistic over the targets, a box from quartile to quartile, with its mean and interval.

    Args:
        agreement: Result of :func:`~lightning_attr.metrics.rank_agreement`.
        k: Number of top proponents compared, for the labels.
        ax: Where to draw; a new figure by default.

    Returns:
        The figure and its axes.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import plot_rank_agreement, rank_agreement
        >>> scores = torch.tensor([[1.0, 2.0], [2.0, 5.0], [3.0, 1.0]])
        >>> fig, ax = plot_rank_agreement(rank_agreement(scores, scores.square(), k=2))
        >>> ax.get_ylabel()
        'agreement'
    """
    fig, ax = new_axes(ax)
    top = "top" if k is None else f"top {k:,}"
    labels = {"kendall": "Kendall", "spearman": "Spearman", "overlap": f"{top}\nshared", "jaccard": f"{top}\nJaccard"}
    boxes = [_defined(agreement.per_target[name]).numpy() for name in labels]
    ax.boxplot(boxes, widths=0.5, medianprops={"color": GREY}, flierprops={"markersize": 2, "markeredgecolor": GREY})
    for place, name in enumerate(labels, start=1):
        mean, low, high = (float(values[name]) for values in (agreement.mean, agreement.low, agreement.high))
        spread = None if math.isnan(low) else [[mean - low], [high - mean]]
        label = "mean and its interval" if place == 1 else None
        ax.errorbar([place], [mean], yerr=spread, fmt="o", color=BLUE, markersize=4, capsize=4, label=label)
        ax.text(place + 0.3, mean, f"{mean:.2f}", va="center", fontsize=8, color=BLUE)
    ax.axhline(0, color=GREY, linestyle=":", linewidth=1)
    ax.set_xticks(range(1, len(labels) + 1), list(labels.values()), fontsize=8)
    ax.set(ylabel="agreement", xlim=(0.5, len(labels) + 0.85), ylim=(min(ax.get_ylim()[0], -0.05), 1.05))
    _legend_above(ax)
    return fig, ax


def _draw_mean(ax: Axes, name: str, score: CorrelationScore | RetrievalScore, color: str = BLUE) -> None:
    ax.axvline(float(score.mean), color=color, label=f"{name} {_with_interval(score.mean, score.low, score.high)}")
    if not score.low.isnan():
        ax.axvspan(float(score.low), float(score.high), color=color, alpha=0.25, linewidth=0)


def _defined(values: Tensor) -> Tensor:
    return values[~values.isnan()].cpu()


def _with_interval(mean: Tensor, low: Tensor, high: Tensor) -> str:
    interval = "" if low.isnan() else f" ({float(low):.3f} to {float(high):.3f})"
    return f"{float(mean):.3f}{interval}"
