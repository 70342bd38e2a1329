"""Bootstrap intervals: of a mean over targets, and of a mean correlation over rows and targets together."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchmetrics import Metric

from lightning_attr.arguments.checks import check_float, check_int, check_seed
from lightning_attr.metrics.figures import new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Summary = TypeVar("Summary")


class IntervalMetric(Metric, Generic[Summary]):
    """A metric with a bootstrap interval behind its summary, the result of the pure function.

    Args:
        bootstrap: Number of resamples; 0 skips the interval.
        confidence: Coverage of the interval, in (0, 1).
        seed: Seed of the bootstrap.
        **kwargs: Passed to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If `bootstrap` or `confidence` is out of range.

    Example:
        >>> from lightning_attr.metrics import MeanReciprocalRank
        >>> MeanReciprocalRank(bootstrap=100, confidence=0.9).confidence
        0.9
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(self, bootstrap: int = 1000, confidence: float = 0.95, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_bootstrap(bootstrap, confidence, seed)
        self.bootstrap, self.confidence, self.seed = bootstrap, confidence, seed

    def summary(self) -> Summary:
        """Return means, intervals and values by target, as the pure function does, over all processes."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self.sync_on_compute):
            return self._score(self.bootstrap)

    def plot(
        self,
        val: Tensor | dict[str, Tensor] | list[Tensor] | list[dict[str, Tensor]] | None = None,
        ax: Axes | None = None,
    ) -> tuple[Figure, Axes]:
        """Plot the values by target with means and intervals, or given values of the metric.

        Args:
            val: Result of :meth:`compute`, or a list of them, drawn as they are; by default the state is drawn.
            ax: Where to draw; a new figure by default.

        Returns:
            The figure and its axes.
        """
        if val is None:
            return self._draw(self.summary(), ax)
        fig, ax = new_axes(ax)
        self._plot(val, ax)
        return fig, ax

    @abstractmethod
    def _score(self, bootstrap: int) -> Summary:
        """Compute the summary from the states, with so many resamples."""

    @abstractmethod
    def _draw(self, summary: Summary, ax: Axes | None) -> tuple[Figure, Axes]:
        """Plot a summary."""


class Centering(Protocol):
    """What a correlation is computed from: rows of values less their mean."""

    def centered(self, counts: Tensor) -> Tensor:
        """Return the centred rows `(n_target, m)` when column k counts `counts[k]` times."""


class Ranking:
    """Midranks of the rows of `(n_target, m)` values when column k counts `counts[k]` times, after one sort."""

    def __init__(self, values: Tensor) -> None:
        ordered, self.order = values.contiguous().sort(dim=1)
        self.smaller = torch.searchsorted(ordered, values.contiguous())
        self.smaller_or_equal = torch.searchsorted(ordered, values.contiguous(), right=True)

    def centered(self, counts: Tensor) -> Tensor:
        """Return the midranks `(n_target, m)` less their mean, the centre of 1 to `counts.sum()`."""
        passed = pad(counts[self.order].cumsum(1), (1, 0))
        return (passed.gather(1, self.smaller) + passed.gather(1, self.smaller_or_equal) - counts.sum()) / 2


class Values:
    """The rows of `(n_target, m)` values themselves, for Pearson's correlation."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def centered(self, counts: Tensor) -> Tensor:
        """Return the values `(n_target, m)` less their mean; exact zeros where all that count are equal."""
        # Rounding of the mean would give a constant row a correlation: measured from one of its values, it is zeros.
        drawn = counts > 0
        shifted = self.values - self.values[:, drawn][:, :1]
        return shifted - (shifted @ counts / counts.sum()).unsqueeze(1)


def correlation(a: Centering, b: Centering, counts: Tensor) -> Tensor:
    """Return the correlation of each row `(n_target,)`, column k counted `counts[k]` times; NaN if one is constant."""
    x, y = a.centered(counts), b.centered(counts)
    norm = ((x.square() @ counts) * (y.square() @ counts)).sqrt()
    return ((x * y) @ counts) / norm


def two_way_interval(
    mean: Tensor, a: Centering, b: Centering, shape: tuple[int, int], bootstrap: int, confidence: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Return the interval around a mean of correlations, from resamples of rows and of targets together.

    The percentiles are moved so that the bootstrap's mean falls on `mean`: columns that a resample repeats lower every
    rank correlation of it. They are then drawn together, for a two-way bootstrap counts three times the variance that
    belongs to single pairs of column and target (Owen 2007). The variance wanted is that of resampled columns plus that
    of resampled targets, less that of pairs, which both hold: what a resample does beyond the sum of the two.

    Shapes: shape (n_target, m). Returns both ends, `()`, float64, in [-1, 1].
    """
    n_target, m = shape
    if bootstrap == 0 or n_target == 0:
        return mean.new_tensor(torch.nan), mean.new_tensor(torch.nan)
    generator = torch.Generator().manual_seed(seed)
    per_target = correlation(a, b, mean.new_ones(m))
    effects = []
    for _ in range(bootstrap):
        column_counts = _resample(m, generator).to(mean)
        target_counts = _resample(n_target, generator).to(mean)
        resampled = correlation(a, b, column_counts)
        by_columns, by_targets = resampled.nanmean(), per_target @ target_counts / n_target
        target_counts[resampled.isnan()] = 0  # a resample of few distinct columns can be constant
        by_both = (resampled.nan_to_num() @ target_counts) / target_counts.sum()
        effects.append(torch.stack([by_both, by_columns, by_targets, by_both - by_columns - by_targets]))
    values = torch.stack(effects)
    values = values[~values.isnan().any(1)]
    if len(values) < 2:
        return mean.new_tensor(torch.nan), mean.new_tensor(torch.nan)
    both, columns, targets, pairs = values.var(0)
    more_columns, more_targets = m / (m - 1), n_target / max(1, n_target - 1)  # a resample varies by n - 1 of n
    columns, targets, pairs = columns * more_columns, targets * more_targets, pairs * more_columns * more_targets
    wanted = torch.maximum(columns + targets - pairs, torch.maximum(columns, targets))
    tail = (1 - confidence) / 2
    ends = values[:, 0].quantile(mean.new_tensor([tail, 1 - tail])) - values[:, 0].mean()
    low, high = (mean + ends * (wanted / both).nan_to_num(1.0).sqrt()).clamp(-1, 1)
    return low, high


def mean_interval(per_target: Tensor, bootstrap: int, confidence: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return the percentile interval of the mean of `per_target` over resamples of the targets, NaN ones left out.

    Shapes: per_target (n_target,). Returns both ends, `()`, float64; NaN when no target is defined.
    """
    defined = per_target[~per_target.isnan()]
    if bootstrap == 0 or len(defined) == 0:
        return per_target.new_tensor(torch.nan), per_target.new_tensor(torch.nan)
    generator = torch.Generator().manual_seed(seed)
    means = torch.stack([defined[_draws(len(defined), generator).to(defined.device)].mean() for _ in range(bootstrap)])
    tail = (1 - confidence) / 2
    low, high = means.quantile(means.new_tensor([tail, 1 - tail]))
    return low, high


def count_undefined(per_target: Tensor, what: str, reason: str) -> int:
    """Return how many values are NaN, with a warning if they are more than 1 %.

    Shapes: per_target (n_target,). Returns the number of NaN.
    """
    undefined = int(per_target.isnan().sum())
    if undefined > 0.01 * len(per_target):
        warnings.warn(
            f"The {what} of {undefined} of {len(per_target)} targets is undefined, as {reason};"
            " they are left out of the mean.",
            stacklevel=4,
        )
    return undefined


def check_bootstrap(bootstrap: int, confidence: float, seed: int) -> None:
    """Check the arguments of every bootstrap."""
    check_int(None, "bootstrap", bootstrap, minimum=0)
    check_float(None, "confidence", confidence, above=0, below=1)
    check_seed(None, seed)


def _draws(n: int, generator: torch.Generator) -> Tensor:
    return torch.randint(n, (n,), generator=generator)


def _resample(n: int, generator: torch.Generator) -> Tensor:
    """Return how often each of n items is drawn in n draws with replacement."""
    return torch.bincount(_draws(n, generator), minlength=n)
