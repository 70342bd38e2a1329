"""Figures: what they show, that they draw, and that nothing leaks into pyplot."""

from __future__ import annotations

import builtins
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from torch import Tensor

from lightning_attr.errors import MissingDependencyError
from lightning_attr.metrics import (
    data_selection_curve,
    functional,
    linear_datamodeling_score,
    noisy_label_recall_curve,
    plot_datamodeling_score,
    plot_image_grid,
    plot_recall_curve,
    plot_score_heatmap,
    plot_selection_curve,
    plot_self_influence,
)
from lightning_attr.metrics.figures import BLUE, RED, displayable

VALUES = torch.rand(40, generator=torch.Generator().manual_seed(0)) + 0.01
MASK = torch.arange(40) % 5 == 0


def _selection() -> Any:
    fractions = torch.tensor([0.01, 0.1, 0.5])
    return data_selection_curve(fractions, torch.rand(3, 3), torch.rand(2, 3), torch.rand(1, 3))


def _datamodeling(seeds: int = 2, bootstrap: int = 10) -> Any:
    outputs = torch.randn(seeds, 12, 9, generator=torch.Generator().manual_seed(0))
    return linear_datamodeling_score(outputs[0], torch.eye(12), outputs, bootstrap=bootstrap)


PLOTS: dict[str, Callable[..., Any]] = {
    "recall": lambda ax=None: plot_recall_curve(VALUES, MASK, fraction=0.1, ax=ax),
    "selection": lambda ax=None: plot_selection_curve(_selection(), ax=ax),
    "datamodeling": lambda ax=None: plot_datamodeling_score(_datamodeling(), ax=ax),
    "heatmap": lambda ax=None: plot_score_heatmap(torch.randn(9, 4), ax=ax),
    "self_influence": lambda ax=None: plot_self_influence(VALUES, MASK, ax=ax),
}


@pytest.mark.parametrize("name", PLOTS)
def test_plots_draw_without_pyplot(name: str) -> None:
    fig, ax = PLOTS[name]()
    fig.savefig(io.BytesIO(), format="png")
    assert isinstance(fig, Figure)
    assert ax.figure is fig
    assert ax.get_xlabel()
    assert ax.get_ylabel()
    assert pyplot.get_fignums() == []


@pytest.mark.parametrize("name", PLOTS)
def test_plots_use_the_axes_given(name: str) -> None:
    fig = Figure()
    given = fig.subplots()
    assert PLOTS[name](ax=given) == (fig, given)


@pytest.mark.parametrize("name", PLOTS)
def test_missing_matplotlib_names_the_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without_matplotlib(module: str, *args: Any, **kwargs: Any) -> Any:
        if module.startswith("matplotlib"):
            raise ImportError(module)
        return real_import(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(MissingDependencyError, match=r'pip install "lightning_attr\[plot\]"'):
        PLOTS[name]()


def _legend(ax: Any) -> list[str]:
    labels: list[str] = ax.get_legend_handles_labels()[1]
    return labels


def test_recall_curve_compares_scorers_with_ideal_and_random() -> None:
    _, ax = plot_recall_curve({"self-influence": VALUES, "loss": -VALUES}, MASK)
    assert _legend(ax) == ["self-influence", "loss", "ideal", "random"]
    inspected, recall = noisy_label_recall_curve(VALUES, MASK)
    np.testing.assert_allclose(ax.lines[0].get_xdata(), inspected)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), recall)
    assert list(ax.lines[2].get_xdata()) == pytest.approx([0, 0.2, 1])


def test_selection_curve_draws_bands_and_skips_what_was_not_run() -> None:
    curve = _selection()
    curve.mean["opposite"][1] = torch.nan
    _, ax = plot_selection_curve(curve, metric="accuracy")
    assert _legend(ax) == ["method", "random", "opposite"]
    assert len(ax.collections) == 3
    assert len(ax.lines[2].get_xdata()) == 2
    assert ax.get_ylabel() == "accuracy"
    assert ax.get_xscale() == "log"
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["1%", "10%", "50%"]


def test_selection_curve_of_near_fractions_is_linear() -> None:
    curve = data_selection_curve(torch.tensor([0.2, 0.4]), torch.rand(1, 2), torch.rand(1, 2))
    assert plot_selection_curve(curve)[1].get_xscale() == "linear"


def test_datamodeling_legend_leaves_out_what_is_unknown() -> None:
    score = _datamodeling(seeds=1, bootstrap=0)
    assert _legend(plot_datamodeling_score(score)[1]) == [f"mean {float(score.mean):.3f}"]


@pytest.mark.parametrize("block_elements", [1, 10**6])
def test_heatmap_averages_blocks_and_centers_colours(block_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "_BLOCK_ELEMENTS", block_elements)
    scores = torch.arange(40.0).reshape(8, 5) - 5
    fig, ax = plot_score_heatmap(scores, max_cells=4)
    image = ax.images[0]
    columns = [[0, 1], [2], [3], [4]]
    expected = [[scores[2 * i : 2 * i + 2, columns[j]].mean().item() for j in range(4)] for i in range(4)]
    np.testing.assert_allclose(image.get_array(), expected)
    assert image.norm.vmin == -image.norm.vmax
    assert image.get_extent() == [0, 5, 8, 0]
    assert fig.axes[1].get_ylabel() == "score, mean over blocks of 2 x 1"


