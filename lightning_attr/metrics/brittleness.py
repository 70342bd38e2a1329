"""Brittleness: how few training samples must go until retrained models get a target wrong (Ilyas et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_attr.arguments.checks import check_choice, check_instance, check_numbers, check_tensor
from lightning_attr.metrics.checks import check_finite
from lightning_attr.metrics.figures import BLUE, GREY, ORANGE, legend_above, new_axes, percent_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ARMS = ("method", "random", "same_class")


class FlipCurve(NamedTuple):
    """Result of :func:`brittleness_curve`; float64 unless stated, on the device of the outputs.

    Attributes:
        counts: Numbers of samples removed, `(k,)`, int64, ascending.
        success: For each arm, the share of the targets that a removal of that size flips, `(k,)`.
        low: Lower end of the 95 % Wilson interval of `success` for each arm, `(k,)`.
        high: Upper end of it for each arm, `(k,)`.
        smallest: For each arm, the smallest removal that flips each target, `(n_target,)`; infinite where none does,
            NaN where undefined.
        undefined: Number of targets left out because they were wrong before any removal.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import brittleness_curve
        >>> after = torch.tensor([[0.1, 1.0], [-1.0, 0.5]])
        >>> curve = brittleness_curve([10, 20], before=torch.tensor([1.0, 2.0]), method=after)
        >>> curve.success["method"], curve.smallest["method"]
        (tensor([0.0000, 0.5000], dtype=torch.float64), tensor([20., inf], dtype=torch.float64))
    """

    counts: Tensor
    success: dict[str, Tensor]
    low: dict[str, Tensor]
    high: dict[str, Tensor]
    smallest: dict[str, Tensor]
    undefined: int


def brittleness_curve(
    counts: Sequence[int] | Tensor,
    before: Tensor,
    method: Tensor,
    random: Tensor | None = None,
    same_class: Tensor | None = None,
) -> FlipCurve:
    """Share of the targets that retraining without their top k proponents gets wrong, for several k.

    A target is right while its output is positive, and flips when most of its retrainings get it wrong. Outputs are
    margins, such as the logit of the right class less the largest other one, or booleans. (The margin log p / (1 - p)
    is positive only where p exceeds one half.) Targets that were wrong before any removal are left out and counted.
    Flips need not be monotone in k, so `smallest` scans all k. Only samples of positive score should be removed.

    Args:
        counts: Numbers of samples removed, `(k,)`, positive, ascending.
        before: Outputs of the model trained on everything, `(n_target,)`, or `(s, n_target)` for s seeds.
        method: Outputs after retraining without each target's top proponents, `(k, n_target)`, or `(s, k, n_target)`.
        random: The same for as many random samples.
        same_class: The same for as many random samples of the target's class.

    Returns:
        Success rates with intervals, smallest removals and the number of undefined targets.

    Raises:
        ValueError: If `counts` is not positive and ascending, shapes disagree, outputs are not finite, or no target was
            right before.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import brittleness_curve
        >>> after = torch.tensor([[0.5, -0.1, 1.0], [-0.5, -0.1, 1.0]])
        >>> brittleness_curve([20, 40], torch.tensor([1.0, 2.0, -1.0]), after, random=torch.ones(2, 3)).success
        {'method': tensor([0.5000, 1.0000], dtype=torch.float64), 'random': tensor([0., 0.], dtype=torch.float64)}
    """
    counts = _as_counts(counts)
    given = {"method": method, "random": random, "same_class": same_class}
    arms = {name: _flips(counts, before, after, name) for name, after in given.items() if after is not None}
    return _flip_curve(counts.to(method.device), arms)


class BrittlenessCurve(Metric):
    """Brittleness as a metric, fed one arm and any targets at a time; the pure function is :func:`brittleness_curve`.

    Arms may have different targets.

    Args:
        counts: Numbers of samples removed, `(k,)`, positive, ascending.
        **kwargs: Passed to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If `counts` is not positive and ascending.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import BrittlenessCurve
        >>> metric = BrittlenessCurve(counts=[20, 40])
        >>> metric.update(torch.tensor([1.0, 2.0]), torch.tensor([[0.5, -0.1], [-0.5, -0.1]]))
        >>> metric.update(torch.tensor([1.0, 2.0]), torch.tensor([[0.5, 0.1], [0.5, -0.1]]), arm="random")
        >>> metric.compute()["method"], metric.compute()["random"]
        (tensor([0.5000, 1.0000], dtype=torch.float64), tensor([0.0000, 0.5000], dtype=torch.float64))
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    flipped: list[Tensor]
    arm: list[Tensor]

    def __init__(self, counts: Sequence[int] | Tensor, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.counts = _as_counts(counts)
        self.add_state("flipped", default=[], dist_reduce_fx="cat")  # (n_target, k), NaN where wrong before
        self.add_state("arm", default=[], dist_reduce_fx="cat")  # (n_target,)

    def update(self, before: Tensor, after: Tensor, arm: str = "method") -> None:
        """Add targets to one arm.

        Args:
            before: Outputs of the model trained on everything, `(n_target,)`, or `(s, n_target)` for s seeds.
            after: Outputs after retraining without each target's samples, `(k, n_target)`, or `(s, k, n_target)`.
            arm: `"method"`, `"random"` or `"same_class"`: how the samples removed were chosen.

        Raises:
            ValueError: If `arm` is none of these, shapes disagree, or outputs are not finite.
        """
        check_choice(self, "arm", arm, ARMS)
        flipped = _flips(self.counts, before, after, "after").T
        self.flipped.append(flipped)
        self.arm.append(torch.full((len(flipped),), ARMS.index(arm), device=flipped.device))

    def compute(self) -> dict[str, Tensor]:
        """Return `"counts"` and each arm's success rates under its name, `(k,)`.

        Raises:
            ValueError: If an arm has no target that was right before any removal, or there is no `method`.
        """
        curve = self._curve()
        return {"counts": curve.counts} | curve.success

    def summary(self) -> FlipCurve:
        """Return the curves as the named tuple of :func:`brittleness_curve`, over all processes."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self.sync_on_compute):
            return self._curve()

    def plot(self, val: FlipCurve | None = None, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Plot the success rate of each arm against the number of samples removed.

        Args:
            val: Result of :meth:`summary`; by default that of the current state.
            ax: Where to draw; a new figure by default.

        Returns:
            The figure and its axes.
        """
        return plot_brittleness_curve(self.summary() if val is None else val, ax=ax)

    def _curve(self) -> FlipCurve:
        flipped, arm = dim_zero_cat(self.flipped), dim_zero_cat(self.arm)
        arms = {name: flipped[arm == code].T for code, name in enumerate(ARMS) if (arm == code).any()}
        return _flip_curve(self.counts.to(flipped.device), arms)


def _flip_curve(counts: Tensor, arms: dict[str, Tensor]) -> FlipCurve:
    # Each arm holds (k, n_target) of 0 and 1, NaN for targets that were wrong before.
    if "method" not in arms:
        raise ValueError(f"Expected an arm `method`, but got {list(arms)}.")
    success, low, high, smallest = {}, {}, {}, {}
    for name, flipped in arms.items():
        wrong = flipped[0].isnan()
        if wrong.all():
            raise ValueError(
                f"Expected some targets to have a positive output before any removal, but all {len(wrong)} of arm"
                f" `{name}` were wrong."
            )
        success[name] = flipped[:, ~wrong].mean(1)
        low[name], high[name] = _wilson(success[name], int((~wrong).sum()))
        removed = counts.to(flipped).unsqueeze(1)
        smallest[name] = torch.where(flipped == 1, removed, torch.inf).amin(0).masked_fill(wrong, torch.nan)
    return FlipCurve(counts, success, low, high, smallest, int(arms["method"][0].isnan().sum()))


def _wilson(share: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return the 95 % interval of a binomial share of n (Wilson 1927)."""
    z = 1.959963984540054
    center = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * (share * (1 - share) / n + z**2 / (4 * n**2)).sqrt()
    return (center - half).clamp(min=0), (center + half).clamp(max=1)


def _flips(counts: Tensor, before: Tensor, after: Tensor, name: str) -> Tensor:
    """Return 1 where most retrainings get the target wrong and 0 elsewhere, `(k, n_target)`; NaN if wrong before."""
    check_tensor(None, "before", before)
    check_tensor(None, name, after)
    if before.ndim not in {1, 2} or before.numel() == 0:
        raise ValueError(
            f"Expected argument `before` to have shape (n_target,) or (s, n_target), but got {tuple(before.shape)}."
        )
    expected = (len(counts), before.shape[-1])
    if after.ndim not in {2, 3} or after.shape[-2:] != expected or after.numel() == 0:
        raise ValueError(
            f"Expected argument `{name}` to have shape (k, n_target) = {expected} as `counts` and `before`,"
            f" or (s, k, n_target), but got {tuple(after.shape)}."
        )
    check_finite("before", before)
    check_finite(name, after)
    wrong = _mostly_wrong(before.reshape(-1, expected[1])).to(after.device)
    flipped = _mostly_wrong(after.reshape(-1, *expected)).double()
    return flipped.masked_fill(wrong, torch.nan)


def _mostly_wrong(outputs: Tensor) -> Tensor:
    """Return whether more than half of the outputs along the first dimension are not positive."""
    return (outputs <= 0).double().mean(0) > 0.5


def _as_counts(counts: Sequence[int] | Tensor) -> Tensor:
    values = check_numbers(None, "counts", counts, "a list of ascending positive integers")
    whole = values.ndim == 1 and len(values) > 0 and not values.is_floating_point()
    if not whole or values[0] < 1 or (values.diff() <= 0).any():
        raise ValueError(f"Expected argument `counts` to hold ascending positive integers, but got {values.tolist()}.")
    return values.long()


def plot_brittleness_curve(curve: FlipCurve, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Plot the share of targets that removal flips against the number of samples removed, with 95 % bands.

    Args:
        curve: Result of :func:`~lightning_attr.metrics.brittleness_curve`.
        ax: Where to draw; a new figure by default.

    Returns:
        The figure and its axes.

    Raises:
        TypeError: If `curve` is none.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import brittleness_curve, plot_brittleness_curve
        >>> curve = brittleness_curve([10, 20], torch.tensor([1.0, 2.0]), torch.tensor([[0.1, 1.0], [-1.0, 0.5]]))
        >>> fig, ax = plot_brittleness_curve(curve)
        >>> ax.get_ylabel()
        'targets flipped'
    """
    check_instance("plot_brittleness_curve", "curve", curve, FlipCurve, "what `brittleness_curve` returns")
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
    percent_ticks(ax, "y")
    legend_above(ax)
    return fig, ax
