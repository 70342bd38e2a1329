"""Figures of attribution: curves, score heat map, images with their proponents and opponents.

Figures are made without pyplot, so none stays registered and no display is needed; `fig.savefig(path)` writes one. Blue
stands for what helps or is found by attribution, red for what hurts, grey for chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from lightning_attr.arguments.checks import check_float, check_instance, check_int
from lightning_attr.arguments.listed import check_pairs
from lightning_attr.arguments.messages import argument_message
from lightning_attr.metrics.checks import check_matrix, check_noise_update, check_vector
from lightning_attr.metrics.figures import draw_image, legend_above, new_axes, new_figure, percent_ticks
from lightning_attr.metrics.functional import score_blocks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


BLUE, RED, GREY, BLACK = "#0072B2", "#D55E00", "#7F7F7F", "#222222"  # told apart with any colour vision
COLORS = (BLUE, "#E69F00", "#009E73", "#CC79A7", RED)


def plot_score_heatmap(scores: Tensor, max_cells: int = 300, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Plot scores as a heat map, blue where the training sample helps the target and red where it hurts.

    Larger matrices are averaged in blocks. Colours are centred at 0 and saturate at the 99th percentile of the cells'
    magnitude. Blocks show best when rows and columns are sorted by class.

    Args:
        scores: Shape `(n_train, n_target)`; read in row blocks, so it may be memory-mapped.
        max_cells: Largest number of cells along each side.
        ax: Where to draw; a new figure by default.

    Returns:
        The figure and its axes.

    Raises:
        ValueError: If `scores` is not a non-empty finite matrix.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import plot_score_heatmap
        >>> fig, ax = plot_score_heatmap(torch.eye(3))
        >>> ax.get_ylabel()
        'training sample'
    """
    check_matrix("scores", scores)
    max_cells = check_int("plot_score_heatmap", "max_cells", max_cells, minimum=1)
    n_train, n_target = scores.shape
    cells = _block_means(scores, max_cells).cpu()
    limit = float(cells.abs().flatten().quantile(0.99)) or float(cells.abs().max()) or 1.0
    fig, ax = new_axes(ax)
    image = ax.imshow(
        cells.numpy(), cmap="RdBu", vmin=-limit, vmax=limit, extent=(0, n_target, n_train, 0), aspect="auto",
        interpolation="nearest",
    )  # fmt: skip
    block = f"{n_train / len(cells):.0f} x {n_target / cells.shape[1]:.0f}"
    label = "score" if cells.shape == scores.shape else f"score, mean over blocks of {block}"
    fig.colorbar(image, ax=ax, extend="both", label=label)
    ax.set(xlabel="target", ylabel="training sample")
    return fig, ax


def plot_self_influence(
    self_influence: Tensor, noise_mask: Tensor | None = None, ax: Axes | None = None
) -> tuple[Figure, Axes]:
    """Plot the distribution of self-influence, mislabelled samples apart when a mask is given.

    The axis is logarithmic when all values are positive, and otherwise ends at the 1st and 99th percentile, where the
    outermost bars hold what lies beyond. Each group's bars add up to 100 %.

    Args:
        self_influence: Shape `(n_train,)`.
        noise_mask: Shape `(n_train,)`, bool or 0/1; True marks a mislabelled sample.
        ax: Where to draw; a new figure by default.

    Returns:
        The figure and its axes.

    Raises:
        ValueError: If the values are not a non-empty finite vector, or the mask is not 0/1 of the same length.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import plot_self_influence
        >>> fig, ax = plot_self_influence(torch.tensor([0.9, 0.1, 0.4]), torch.tensor([True, False, False]))
        >>> ax.get_xlabel()
        'self-influence'
    """
    check_vector("self_influence", self_influence)
    groups = {"all samples": (torch.ones_like(self_influence, dtype=torch.bool), BLUE)}
    if noise_mask is not None:
        noisy = check_noise_update(self_influence, noise_mask)
        groups = {"clean": (~noisy, BLUE), "mislabelled": (noisy, RED)}
    values = self_influence.detach().double().cpu().numpy()
    positive = values.min() > 0 and values.max() > values.min()
    low, high = (values.min(), values.max()) if positive else np.quantile(values, [0.01, 0.99])
    bins = np.geomspace(low, high, 41) if positive else np.linspace(low, high if high > low else low + 1, 41)
    fig, ax = new_axes(ax)
    for name, (member, color) in groups.items():
        group = values[member.cpu().numpy()].clip(bins[0], bins[-1])
        weights = np.full(len(group), 1 / max(1, len(group)))
        ax.hist(group, bins=bins.tolist(), weights=weights, color=color, alpha=0.55, label=f"{name} ({len(group):,})")
    ax.set(xlabel="self-influence", ylabel="share of each group", xscale="log" if positive else "linear")
    percent_ticks(ax, "y")
    legend_above(ax)
    return fig, ax


