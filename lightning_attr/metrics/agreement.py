"""Agreement between two attribution methods: Kendall's tau-b, Spearman's correlation and overlap of the top k."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchmetrics.utilities import dim_zero_cat

from lightning_attr.arguments.checks import check_instance, check_int
from lightning_attr.metrics.bootstrap import IntervalMetric, check_bootstrap, count_undefined, mean_interval
from lightning_attr.metrics.checks import check_finite, check_matrix, check_vector
from lightning_attr.metrics.figures import BLUE, GREY, defined, legend_above, new_axes
from lightning_attr.metrics.ranks import chance_in_top, rank_correlation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STATISTICS = ("kendall", "spearman", "overlap", "jaccard")


class RankAgreementScore(NamedTuple):
    """Result of :func:`rank_agreement`; float64 on the device of the scores, by the names of the statistics.

    The statistics are `"kendall"`, `"spearman"`, `"overlap"` (share of the top k in common) and `"jaccard"` (of the
    samples in either top k, the share in both).

    Attributes:
        mean: Mean of each statistic over the targets where it is defined, `()`.
        low: Lower end of its bootstrap interval, `()`; NaN with `bootstrap=0`.
        high: Upper end of its bootstrap interval, `()`; NaN with `bootstrap=0`.
        per_target: Each statistic by target, `(n_target,)`; NaN where undefined.
        undefined: Number of targets whose correlations do not exist because a method's scores are constant.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import rank_agreement
        >>> agreement = rank_agreement(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[1.0], [3.0], [2.0]]), k=2)
        >>> {name: round(float(value), 3) for name, value in agreement.mean.items()}
        {'kendall': 0.333, 'spearman': 0.5, 'overlap': 1.0, 'jaccard': 1.0}
    """

    mean: dict[str, Tensor]
    low: dict[str, Tensor]
    high: dict[str, Tensor]
    per_target: dict[str, Tensor]
    undefined: int


def kendall(a: Tensor, b: Tensor) -> Tensor:
    r"""Kendall's tau-b: concordant less discordant pairs over the geometric mean of the pairs untied in a and in b.

    Discordant pairs are counted while merging, in :math:`O(n \log^2 n)` (Knight 1966).

    Args:
        a: Shape `(n,)`, any real dtype.
        b: Shape `(n,)`, any real dtype.

    Returns:
        float64 scalar in [-1, 1]; NaN when `a` or `b` is constant, where the correlation is undefined.

    Raises:
        ValueError: If an argument is not a non-empty finite vector, or the lengths differ.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import kendall
        >>> kendall(torch.tensor([0.1, 0.2, 0.9]), torch.tensor([1.0, 5.0, 3.0]))
        tensor(0.3333, dtype=torch.float64)
    """
    check_vector("a", a)
    check_vector("b", b, like=("a", a))
    return _kendall(a.unsqueeze(0), b.unsqueeze(0))[0]


def rank_agreement(
    first: Tensor,
    second: Tensor,
    k: int = 10,
    bootstrap: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> RankAgreementScore:
    """Compare how two methods rank the training samples, for each target and averaged over targets.

    Samples tied at the threshold of a top k count with their chance of inclusion. The intervals hold the percentiles of
    a bootstrap over targets.

    Args:
        first: Scores of one method, `(n_train, n_target)`.
        second: Scores of the other method for the same samples and targets, `(n_train, n_target)`.
        k: Number of top proponents compared, from 1 to n_train.
        bootstrap: Number of resamples; 0 skips the intervals.
        confidence: Coverage of the intervals, in (0, 1).
        seed: Seed of the bootstrap.

    Returns:
        Means, intervals and values by target of the four statistics, and the number of undefined targets.

    Raises:
        ValueError: If the scores are not finite matrices of one shape, or `k`, `bootstrap` or `confidence` is out of
            range.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import rank_agreement
        >>> scores = torch.tensor([[0.3, 0.1], [0.2, 0.5], [0.1, 0.9]])
        >>> rank_agreement(scores, scores.flip(0), k=1).per_target["kendall"]
        tensor([-1., -1.], dtype=torch.float64)
    """
    check_bootstrap(bootstrap, confidence, seed)
    return _agreement_score(_statistics(first, second, k), bootstrap, confidence, seed)


class RankAgreement(IntervalMetric[RankAgreementScore]):
    """Agreement of two methods' rankings as a metric; the pure function is :func:`rank_agreement`.

    Several updates add targets.

    Args:
        k: Number of top proponents compared, from 1 to n_train.
        bootstrap: Number of resamples behind the intervals of :meth:`summary`; 0 skips them.
        confidence: Coverage of the intervals, in (0, 1).
        seed: Seed of the bootstrap.
        **kwargs: Passed to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If `k`, `bootstrap` or `confidence` is out of range.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import RankAgreement
        >>> metric = RankAgreement(k=1)
        >>> metric.update(torch.tensor([[0.3], [0.2], [0.1]]), torch.tensor([[0.3], [0.1], [0.2]]))
        >>> {name: round(float(value), 3) for name, value in metric.compute().items()}
        {'kendall': 0.333, 'spearman': 0.5, 'overlap': 1.0, 'jaccard': 1.0}
    """

    plot_lower_bound = -1.0
    plot_upper_bound = 1.0

    statistics: list[Tensor]

    def __init__(
        self, k: int = 10, bootstrap: int = 1000, confidence: float = 0.95, seed: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(bootstrap, confidence, seed, **kwargs)
        k = check_int(self, "k", k, minimum=1)
        self.k = k
        self.add_state("statistics", default=[], dist_reduce_fx="cat")  # (n_target, 4)

    def update(self, first: Tensor, second: Tensor) -> None:
        """Add targets.

        Args:
            first: Scores of one method, `(n_train, n_target)`.
            second: Scores of the other method for the same samples and targets, `(n_train, n_target)`.

        Raises:
            ValueError: If the scores are not finite matrices of one shape with at least k rows.
        """
        self.statistics.append(_statistics(first, second, self.k))

    def compute(self) -> dict[str, Tensor]:
        """Return the mean over targets of each statistic, float64 scalars."""
        return self._score(bootstrap=0).mean

    def _score(self, bootstrap: int) -> RankAgreementScore:
        return _agreement_score(dim_zero_cat(self.statistics), bootstrap, self.confidence, self.seed)

    def _draw(self, summary: RankAgreementScore, ax: Axes | None) -> tuple[Figure, Axes]:
        return plot_rank_agreement(summary, self.k, ax)


def _agreement_score(statistics: Tensor, bootstrap: int, confidence: float, seed: int) -> RankAgreementScore:
    per_target = dict(zip(STATISTICS, statistics.T, strict=True))
    undefined = count_undefined(per_target["kendall"], "rank correlation", "a method's scores are constant")
    ends = {name: mean_interval(values, bootstrap, confidence, seed) for name, values in per_target.items()}
    return RankAgreementScore(
        {name: values.nanmean() for name, values in per_target.items()},
        {name: low for name, (low, _) in ends.items()},
        {name: high for name, (_, high) in ends.items()},
        per_target,
        undefined,
    )


def _statistics(first: Tensor, second: Tensor, k: int) -> Tensor:
    """Return the four statistics of each target, `(n_target, 4)`, float64."""
    for name, scores in (("first", first), ("second", second)):
        check_matrix(name, scores)
        check_finite(name, scores)
    if first.shape != second.shape:
        raise ValueError(
            "Expected arguments `first` and `second` to have one shape (n_train, n_target),"
            f" but got {tuple(first.shape)} and {tuple(second.shape)}."
        )
    check_int(None, "k", k, 1, len(first), remedy=f"There are {len(first)} training samples.")
    rows = []
    for a, b in zip(first.T.split(64), second.to(first.device).T.split(64), strict=True):  # bounds the working memory
        shared = (chance_in_top(a, k) * chance_in_top(b, k)).sum(1)
        rows.append(torch.stack([_kendall(a, b), rank_correlation(a, b), shared / k, shared / (2 * k - shared)], 1))
    return torch.cat(rows)


def _kendall(a: Tensor, b: Tensor) -> Tensor:
    """Return tau-b of each row of two `(q, n)` matrices, `(q,)`, float64; NaN where a row is constant.

    By hand: scipy, which is no dependency, takes a row at a time on the CPU, and torchmetrics compares all pairs.
    """
    n = a.shape[1]
    a, b = _dense_ranks(a), _dense_ranks(b)
    pairs = n * (n - 1) // 2
    order = (a * n + b).argsort(dim=1)  # by a, then by b: what is tied in a is no inversion of b
    discordant = _inversions(b.gather(1, order))
    tied_a, tied_b, tied_both = (_tied_pairs(ranks) for ranks in (a, b, a * n + b))
    balance = pairs - tied_a - tied_b + tied_both - 2 * discordant
    return balance / ((pairs - tied_a).double() * (pairs - tied_b)).sqrt()


def _dense_ranks(values: Tensor) -> Tensor:
    """Return for each value how many of its row are smaller, `(q, n)`, int64."""
    values = values.contiguous()
    return torch.searchsorted(values.sort(dim=1).values, values)


def _tied_pairs(ranks: Tensor) -> Tensor:
    """Return the number of pairs of equal values in each row, `(q,)`."""
    ordered = ranks.sort(dim=1).values
    first = torch.searchsorted(ordered, ordered)  # each value pairs with the equal ones in front of it
    return (torch.arange(ranks.shape[1], device=ranks.device) - first).sum(1)


def _inversions(ranks: Tensor) -> Tensor:
    """Return the number of pairs in each row of `(q, n)` whose first value is larger, `(q,)`, by merging."""
    q, n = ranks.shape
    width = 1
    total = ranks.new_zeros(q)
    padded = 2 ** max(1, (n - 1).bit_length())
    ranks = pad(ranks, (0, padded - n), value=n)  # at the end and largest: in no inversion
    while width < padded:
        left, right = ranks.reshape(q, -1, 2, width).unbind(2)
        not_larger = torch.searchsorted(left.contiguous(), right.contiguous(), right=True)
        total += (width - not_larger).sum((1, 2))
        width *= 2
        ranks = ranks.reshape(q, -1, width).sort(dim=2).values.reshape(q, -1)
    return total


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

    Raises:
        TypeError: If `agreement` is none.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import plot_rank_agreement, rank_agreement
        >>> scores = torch.tensor([[1.0, 2.0], [2.0, 5.0], [3.0, 1.0]])
        >>> fig, ax = plot_rank_agreement(rank_agreement(scores, scores.square(), k=2))
        >>> ax.get_ylabel()
        'agreement'
    """
    check_instance("plot_rank_agreement", "agreement", agreement, RankAgreementScore, "what `rank_agreement` returns")
    fig, ax = new_axes(ax)
    top = "top" if k is None else f"top {k:,}"
    labels = {"kendall": "Kendall", "spearman": "Spearman", "overlap": f"{top}\nshared", "jaccard": f"{top}\nJaccard"}
    boxes = [defined(agreement.per_target[name]).numpy() for name in labels]
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
    legend_above(ax)
    return fig, ax
