"""The grid of estimates by denoising step."""

from __future__ import annotations

import pytest
import torch

from lightning_attr.metrics import plot_denoising_steps

IMAGE = torch.rand(1, 8, 8)


def test_each_step_is_a_column_above_its_proponents() -> None:
    steps = [(IMAGE, f"t = {t}") for t in (9, 5, 0)]
    figure, axes = plot_denoising_steps(steps, [[(IMAGE, f"#{i}{k}") for k in range(2)] for i in range(3)])
    assert axes.shape == (3, 3)
    captions = [[cell.get_xlabel() for cell in row] for row in axes]
    assert captions == [["t = 9", "t = 5", "t = 0"], ["#00", "#10", "#20"], ["#01", "#11", "#21"]]
    assert [axes[row, 0].get_ylabel() for row in range(3)] == ["estimate", "proponents", ""]
    figure.canvas.draw()


def test_estimates_alone() -> None:
    _, axes = plot_denoising_steps([(IMAGE, "t = 1"), (IMAGE, "t = 0")])
    assert axes.shape == (1, 2)


@pytest.mark.parametrize(("steps", "proponents"), [(0, []), (2, [1]), (2, [1, 2])])
def test_proponents_that_do_not_fit(steps: int, proponents: list[int]) -> None:
    with pytest.raises(ValueError, match=f"as many images for each of the {steps} steps, at least one, but got"):
        plot_denoising_steps([(IMAGE, "")] * steps, [[(IMAGE, "")] * n for n in proponents])
