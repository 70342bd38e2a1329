"""Figures of the metrics that need retraining, an annotation or a second method."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure

from lightning_attr.metrics import (
    brittleness_curve,
    leave_one_out_correlation,
    mean_reciprocal_rank,
    noisy_label_precision_curve,
    plot_brittleness_curve,
    plot_datamodeling_score_against_cost,
    plot_leave_one_out_correlation,
    plot_output_change,
    plot_precision_curve,
    plot_rank_agreement,
    plot_retrieval,
    query_loss_difference,
    rank_agreement,
)
from lightning_attr.metrics.figures import legend_above, new_figure

SCORES = torch.randn(30, 12, generator=torch.Generator().manual_seed(0))
NOISE = torch.randn(4, 30, 12, generator=torch.Generator().manual_seed(1))
VALUES, MASK = SCORES[:, 0], torch.arange(30) % 5 == 0
ROWS = {
    "TRAK, 10 models": (40.0, 0.33, 0.30, 0.36),
    "TRAK, 1 model": (4.0, 0.12, 0.09, 0.15),
    "TracIn, last": (3.0, 0.15, math.nan, math.nan),
}


def _leave_one_out(seeds: int = 4, bootstrap: int = 10) -> Any:
    return leave_one_out_correlation(SCORES, SCORES + NOISE[:seeds], bootstrap=bootstrap)


def _flips(counts: list[int]) -> Any:
    after = torch.linspace(0.5, -1, len(counts)).unsqueeze(1) + NOISE[0, : len(counts)]
    return brittleness_curve(counts, torch.ones(12), after, random=after + 1, same_class=after + 0.5)


PLOTS: dict[str, Callable[..., Any]] = {
    "cost": lambda ax=None: plot_datamodeling_score_against_cost(ROWS, ceiling=0.6, ax=ax),
    "precision": lambda ax=None: plot_precision_curve({"a": VALUES, "b": -VALUES}, MASK, fraction=0.1, ax=ax),
    "leave_one_out": lambda ax=None: plot_leave_one_out_correlation(_leave_one_out(), ax=ax),
    "brittleness": lambda ax=None: plot_brittleness_curve(_flips([1, 2, 4, 8]), ax=ax),
    "output_change": lambda ax=None: plot_output_change(
        query_loss_difference(SCORES[0], NOISE[:, 0], NOISE[:, 1], bootstrap=10), ax=ax
    ),
    "retrieval": lambda ax=None: plot_retrieval(mean_reciprocal_rank(SCORES, SCORES > 1, bootstrap=10), ax=ax),
    "agreement": lambda ax=None: plot_rank_agreement(rank_agreement(SCORES, NOISE[0], bootstrap=10), 10, ax=ax),
}


def _legend(ax: Any) -> list[str]:
    labels: list[str] = ax.get_legend_handles_labels()[1]
    return labels


@pytest.mark.parametrize("name", PLOTS)
def test_plots_draw_without_pyplot(name: str) -> None:
    fig, ax = PLOTS[name]()
    fig.savefig(io.BytesIO(), format="png")
    assert isinstance(fig, Figure)
    assert ax.figure is fig
    assert ax.get_ylabel()
    assert pyplot.get_fignums() == []


@pytest.mark.parametrize("name", PLOTS)
def test_plots_use_the_axes_given_and_keep_their_words_inside_a_paper_column(name: str) -> None:
    fig = new_figure(width=3.3, height=2.5)
    given = fig.subplots()
    assert PLOTS[name](ax=given) == (fig, given)
    fig.draw_without_rendering()
    page = fig.bbox
    for text in (*given.get_legend().get_texts(), given.xaxis.label, given.yaxis.label, *given.texts):
        box = text.get_window_extent()
        assert box.width == 0 or (page.x0 <= box.x0 and box.x1 <= page.x1), text.get_text()
        assert box.height == 0 or (page.y0 <= box.y0 and box.y1 <= page.y1), text.get_text()


def test_legend_takes_more_columns_where_there_is_room() -> None:
    columns = []
    for width in (1.8, 3.3, 6.0):
        ax = new_figure(width=width).subplots()
        for label in ("method", "random", "opposite"):
            ax.plot([0], [0], label=label)
        legend_above(ax)
        columns.append(ax.get_legend()._ncols)
    assert columns == [1, 2, 3]


def test_cost_joins_the_rows_of_one_method_in_order_of_cost() -> None:
    _, ax = plot_datamodeling_score_against_cost(ROWS, ceiling=torch.tensor(0.6), cost="GPU hours")
    assert _legend(ax) == ["ceiling", "TRAK", "TracIn, last"]
    trak = ax.containers[0].lines[0]
    assert list(trak.get_xdata()) == [4, 40]
    assert list(trak.get_ydata()) == [0.12, 0.33]
    assert ax.get_xlabel() == "GPU hours"
    assert ax.get_ylabel() == "LDS"
    assert list(ax.lines[-1].get_ydata()) == pytest.approx([0.6, 0.6])
    assert "ceiling" not in _legend(plot_datamodeling_score_against_cost(ROWS)[1])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({}, "`rows` to hold at least one method, but it is empty"),
        ({"a": (0, 0.1, 0.0, 0.2)}, r"with a positive cost .* but got \(0\.0, 0\.1, 0\.0, 0\.2\) for 'a'"),
        ({"a": (1, 0.3, 0.0, 0.2)}, "low <= score <= high, but got"),
        ({"a": (1, math.nan, 0.0, 0.2)}, "but got .* for 'a'"),
    ],
)
def test_cost_rejects_bad_rows(rows: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_datamodeling_score_against_cost(rows)


def test_precision_compares_scorers_with_ideal_and_random() -> None:
    _, ax = plot_precision_curve({"self-influence": VALUES, "loss": -VALUES}, MASK)
    assert _legend(ax) == ["self-influence", "loss", "ideal", "random"]
    inspected, precision = noisy_label_precision_curve(VALUES, MASK)
    np.testing.assert_allclose(ax.lines[0].get_xdata(), inspected)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), precision)
    best = noisy_label_precision_curve(MASK.double(), MASK)[1]
    np.testing.assert_allclose(ax.lines[2].get_ydata(), best)
    np.testing.assert_allclose(ax.lines[3].get_ydata(), [0.2, 0.2])


def test_leave_one_out_legend_leaves_out_what_is_unknown() -> None:
    score = _leave_one_out(seeds=1, bootstrap=0)
    means = [f"Pearson {float(score.pearson.mean):.3f}", f"Spearman {float(score.spearman.mean):.3f}"]
    assert _legend(plot_leave_one_out_correlation(score)[1]) == means


def test_brittleness_is_logarithmic_for_doubling_counts_only() -> None:
    _, doubling = plot_brittleness_curve(_flips([1, 2, 4, 8, 16]))
    assert doubling.get_xscale() == "log"
    assert [tick.get_text() for tick in doubling.get_xticklabels()] == ["1", "2", "4", "8", "16"]
    _, even = plot_brittleness_curve(_flips([20, 40, 60, 80]))
    assert even.get_xscale() == "linear"
    assert _legend(even) == ["method", "random", "same class"]
    np.testing.assert_allclose(even.lines[0].get_ydata(), _flips([20, 40, 60, 80]).success["method"])


def test_output_change_draws_each_target_and_the_mean_difference() -> None:
    change = query_loss_difference(SCORES[0], NOISE[:, 0], NOISE[:, 1], bootstrap=0)
    _, ax = plot_output_change(change, "rise of loss")
    np.testing.assert_allclose(ax.lines[0].get_xdata(), change.random)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), change.method)
    above = (change.per_target > 0).double().mean()
    assert _legend(ax) == [
        f"targets ({above:.0%} above)", "no difference", f"mean difference {float(change.mean):.3f}",
    ]  # fmt: skip


def test_retrieval_leaves_out_undefined_targets() -> None:
    relevant = SCORES > 1
    relevant[:, 0] = False
    with pytest.warns(UserWarning, match="undefined"):
        score = mean_reciprocal_rank(SCORES, relevant, bootstrap=0)
    _, ax = plot_retrieval(score)
    assert sum(bar.get_height() for bar in ax.patches) == 12 - score.undefined
