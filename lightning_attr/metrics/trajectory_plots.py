"""Figures of generated images by denoising step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from lightning_attr.arguments.listed import check_pairs
from lightning_attr.metrics.figures import BLACK, BLUE, draw_image, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_denoising_steps(
    steps: Sequence[tuple[Tensor, str]], proponents: Sequence[Sequence[tuple[Tensor, str]]] = ()
) -> tuple[Figure, np.ndarray]:
    """Plot what a model took an image for at each denoising step, above the training images that made it so.

    Args:
        steps: One column a step: `(image, caption)` of the estimate there; images as in
            :func:`~lightning_attr.metrics.plot_image_grid`.
        proponents: For each step `(image, caption)` of its proponents, the strongest first; as many for every step.

    Returns:
        The figure and its axes, an array of shape `(1 + proponents per step, steps)`.

    Raises:
        TypeError: If an argument holds something else.
        ValueError: If there are no steps, the proponents are not as many for every step, or an image has another shape.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import plot_denoising_steps
        >>> image = torch.rand(8, 8)
        >>> fig, axes = plot_denoising_steps([(image, "t = 9"), (image, "t = 0")], [[(image, "#3")], [(image, "#7")]])
        >>> axes.shape
        (2, 2)
    """
    expected = "a list of (image, caption)"
    check_pairs("plot_denoising_steps", "steps", steps, expected)
    for i, found in enumerate(proponents):
        check_pairs("plot_denoising_steps", f"proponents[{i}]", found, expected)
    counts = [len(found) for found in proponents] or [0] * len(steps)
    if not steps or len(counts) != len(steps) or len(set(counts)) > 1:
        raise ValueError(
            f"Expected argument `proponents` to hold as many images for each of the {len(steps)} steps, at least one, "
            f"but got {counts}."
        )
    rows = 1 + counts[0]
    fig = new_figure(width=1.05 * len(steps) + 0.3, height=1.22 * rows + 0.1)
    axes = fig.subplots(rows, len(steps), squeeze=False)
    for column, estimate in enumerate(steps):
        draw_image(axes[0, column], *estimate, BLACK)
        for cell, proponent in zip(axes[1:, column], proponents[column] if proponents else (), strict=True):
            draw_image(cell, *proponent, BLUE)
    for row, (label, color) in enumerate([("estimate", BLACK), ("proponents", BLUE)][:rows]):
        axes[row, 0].set_ylabel(label, fontsize=9, color=color)
    return fig, axes
