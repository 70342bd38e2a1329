"""Data selection curve: what retraining on, or without, samples chosen by attribution does, against random samples."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_attr.arguments.checks import check_choice, check_instance, check_tensor
from lightning_attr.metrics.checks import check_finite, check_fraction, check_vector
from lightning_attr.metrics.figures import BLUE, GREY, RED, legend_above, new_axes, percent_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ARMS = ("method", "random", "opposite")
KINDS = ("keep", "remove")


class SelectionCurve(NamedTuple):
    """Result of :func:`data_selection_curve`; float64, in the units of the validation metric.

    Attributes:
        fractions: Share of the training set kept or removed, `(k,)`, ascending.
        mean: For each arm, the mean over retrainings, `(k,)`; NaN where the arm was not run.
        std: For each arm, the standard deviation over retrainings, `(k,)`; NaN with fewer than two.
        area: Mean advantage of `method` over `random` across the fractions, `()`; positive is good for either `kind`.
        area_error: Standard error of `area`, `()`, retrainings taken as independent; NaN if a fraction was run once.
        opposite_area: The same over `opposite`; NaN where that arm was not run.
        opposite_area_error: Standard error of `opposite_area`, `()`.
        kind: `"keep"` or `"remove"`: whether models were retrained on the samples selected, or without them.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import data_selection_curve
        >>> curve = data_selection_curve(torch.tensor([0.5]), torch.tensor([[3.0]]), random=torch.tensor([[2.0]]))
        >>> curve.mean["method"], float(curve.area)
        (tensor([3.], dtype=torch.float64), 1.0)
    """

    fractions: Tensor
    mean: dict[str, Tensor]
    std: dict[str, Tensor]
    area: Tensor
    area_error: Tensor
    opposite_area: Tensor
    opposite_area_error: Tensor
    kind: str


def data_selection_curve(
    fractions: Tensor,
    method: Tensor,
    random: Tensor,
    opposite: Tensor | None = None,
    kind: Literal["keep", "remove"] = "keep",
) -> SelectionCurve:
    """Compare models retrained on samples selected by attribution with models retrained on random samples.

    The area between the curves of `method` and `random` is integrated by the trapezoidal rule and divided by the range
    of the fractions, so it reads as a mean advantage. It is positive where the method is better, for a metric that is
    better when higher (accuracy); for a loss pass its negative. Keeping the best samples should raise the metric, and
    removing them should lower it: with `kind="remove"` the area is `random` less `method`.

    Args:
        fractions: Share of the training set kept (or removed), `(k,)`, ascending, in (0, 1].
        method: Validation metric of r retrainings on (or without) the samples of highest score, `(r, k)`.
        random: The same for random samples, `(r', k)`.
        opposite: The same for the samples of lowest score, `(r'', k)`.
        kind: `"keep"` if models were retrained on the samples selected, `"remove"` if without them.

    Returns:
        Means and standard deviations for each arm, the areas and their standard errors.

    Raises:
        ValueError: If fractions are not ascending in (0, 1], `kind` is unknown, or an arm is not a finite `(r, k)`
            matrix.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import data_selection_curve
        >>> method = torch.tensor([[0.6, 0.8], [0.7, 0.9]])
        >>> random = torch.tensor([[0.5, 0.7], [0.5, 0.8]])
        >>> curve = data_selection_curve(torch.tensor([0.1, 0.5]), method, random)
        >>> round(float(curve.area), 3), round(float(curve.area_error), 3)
        (0.125, 0.043)
    """
    _check_kind(kind)
    check_vector("fractions", fractions)
    if (fractions.diff() <= 0).any() or fractions[0] <= 0 or fractions[-1] > 1:
        raise ValueError(f"Expected argument `fractions` to be ascending in (0, 1], but got {fractions.tolist()}.")
    arms = {"method": method, "random": random} | ({} if opposite is None else {"opposite": opposite})
    for name, values in arms.items():
        check_tensor(None, name, values)
        if values.ndim != 2 or values.shape[1] != len(fractions) or len(values) == 0:
            raise ValueError(
                f"Expected argument `{name}` to have shape (r, k) with k = {len(fractions)} as in `fractions`,"
                f" but got {tuple(values.shape)}."
            )
        check_finite(name, values)
    return _selection_curve(fractions.double(), {name: list(values.double().T) for name, values in arms.items()}, kind)


class DataSelectionCurve(Metric):
    """Data selection curve, fed one retraining at a time; the pure function is :func:`data_selection_curve`.

    Arms may have different numbers of retrainings and miss fractions; the area runs over the fractions that `method`
    and `random` share.

    Args:
        kind: `"keep"` if models were retrained on the samples selected, `"remove"` if without them.
        **kwargs: Passed to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If `kind` is unknown.

    Example:
        >>> from lightning_attr.metrics import DataSelectionCurve
        >>> metric = DataSelectionCurve()
        >>> for fraction, accuracy, arm in [(0.1, 0.7, "method"), (0.1, 0.5, "random"), (0.5, 0.9, "method")]:
        ...     metric.update(fraction, accuracy, arm)
        >>> metric.update(0.5, 0.8, "random")
        >>> round(float(metric.compute()["area"]), 3)
        0.15
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    fraction: list[Tensor]
    value: list[Tensor]
    arm: list[Tensor]

    def __init__(self, kind: Literal["keep", "remove"] = "keep", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _check_kind(kind)
        self.kind = kind
        for name in ("fraction", "value", "arm"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, fraction: float, value: float | Tensor, arm: str = "method") -> None:
        """Add the validation metric of one retraining.

        Args:
            fraction: Share of the training set kept (or removed), in (0, 1].
            value: Validation metric of the retrained model, a finite scalar, better when higher.
            arm: `"method"`, `"random"` or `"opposite"`: how the samples were chosen.

        Raises:
            ValueError: If an argument is out of range.
        """
        check_fraction(fraction)
        check_choice(self, "arm", arm, ARMS)
        if not math.isfinite(value):
            raise ValueError(f"Expected argument `value` to be a finite number, but got {value}.")
        self.fraction.append(torch.tensor([fraction], dtype=torch.float64, device=self.device))
        self.value.append(torch.tensor([float(value)], dtype=torch.float64, device=self.device))
        self.arm.append(torch.tensor([ARMS.index(arm)], device=self.device))

    def compute(self) -> dict[str, Tensor]:
        """Return the curves as a flat dictionary, ready for a logger.

        Returns:
            `"fractions"`, each arm's mean under its name and its standard deviation as `"<arm>_std"`, all `(k,)`, and
            the scalars `"area"` (see :class:`SelectionCurve`) and `"area_error"`; where the arm `opposite` was run also
            `"opposite_area"` and `"opposite_area_error"`.

        Raises:
            ValueError: If `method` and `random` share no fraction.
        """
        curve = self._curve()
        spread = {f"{arm}_std": std for arm, std in curve.std.items()}
        area = {"area": curve.area, "area_error": curve.area_error}
        if "opposite" in curve.mean:
            area |= {"opposite_area": curve.opposite_area, "opposite_area_error": curve.opposite_area_error}
        return {"fractions": curve.fractions} | curve.mean | spread | area

    def summary(self) -> SelectionCurve:
        """Return the curves as the named tuple of :func:`data_selection_curve`, over all processes."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self.sync_on_compute):
            return self._curve()

    def plot(
        self, val: SelectionCurve | None = None, ax: Axes | None = None, metric: str = "validation metric"
    ) -> tuple[Figure, Axes]:
        """Plot the mean of each arm with a band of one standard deviation.

        Args:
            val: Result of :meth:`summary`; by default that of the current state.
            ax: Where to draw; a new figure by default.
            metric: Name of the validation metric, the label of the vertical axis.

        Returns:
            The figure and its axes.
        """
        return plot_selection_curve(self.summary() if val is None else val, metric=metric, ax=ax)

    def _curve(self) -> SelectionCurve:
        fraction, value, arm = dim_zero_cat(self.fraction), dim_zero_cat(self.value), dim_zero_cat(self.arm)
        fractions = torch.unique(fraction)
        return _selection_curve(
            fractions,
            {
                name: [value[(arm == code) & (fraction == f)] for f in fractions]
                for code, name in enumerate(ARMS)
                if (arm == code).any()
            },
            self.kind,
        )


def _selection_curve(fractions: Tensor, arms: dict[str, list[Tensor]], kind: str) -> SelectionCurve:
    # Each arm holds one vector of values for each fraction, empty where the arm was not run.
    mean = {name: torch.stack([values.mean() for values in runs]) for name, runs in arms.items()}
    variance = {name: torch.stack([_variance(values) for values in runs]) for name, runs in arms.items()}
    std = {name: values.sqrt() for name, values in variance.items()}
    if not {"method", "random"} <= arms.keys() or (mean["method"] - mean["random"]).isnan().all():
        raise ValueError("Expected arms `method` and `random` to share at least one fraction, but they share none.")
    squared_error = {
        name: variance[name] / variance[name].new_tensor([len(values) for values in arms[name]]) for name in arms
    }
    nowhere = torch.full_like(fractions, torch.nan)
    areas = [
        _area(
            fractions,
            (mean["method"] - mean.get(other, nowhere)) * (1 if kind == "keep" else -1),
            squared_error["method"] + squared_error.get(other, nowhere),
        )
        for other in ("random", "opposite")
    ]
    return SelectionCurve(fractions, mean, std, *areas[0], *areas[1], kind)


def _area(fractions: Tensor, gain: Tensor, squared_error: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean of `gain` over the fractions where it is known, and its standard error; NaN if it is nowhere."""
    shared = ~gain.isnan()
    if not shared.any():
        return gain.new_tensor(torch.nan), gain.new_tensor(torch.nan)
    weights = _trapezoid_weights(fractions[shared])
    return weights @ gain[shared], (weights.square() @ squared_error[shared]).sqrt()


def _check_kind(kind: str) -> None:
    check_choice(None, "kind", kind, KINDS)


def _variance(values: Tensor) -> Tensor:
    return values.var() if len(values) > 1 else values.new_tensor(torch.nan)


def _trapezoid_weights(x: Tensor) -> Tensor:
    """Return the weights of the trapezoidal rule over ascending `(k,)` points, scaled to add up to 1."""
    if len(x) == 1:
        return torch.ones_like(x)
    gaps = pad(x.diff(), (1, 1))
    return (gaps[:-1] + gaps[1:]) / (2 * (x[-1] - x[0]))


def plot_selection_curve(
    curve: SelectionCurve, metric: str = "validation metric", ax: Axes | None = None
) -> tuple[Figure, Axes]:
    """Plot the validation metric after retraining against the share selected, a band of one sd around each mean.

    Args:
        curve: Result of :func:`~lightning_attr.metrics.data_selection_curve`.
        metric: Name of the validation metric, the label of the vertical axis.
        ax: Where to draw; a new figure by default.

    Returns:
        The figure and its axes.

    Raises:
        TypeError: If `curve` is none.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import data_selection_curve, plot_selection_curve
        >>> method, random = torch.tensor([[0.7, 0.9]]), torch.tensor([[0.5, 0.8]])
        >>> curve = data_selection_curve(torch.tensor([0.1, 0.5]), method, random)
        >>> fig, ax = plot_selection_curve(curve, metric="accuracy")
        >>> ax.get_ylabel()
        'accuracy'
    """
    check_instance("plot_selection_curve", "curve", curve, SelectionCurve, "what `data_selection_curve` returns")
    fig, ax = new_axes(ax)
    for arm, color in {"method": BLUE, "random": GREY, "opposite": RED}.items():
        if arm not in curve.mean:
            continue
        run = ~curve.mean[arm].isnan().cpu()
        x, mean, std = curve.fractions.cpu()[run], curve.mean[arm].cpu()[run], curve.std[arm].cpu()[run].nan_to_num()
        ax.plot(x, mean, "o-", color=color, markersize=4, label=arm)
        ax.fill_between(x, mean - std, mean + std, color=color, alpha=0.2, linewidth=0)
    ax.set(xlabel="training samples kept" if curve.kind == "keep" else "training samples removed", ylabel=metric)
    if curve.fractions[-1] >= 10 * curve.fractions[0]:  # 1, 2, 5, 10, 20, 50 %: even steps only on a logarithm
        ax.set_xscale("log")
    ax.set_xticks(curve.fractions.tolist())
    ax.minorticks_off()
    percent_ticks(ax, "x")
    legend_above(ax)
    return fig, ax
