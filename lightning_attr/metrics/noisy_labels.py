"""Detection of mislabelled training samples from their self-influence, as torchmetrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_attr.metrics.checks import check_fraction, check_noise_update
from lightning_attr.metrics.figures import BLACK, GREY, draw_inspection, legend_above, new_axes
from lightning_attr.metrics.functional import noisy_label_auroc, noisy_label_recall, noisy_label_recall_curve
from lightning_attr.metrics.precision import noisy_label_precision, noisy_label_precision_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_recall_curve(
    self_influence: Tensor | Mapping[str, Tensor],
    noise_mask: Tensor,
    fraction: float | None = None,
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Plot the share of mislabelled samples found against the share inspected, with random and ideal inspection.

    Args:
        self_influence: Shape `(n_train,)`, high means suspicious; or several such vectors by name, to compare.
        noise_mask: Shape `(n_train,)`, bool or 0/1; True marks a mislabelled sample.
        fraction: Share inspected at which the recall is marked and given in the legend.
        ax: Where to draw; a new figure by default.

    Returns:
        The figure and its axes.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import plot_recall_curve
        >>> fig, ax = plot_recall_curve(torch.tensor([0.9, 0.1, 0.4]), torch.tensor([True, False, False]))
        >>> ax.get_ylabel()
        'mislabelled samples found'
    """
    fig, ax = draw_inspection(self_influence, noise_mask, fraction, noisy_label_recall_curve, noisy_label_recall, ax)
    share = float(noise_mask.double().mean())
    ax.plot([0, share, 1], [0, 1, 1], "--", color=BLACK, linewidth=1, label="ideal")
    ax.plot([0, 1], [0, 1], ":", color=GREY, label="random")
    ax.set_ylabel("mislabelled samples found")
    legend_above(ax)
    return fig, ax


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
    fig, ax = draw_inspection(
        self_influence, noise_mask, fraction, noisy_label_precision_curve, noisy_label_precision, ax
    )
    share = float(noise_mask.double().mean())
    inspected = torch.linspace(0, 1, len(noise_mask) + 1, dtype=torch.float64)[1:]
    ax.plot(inspected, (share / inspected).clamp(max=1), "--", color=BLACK, linewidth=1, label="ideal")
    ax.plot([0, 1], [share, share], ":", color=GREY, label="random")
    ax.set_ylabel("mislabelled among inspected")
    legend_above(ax)
    return fig, ax


class _NoisyLabelMetric(Metric):
    """Keeps every sample seen: ranks are not additive, so neither metric is a sum over batches."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    self_influence: list[Tensor]
    noise_mask: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("self_influence", default=[], dist_reduce_fx="cat")
        self.add_state("noise_mask", default=[], dist_reduce_fx="cat")

    def update(self, self_influence: Tensor, noise_mask: Tensor) -> None:
        """Add training samples.

        Args:
            self_influence: Shape `(n,)`; high means suspicious.
            noise_mask: Shape `(n,)`, bool or 0/1; True marks a mislabelled sample. A batch may lack either kind.

        Raises:
            ValueError: If the values are not a non-empty finite vector, or the mask is not 0/1 of the same length.
        """
        noisy = check_noise_update(self_influence, noise_mask)
        self.self_influence.append(self_influence)
        self.noise_mask.append(noisy)

    def plot(self, val: Tensor | list[Tensor] | None = None, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Plot one value, or one for each step.

        Args:
            val: Result of :meth:`compute`, or a list of them; by default the current value.
            ax: Where to draw; a new figure by default.

        Returns:
            The figure and its axes.
        """
        fig, ax = new_axes(ax)
        self._plot(val, ax)
        return fig, ax


class NoisyLabelAUROC(_NoisyLabelMetric):
    """Area under the ROC curve of self-influence as a detector of mislabelled samples.

    The pure function is :func:`~lightning_attr.metrics.noisy_label_auroc`. Several updates add samples.

    Args:
        **kwargs: Passed to :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import NoisyLabelAUROC
        >>> metric = NoisyLabelAUROC()
        >>> metric.update(torch.tensor([0.9, 0.2, 0.2, 0.4]), torch.tensor([True, False, True, False]))
        >>> metric.compute()
        tensor(0.6250, dtype=torch.float64)
    """

    def compute(self) -> Tensor:
        """Return the area, a float64 scalar in [0, 1]; a ValueError if all samples or none are mislabelled."""
        return noisy_label_auroc(dim_zero_cat(self.self_influence), dim_zero_cat(self.noise_mask))


class _InspectionMetric(_NoisyLabelMetric):
    """What inspecting the most self-influential `fraction` gives; the figure shows it for every fraction."""

    _plot_curve: Callable[..., tuple[Figure, Axes]]

    def __init__(self, fraction: float = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_fraction(fraction)
        self.fraction = fraction

    def plot(self, val: Tensor | list[Tensor] | None = None, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Plot the value against the share inspected, with random and ideal inspection, or given values of the metric.

        Args:
            val: Result of :meth:`compute`, or a list of them, drawn as they are; by default the state is drawn.
            ax: Where to draw; a new figure by default.

        Returns:
            The figure and its axes.
        """
        if val is not None:
            return super().plot(val, ax)
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self.sync_on_compute):
            samples = dim_zero_cat(self.self_influence), dim_zero_cat(self.noise_mask)
        return self._plot_curve(*samples, fraction=self.fraction, ax=ax)


class NoisyLabelRecall(_InspectionMetric):
    """Share of the mislabelled samples found by inspecting the most self-influential `fraction` of the training set.

    The pure function is :func:`~lightning_attr.metrics.noisy_label_recall`. Several updates add samples.

    Args:
        fraction: Share of the training set inspected, in (0, 1].
        **kwargs: Passed to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If `fraction` is outside (0, 1].

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import NoisyLabelRecall
        >>> metric = NoisyLabelRecall(fraction=0.5)
        >>> metric.update(torch.tensor([0.9, 0.2, 0.1, 0.4]), torch.tensor([True, True, False, False]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    _plot_curve = staticmethod(plot_recall_curve)

    def compute(self) -> Tensor:
        """Return the recall, a float64 scalar in [0, 1]; a ValueError if all samples or none are mislabelled."""
        return noisy_label_recall(dim_zero_cat(self.self_influence), dim_zero_cat(self.noise_mask), self.fraction)


class NoisyLabelPrecision(_InspectionMetric):
    """Share of mislabelled samples among the most self-influential `fraction` of the training set.

    The pure function is :func:`~lightning_attr.metrics.noisy_label_precision`. Several updates add samples.

    Args:
        fraction: Share of the training set inspected, in (0, 1].
        **kwargs: Passed to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If `fraction` is outside (0, 1].

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import NoisyLabelPrecision
        >>> metric = NoisyLabelPrecision(fraction=0.25)
        >>> metric.update(torch.tensor([0.9, 0.2, 0.1, 0.4]), torch.tensor([True, True, False, False]))
        >>> metric.compute()
        tensor(1., dtype=torch.float64)
    """

    _plot_curve = staticmethod(plot_precision_curve)

    def compute(self) -> Tensor:
        """Return the precision, a float64 scalar in [0, 1]; a ValueError if all samples or none are mislabelled."""
        return noisy_label_precision(dim_zero_cat(self.self_influence), dim_zero_cat(self.noise_mask), self.fraction)