def plot_image_grid(
    rows: Sequence[Sequence[tuple[Tensor, str]]],
    opponents: int = 0,
    ax: np.ndarray | None = None,
    width: float | None = None,
) -> tuple[Figure, np.ndarray]:
    """Plot target images, each in a row with its proponents and opponents.

    Args:
        rows: One row a target: `(image, caption)` of the target, of its proponents, then of its opponents. Images are
            `(H, W)`, `(1, H, W)`, `(3, H, W)` or `(H, W, 3)`; values outside [0, 1] are rescaled image by image.
        opponents: How many images at the end of each row are opponents.
        ax: Array of axes `(len(rows), len(rows[0]))` to draw into; a new figure by default.
        width: Of a new figure, in inches; by default 1.05 a column. Captions shrink with the images, down to 5 points,
            which fit into half an inch.

    Returns:
        The figure and its axes, an array of shape `(len(rows), len(rows[0]))`.

    Raises:
        TypeError: If `rows` holds something else than lists of such pairs.
        ValueError: If rows differ in length, an image has another shape, or another argument does not fit the rows.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import plot_image_grid
        >>> fig, axes = plot_image_grid([[(torch.rand(8, 8), "7"), (torch.rand(8, 8), "7: +0.31")]])
        >>> axes.shape
        (1, 2)
    """
    check_instance("plot_image_grid", "rows", rows, (list, tuple), "a list of rows of (image, caption)")
    for i, row in enumerate(rows):
        check_pairs("plot_image_grid", f"rows[{i}]", row, "a list of (image, caption)")
    if width is not None:
        width = check_float("plot_image_grid", "width", width, above=0, also="None")
    n_columns = len(rows[0]) if rows else 0
    if n_columns == 0 or any(len(row) != n_columns for row in rows):
        raise ValueError(
            f"Expected argument `rows` to hold rows of one length, but got lengths {[len(row) for row in rows]}."
        )
    opponents = check_int("plot_image_grid", "opponents", opponents, 0, n_columns - 1)
    scale = 1.0 if width is None else min(1.0, width / (1.05 * n_columns))
    if ax is None:
        fig = new_figure(width=width or 1.05 * n_columns, height=scale * (1.22 * len(rows) + 0.3))
        ax = fig.subplots(len(rows), n_columns, squeeze=False)
    elif ax.shape != (len(rows), n_columns):
        raise ValueError(f"Expected argument `ax` to have shape {(len(rows), n_columns)}, but got {ax.shape}.")
    kinds = ["target"] + ["proponents"] * (n_columns - 1 - opponents) + ["opponents"] * opponents
    colors = {"target": BLACK, "proponents": BLUE, "opponents": RED}
    for row, row_axes in zip(rows, ax, strict=True):
        for (image, caption), kind, cell in zip(row, kinds, row_axes, strict=True):
            draw_image(cell, image, caption, colors[kind], scale)
    for kind, color in colors.items():
        if kind in kinds:
            ax[0, kinds.index(kind)].set_title(kind, loc="left", fontsize=max(5, 9 * scale), color=color)
    return cast("Figure", ax[0, 0].get_figure()), ax


def plot_samples(samples: Sequence[tuple[Tensor, str]], columns: int = 6) -> tuple[Figure, np.ndarray]:
    """Plot images in reading order, such as the most suspicious samples of a training set.

    Args:
        samples: `(image, caption)`; images as in :func:`plot_image_grid`.
        columns: Images a row.

    Returns:
        The figure and its axes, an array of shape `(rows, columns)`.

    Raises:
        TypeError: If `samples` is no list of such pairs.
        ValueError: If there are none, or `columns` is no positive integer.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import plot_samples
        >>> fig, axes = plot_samples([(torch.rand(8, 8), "#7")] * 8)
        >>> axes.shape
        (2, 6)
    """
    check_pairs("plot_samples", "samples", samples, "a list of (image, caption)")
    if not samples:
        raise ValueError(argument_message("plot_samples", "samples", "at least one (image, caption)", samples))
    columns = check_int("plot_samples", "columns", columns, minimum=1)
    n_rows = -(-len(samples) // columns)
    fig = new_figure(width=1.05 * columns, height=1.3 * n_rows + 0.1)
    axes = fig.subplots(n_rows, columns, squeeze=False)
    for cell in axes.flat[len(samples) :]:
        cell.set_axis_off()
    for cell, (image, caption) in zip(axes.flat, samples, strict=False):
        draw_image(cell, image, caption, GREY)
    return fig, axes


def _block_means(scores: Tensor, max_cells: int) -> Tensor:
    """Return scores averaged over blocks to at most `max_cells` rows and columns, float64."""
    row_bin, column_bin = (
        torch.arange(n, device=scores.device) * min(n, max_cells) // n for n in scores.shape
    )  # bins of nearly equal size, in order
    sums = torch.zeros(int(row_bin[-1]) + 1, scores.shape[1], dtype=torch.float64, device=scores.device)
    for rows, block in score_blocks(scores):
        sums.index_add_(0, row_bin[rows], block)
    cells = sums.new_zeros(len(sums), int(column_bin[-1]) + 1).index_add_(1, column_bin, sums)
    return cells / row_bin.bincount().unsqueeze(1) / column_bin.bincount()