def test_heatmap_of_zeros_and_of_small_matrices() -> None:
    fig, ax = plot_score_heatmap(torch.zeros(3, 2))
    assert ax.images[0].norm.vmax == 1
    assert fig.axes[1].get_ylabel() == "score"
    with pytest.raises(ValueError, match=r"`scores` to be a non-empty matrix, but got shape \(3,\)\."):
        plot_score_heatmap(torch.zeros(3))


def test_self_influence_groups_each_add_up_to_one() -> None:
    _, ax = plot_self_influence(VALUES, MASK)
    assert _legend(ax) == ["clean (32)", "mislabelled (8)"]
    for bars in ax.containers:
        assert sum(bar.get_height() for bar in bars) == pytest.approx(1)
    assert ax.get_xscale() == "log"


@pytest.mark.parametrize("values", [VALUES - 0.5, torch.full((5,), 3.0), torch.zeros(4), torch.tensor([1.0])])
def test_self_influence_that_no_logarithm_fits(values: Tensor) -> None:
    _, ax = plot_self_influence(values)
    assert ax.get_xscale() == "linear"
    assert _legend(ax) == [f"all samples ({len(values)})"]
    assert sum(bar.get_height() for bar in ax.patches) == pytest.approx(1)


def test_self_influence_rejects_a_short_mask() -> None:
    with pytest.raises(ValueError, match="to have the same length, but got 40 and 3"):
        plot_self_influence(VALUES, MASK[:3])


@pytest.mark.parametrize("shape", [(6, 4), (1, 6, 4), (3, 6, 4), (6, 4, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_images_of_every_layout_are_shown_upright_in_unit_range(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    image = torch.rand(shape)
    shown = displayable(image if dtype.is_floating_point else (image * 255).to(dtype))
    assert shown.shape in {(6, 4), (6, 4, 3)}
    rgb = image.permute(1, 2, 0) if shape == (3, 6, 4) else image.reshape(shown.shape)
    np.testing.assert_allclose(shown, rgb, atol=1 / 255 + 1e-6)


def test_normalised_images_are_rescaled_and_constant_ones_survive() -> None:
    shown = displayable(torch.tensor([[-2.0, 0.0], [1.0, 2.0]]))
    np.testing.assert_allclose(shown, [[0, 0.5], [0.75, 1]])
    np.testing.assert_allclose(displayable(torch.full((2, 2), 7.0)), np.zeros((2, 2)))


def _rows(n_rows: int = 2, n_columns: int = 4) -> list[list[tuple[Tensor, str]]]:
    return [[(torch.rand(5, 5), f"row {i} column {j}") for j in range(n_columns)] for i in range(n_rows)]


def test_image_grid_names_and_frames_each_kind() -> None:
    fig, axes = plot_image_grid(_rows(), opponents=1)
    fig.savefig(io.BytesIO(), format="png")
    assert axes.shape == (2, 4)
    assert [ax.get_title(loc="left") for ax in axes[0]] == ["target", "proponents", "", "opponents"]
    assert axes[1, 2].get_xlabel() == "row 1 column 2"
    assert axes[1, 2].spines["left"].get_edgecolor() == pytest.approx(_rgba(BLUE))
    assert axes[1, 3].spines["left"].get_edgecolor() == pytest.approx(_rgba(RED))


def _rgba(color: str) -> tuple[float, ...]:
    from matplotlib.colors import to_rgba

    return to_rgba(color)


def test_image_grid_without_opponents_and_into_given_axes() -> None:
    fig = Figure()
    given = fig.subplots(2, 4)
    same_fig, same_axes = plot_image_grid(_rows(), ax=given)
    assert same_fig is fig
    assert same_axes is given
    assert [ax.get_title(loc="left") for ax in given[0]] == ["target", "proponents", "", ""]


def test_image_grid_rejects_bad_input() -> None:
    with pytest.raises(ValueError, match=r"`rows` to hold rows of one length, but got lengths \[4, 3\]\."):
        plot_image_grid([_rows()[0], _rows()[1][:3]])
    with pytest.raises(ValueError, match=r"`rows` to hold rows of one length, but got lengths \[\]\."):
        plot_image_grid([])
    with pytest.raises(ValueError, match=r"`opponents` of .* to be an integer from 0 to 3, but got 4\."):
        plot_image_grid(_rows(), opponents=4)
    with pytest.raises(ValueError, match=r"`ax` to have shape \(2, 4\), but got \(1, 4\)\."):
        plot_image_grid(_rows(), ax=Figure().subplots(1, 4, squeeze=False))
    with pytest.raises(ValueError, match=r"Expected images of shape .* but got \(2, 5, 5\)\."):
        plot_image_grid([[(torch.rand(2, 5, 5), "")]])
