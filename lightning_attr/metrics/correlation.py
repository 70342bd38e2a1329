"""Correlation of predicted with measured effects: by target, with interval, noise ceiling and undefined targets."""

from __future__ import annotations

import warnings
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_attr.metrics.bootstrap import Ranking, Values, correlation, two_way_interval
from lightning_attr.metrics.ranks import rank_correlation


class CorrelationScore(NamedTuple):
    """A correlation averaged over targets; all tensors float64 on the device of what was measured.

    Attributes:
        mean: Mean of `per_target` over the targets where it is defined, `()`.
        low: Lower end of the bootstrap interval, `()`; NaN with `bootstrap=0`.
        high: Upper end of the bootstrap interval, `()`; NaN with `bootstrap=0`.
        ceiling: What perfect predictions would reach given the noise of retraining, `()`; NaN with one seed.
        per_target: Correlation, `(n_target,)`; NaN where undefined.
        undefined: Number of targets left out because predictions or measurements are constant.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import leave_one_out_correlation
        >>> scores = torch.tensor([[1.0], [2.0], [4.0]])
        >>> leave_one_out_correlation(scores, differences=scores.square(), bootstrap=0).spearman.mean
        tensor(1., dtype=torch.float64)
    """

    mean: Tensor
    low: Tensor
    high: Tensor
    ceiling: Tensor
    per_target: Tensor
    undefined: int


def correlation_score(
    predicted: Tensor,
    measured: Tensor,
    kind: Literal["pearson", "spearman"],
    bootstrap: int,
    confidence: float,
    seed: int,
) -> CorrelationScore:
    """Correlate predictions with measurements averaged over seeds, for each target.

    Shapes: predicted (m, n_target), measured (s, m, n_target). Returns the score; `undefined` is counted but not warned
    of.
    """
    centering = Ranking if kind == "spearman" else Values
    a, b = predicted.T, measured.mean(0).T  # (n_target, m)
    per_target = correlation(centering(a), centering(b), a.new_ones(a.shape[1]))
    defined = ~per_target.isnan()
    mean = per_target.nanmean()
    low, high = two_way_interval(
        mean,
        centering(a[defined]),
        centering(b[defined]),
        (int(defined.sum()), a.shape[1]),
        bootstrap,
        confidence,
        seed,
    )
    ceiling = rank_ceiling(measured) if kind == "spearman" else linear_ceiling(measured)
    return CorrelationScore(mean, low, high, ceiling, per_target, int((~defined).sum()))


def warn_undefined(score: CorrelationScore, metric: str, rows: str) -> None:
    """Warn when the correlation of more than 1 % of the targets does not exist.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics.correlation import correlation_score, warn_undefined
        >>> values = torch.eye(3).double()
        >>> warn_undefined(correlation_score(values, values[None], "pearson", 0, 0.95, 0), "score", "rows")
    """
    if score.undefined > 0.01 * len(score.per_target):
        warnings.warn(
            f"The correlation of {score.undefined} of {len(score.per_target)} targets is undefined, as their scores or"
            f" outputs are constant over the {rows}; they are left out of the {metric}.",
            stacklevel=4,
        )


def rank_ceiling(measured: Tensor) -> Tensor:
    """Root of the reliability of the ranks of measurements averaged over seeds.

    The rank correlation between the means of two halves of the seeds, averaged over rotations of the seeds and over
    targets, carried to all seeds by the Spearman-Brown formula.

    Shapes: measured (s, m, n_target). Returns float64 scalar in [0, 1]; NaN with one seed.
    """
    n_seeds = len(measured)
    half = n_seeds // 2
    if half == 0:
        return measured.new_tensor(torch.nan)
    correlations = []
    for shift in range(n_seeds):  # rotations, so that every seed has the same say
        rotated = measured.roll(shift, dims=0)
        correlations.append(rank_correlation(rotated[:half].mean(0).T, rotated[half : 2 * half].mean(0).T))
    reliability = torch.stack(correlations).nanmean().clamp(min=0)
    length = n_seeds / half  # 2 for even numbers of seeds; odd numbers leave one seed out of each split
    return (length * reliability / (1 + (length - 1) * reliability)).sqrt()


def linear_ceiling(measured: Tensor) -> Tensor:
    """Root of the reliability of measurements averaged over seeds: 1 - 1 / F, mean over targets, at least 0.

    Shapes: measured (s, m, n_target). Returns float64 scalar in [0, 1]; NaN with one seed. F is
    :func:`signal_to_noise`.
    """
    return (1 - 1 / signal_to_noise(measured)).nanmean().clamp(min=0).sqrt()


def signal_to_noise(measured: Tensor) -> Tensor:
    r"""Variance of the seeds' mean over the rows, against what the noise of retraining alone gives it.

    :math:`F = s \, \mathrm{var}_i(\bar y_i) / \mathrm{MS}_e` of the analysis of variance with rows and seeds, where
    :math:`\mathrm{MS}_e` is the variance left once the means of rows and of seeds are taken off. A seed that moves all
    rows alike (it trained the reference, too) is no noise to a correlation over the rows.

    Shapes: measured (s, m, n_target). Returns `(n_target,)`, float64, at least 0: near 1 for noise alone, infinite
    without noise; NaN with one seed, and for targets where nothing varies.
    """
    s, m, n_target = measured.shape
    if s < 2:
        return measured.new_full((n_target,), torch.nan)
    measured = measured - measured[:1, :1]  # constants are zeros then, whatever their mean rounds to
    rows, seeds = measured.mean(0), measured.mean(1)
    residual = measured - rows - seeds.unsqueeze(1) + rows.mean(0)
    noise = residual.square().sum((0, 1)) / ((s - 1) * (m - 1))
    return s * rows.var(0) / noise
