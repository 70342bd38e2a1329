"""Effect of a method's proponents on the output, against random samples: query loss difference and tail-patch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from lightning_attr.arguments.checks import check_instance, check_tensor
from lightning_attr.metrics.bootstrap import IntervalMetric, check_bootstrap, mean_interval
from lightning_attr.metrics.checks import check_finite, check_vector
from lightning_attr.metrics.figures import BLUE, GREY, legend_above, new_axes, with_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class OutputChange(NamedTuple):
    """Result of :func:`query_loss_difference` and :func:`tail_patch`; float64, in the units of the output.

    Attributes:
        mean: Mean of `per_target`, `()`; positive when the method's samples matter more than random ones.
        low: Lower end of the bootstrap interval of `mean`, `()`; NaN with `bootstrap=0`.
        high: Upper end of the bootstrap interval of `mean`, `()`; NaN with `bootstrap=0`.
        method: Change for the method's samples by target, mean over repetitions, `(n_target,)`.
        random: Change for random samples by target, mean over draws, `(n_target,)`.
        per_target: `method - random`, `(n_target,)`.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import tail_patch
        >>> change = tail_patch(before=torch.zeros(2), method=torch.tensor([0.5, 0.3]), random=torch.tensor([0.1, 0.1]))
        >>> round(float(change.mean), 3)
        0.3
    """

    mean: Tensor
    low: Tensor
    high: Tensor
    method: Tensor
    random: Tensor
    per_target: Tensor


def query_loss_difference(
    before: Tensor, method: Tensor, random: Tensor, bootstrap: int = 1000, confidence: float = 0.95, seed: int = 0
) -> OutputChange:
    """Rise of a target's loss after retraining without its top proponents, less that without random samples.

    As outputs are positive when the model does well, the loss is the negative output: the rise is `before - after`.
    Usually the top 1 % is removed. The interval holds the percentiles of a bootstrap over targets; it takes them as
    independent, so where one removal serves all targets, it misses the noise of that retraining.

    Args:
        before: Outputs of the model trained on everything, `(n_target,)`, or `(s, n_target)` for s seeds.
        method: Outputs after retraining without the method's samples, `(n_target,)`, or `(s', n_target)`.
        random: Outputs after retraining without as many random samples, `(n_target,)`, or `(r, n_target)` for r draws.
        bootstrap: Number of resamples; 0 skips the interval.
        confidence: Coverage of the interval, in (0, 1).
        seed: Seed of the bootstrap.

    Returns:
        Both rises and their difference by target, its mean and interval.

    Raises:
        ValueError: If the outputs disagree in their targets or are not finite, or `bootstrap` or `confidence` is out of
            range.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import query_loss_difference
        >>> before, method = torch.tensor([2.0, 3.0]), torch.tensor([0.5, 2.5])
        >>> query_loss_difference(before, method, random=torch.tensor([[1.5, 3.0], [2.0, 3.0]])).per_target
        tensor([1.2500, 0.5000], dtype=torch.float64)
    """
    check_bootstrap(bootstrap, confidence, seed)
    return _output_change(-_changes(before, method, random), bootstrap, confidence, seed)


def tail_patch(
    before: Tensor, method: Tensor, random: Tensor, bootstrap: int = 1000, confidence: float = 0.95, seed: int = 0
) -> OutputChange:
    """Rise of a target's output by one more optimizer step on its top proponents, less that by random samples.

    The step starts from the final checkpoint with its learning rate and optimizer state. It measures a local effect,
    not that of retraining (Chang et al. 2024). The interval holds the percentiles of a bootstrap over targets.

    Args:
        before: Outputs of the final checkpoint, `(n_target,)`; for sequences, log-probabilities.
        method: Outputs after a step on the method's samples, `(n_target,)`, or `(s, n_target)` for s repetitions.
        random: Outputs after a step on as many random samples, `(n_target,)`, or `(r, n_target)` for r draws.
        bootstrap: Number of resamples; 0 skips the interval.
        confidence: Coverage of the interval, in (0, 1).
        seed: Seed of the bootstrap.

    Returns:
        Both rises and their difference by target, its mean and interval.

    Raises:
        ValueError: If the outputs disagree in their targets or are not finite, or `bootstrap` or `confidence` is out of
            range.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import tail_patch
        >>> before, method = torch.tensor([-2.0, -3.0]), torch.tensor([-1.0, -2.5])
        >>> tail_patch(before, method, random=torch.tensor([-1.75, -3.0])).per_target
        tensor([0.7500, 0.5000], dtype=torch.float64)
    """
    check_bootstrap(bootstrap, confidence, seed)
    return _output_change(_changes(before, method, random), bootstrap, confidence, seed)


class _OutputChangeMetric(IntervalMetric[OutputChange]):
    """Keeps two changes for each target: by the method's samples and by random ones."""

    sign: float
    label: str

    changes: list[Tensor]

    def __init__(self, bootstrap: int = 1000, confidence: float = 0.95, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(bootstrap, confidence, seed, **kwargs)
        self.add_state("changes", default=[], dist_reduce_fx="cat")  # (n_target, 2)

    def update(self, before: Tensor, method: Tensor, random: Tensor) -> None:
        """Add targets.

        Args:
            before: Outputs of the model as it was, `(n_target,)`, or `(s, n_target)` for s seeds.
            method: Outputs after the change by the method's samples, `(n_target,)`, or `(s', n_target)`.
            random: Outputs after the change by random samples, `(n_target,)`, or `(r, n_target)` for r draws.

        Raises:
            ValueError: If the outputs disagree in their targets or are not finite.
        """
        self.changes.append(self.sign * _changes(before, method, random))

    def compute(self) -> Tensor:
        """Return the mean difference between method and random samples, a float64 scalar."""
        return self._score(bootstrap=0).mean

    def _score(self, bootstrap: int) -> OutputChange:
        return _output_change(dim_zero_cat(self.changes), bootstrap, self.confidence, self.seed)

    def _draw(self, summary: OutputChange, ax: Axes | None) -> tuple[Figure, Axes]:
        return plot_output_change(summary, self.label, ax)


class QueryLossDifference(_OutputChangeMetric):
    """Query loss difference (QLD) as a metric; the pure function is :func:`query_loss_difference`.

    Several updates add targets.

    Args:
        bootstrap: Number of resamples behind the interval of :meth:`summary`; 0 skips it.
        confidence: Coverage of the interval, in (0, 1).
        seed: Seed of the bootstrap.
        **kwargs: Passed to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If `bootstrap` or `confidence` is out of range.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import QueryLossDifference
        >>> metric = QueryLossDifference()
        >>> metric.update(torch.tensor([2.0, 3.0]), method=torch.tensor([0.5, 2.5]), random=torch.tensor([2.0, 3.0]))
        >>> metric.compute()
        tensor(1., dtype=torch.float64)
    """

    sign = -1.0
    label = "rise of loss"


class TailPatch(_OutputChangeMetric):
    """Tail-patch as a metric; the pure function is :func:`tail_patch`.

    Several updates add targets.

    Args:
        bootstrap: Number of resamples behind the interval of :meth:`summary`; 0 skips it.
        confidence: Coverage of the interval, in (0, 1).
        seed: Seed of the bootstrap.
        **kwargs: Passed to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If `bootstrap` or `confidence` is out of range.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import TailPatch
        >>> metric = TailPatch()
        >>> metric.update(torch.tensor([-2.0]), method=torch.tensor([-1.0]), random=torch.tensor([-1.75]))
        >>> metric.compute()
        tensor(0.7500, dtype=torch.float64)
    """

    sign = 1.0
    label = "rise of output"


def _output_change(changes: Tensor, bootstrap: int, confidence: float, seed: int) -> OutputChange:
    method, random = changes.T
    per_target = method - random
    low, high = mean_interval(per_target, bootstrap, confidence, seed)
    return OutputChange(per_target.mean(), low, high, method, random, per_target)


def _changes(before: Tensor, method: Tensor, random: Tensor) -> Tensor:
    """Return the rises `(n_target, 2)` of the outputs, float64: by the method's samples and by random ones."""
    reference = _mean_output("before", before)
    changes = []
    for name, after in (("method", method), ("random", random)):
        mean = _mean_output(name, after)
        if len(mean) != len(reference):
            raise ValueError(
                f"Expected argument `{name}` to have as many targets as `before`, {len(reference)},"
                f" but got shape {tuple(after.shape)}."
            )
        changes.append(mean.to(reference.device) - reference)
    return torch.stack(changes, dim=1)


def _mean_output(name: str, outputs: Tensor) -> Tensor:
    # Mean over the seeds, `(n_target,)`.
    check_tensor(None, name, outputs)
    if outputs.ndim == 2 and len(outputs):
        check_finite(name, outputs)
        outputs = outputs.double().mean(0)
    check_vector(name, outputs)
    return outputs.double()


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

    Raises:
        TypeError: If `change` is none.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import plot_output_change, tail_patch
        >>> change = tail_patch(torch.zeros(2), method=torch.tensor([0.5, 0.3]), random=torch.tensor([0.1, 0.1]))
        >>> fig, ax = plot_output_change(change)
        >>> ax.get_xlabel()
        'change of output, random samples'
    """
    check_instance(
        "plot_output_change", "change", change, OutputChange, "what `tail_patch` or `query_loss_difference` returns"
    )
    fig, ax = new_axes(ax)
    random, method = change.random.cpu(), change.method.cpu()
    above = float((method > random).double().mean())
    mean = with_interval(change.mean, change.low, change.high)
    ax.plot(random, method, "o", color=BLUE, markersize=3.5, alpha=0.5, label=f"targets ({above:.0%} above)")
    ax.axline((float(random.mean()),) * 2, slope=1, linestyle=":", color=GREY, label="no difference")
    shifted = (float(random.mean()), float(random.mean() + change.mean))
    ax.axline(shifted, slope=1, color=BLUE, linewidth=1, label=f"mean difference {mean}")
    ax.set(xlabel=f"{label}, random samples", ylabel="top proponents")
    legend_above(ax)
    return fig, ax
