"""What the figures of attribution share: axes outside pyplot, colours, legends, and how an image is drawn.

No figure stays registered, and no display is needed; `fig.savefig(path)` writes one. Blue stands for what helps or is
found by attribution, red for what hurts, grey for chance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from lightning_attr.errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, RED, GREY, BLACK = "#0072B2", "#D55E00", "#7F7F7F", "#222222"  # told apart with any colour vision
COLORS = (BLUE, "#E69F00", "#009E73", "#CC79A7", RED)
ORANGE = COLORS[1]


class MeanWithInterval(Protocol):
    """A mean over targets, and both ends of its interval; NaN where there is none."""

    @property
    def mean(self) -> Tensor:
        """Of the targets where it is defined."""

    @property
    def low(self) -> Tensor:
        """Lower end."""

    @property
    def high(self) -> Tensor:
        """Upper end."""


def new_figure(width: float = 4.5, height: float = 3.2) -> Figure:
    """Return an empty figure outside pyplot, sized in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            'Plots need matplotlib, which is not installed. Run `pip install "lightning_attr[plot]"`.'
        ) from error
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def new_axes(ax: Axes | None) -> tuple[Figure, Axes]:
    """Return `ax` with its figure, or the axes of a new figure."""
    if ax is None:
        fig = new_figure()
        return fig, fig.subplots()
    return cast("Figure", ax.get_figure()), ax


def percent_ticks(ax: Axes, *axes: str) -> None:
    """Write the ticks of these axes ("x", "y") as percentages, where they are not negative."""
    for axis in axes:
        getattr(ax, f"{axis}axis").set_major_formatter(lambda value, _: f"{value:.3g}" if value < 0 else f"{value:.0%}")


def legend_above(ax: Axes) -> None:
    """A legend outside the axes covers no data; it has as many columns, up to three, as the axes are wide."""
    for n_columns in (3, 2, 1):
        legend = ax.legend(
            loc="lower left", bbox_to_anchor=(0, 1), ncol=n_columns, frameon=False, fontsize=8, borderaxespad=0.2
        )
        if legend.get_window_extent().width <= ax.get_window_extent().width:
            return


def draw_inspection(
    self_influence: Tensor | Mapping[str, Tensor],
    noise_mask: Tensor,
    fraction: float | None,
    curve: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    value: Callable[[Tensor, Tensor, float], Tensor],
    ax: Axes | None,
) -> tuple[Figure, Axes]:
    """Draw a curve over the share inspected for each suspicion, with its value at `fraction` marked."""
    curves = self_influence if isinstance(self_influence, Mapping) else {"self-influence": self_influence}
    fig, ax = new_axes(ax)
    for i, (name, suspicion) in enumerate(curves.items()):
        inspected, found = (points.cpu() for points in curve(suspicion, noise_mask))
        color = COLORS[i % len(COLORS)]
        if fraction is not None:
            marked = float(value(suspicion, noise_mask, fraction))
            ax.plot([fraction], [marked], "o", color=color)
            name = f"{name} ({marked:.0%} at {fraction:.0%})"
        ax.plot(inspected, found, color=color, label=name)
    ax.set(xlabel="training samples inspected", xlim=(0, 1), ylim=(0, 1.02))
    percent_ticks(ax, "x", "y")
    return fig, ax


def draw_image(cell: Axes, image: Tensor, caption: str, color: str, scale: float = 1.0) -> None:
    """Draw an image in a frame of this color, with a caption below."""
    cell.imshow(displayable(image), cmap="gray", vmin=0, vmax=1)
    cell.set(xticks=[], yticks=[])
    cell.set_xlabel(caption, fontsize=max(5, 8 * scale), labelpad=3 * scale)
    for spine in cell.spines.values():
        spine.set(color=color, linewidth=2 * scale)


def displayable(image: Tensor) -> np.ndarray:
    """Return an image as floats in [0, 1], `(H, W)` or `(H, W, 3)`; one with values outside is stretched."""
    if image.ndim == 3 and image.shape[0] in {1, 3}:
        image = image.squeeze(0) if image.shape[0] == 1 else image.permute(1, 2, 0)
    if image.ndim not in {2, 3} or (image.ndim == 3 and image.shape[2] != 3):
        raise ValueError(
            f"Expected images of shape (H, W), (1, H, W), (3, H, W) or (H, W, 3), but got {tuple(image.shape)}."
        )
    pixels = image.detach().cpu().double() / (255 if image.dtype == torch.uint8 else 1)
    low, high = float(pixels.min()), float(pixels.max())
    if low < 0 or high > 1:
        pixels = (pixels - low) / (high - low or 1)
    return pixels.numpy()


def draw_mean(ax: Axes, name: str, score: MeanWithInterval, color: str = BLUE) -> None:
    """Draw a mean as a vertical line, and its interval as a band."""
    ax.axvline(float(score.mean), color=color, label=f"{name} {with_interval(score.mean, score.low, score.high)}")
    if not score.low.isnan():
        ax.axvspan(float(score.low), float(score.high), color=color, alpha=0.25, linewidth=0)


def defined(values: Tensor) -> Tensor:
    """Return the values that are not NaN, on the CPU."""
    return values[~values.isnan()].cpu()


def with_interval(mean: Tensor, low: Tensor, high: Tensor) -> str:
    """Return a mean in words, with its interval where it has one."""
    interval = "" if low.isnan() else f" ({float(low):.3f} to {float(high):.3f})"
    return f"{float(mean):.3f}{interval}"
