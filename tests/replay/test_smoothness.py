"""Metasmoothness: 1 for a run that is linear in the weights of its samples, little for one that jumps."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from lightning_attr.replay.drift import largest_drift
from lightning_attr.replay.optimizer_forms import GroupForm
from lightning_attr.replay.smoothness import metasmoothness
from lightning_attr.replay.state import RunState
from lightning_attr.replay.steps import Evaluated, ReplayStep

START = RunState.begin({"w": torch.ones(50).double()}, {})


class Terms:
    """The mean over four samples of a function of parameters, of some frequency, with its slope."""

    rows = torch.arange(4)

    def __init__(self, frequency: float) -> None:
        self.frequency = frequency
        self.slopes = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).double()

    def evaluate(self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], apart: bool) -> Evaluated:
        terms = torch.sin(self.frequency * parameters["w"] * self.slopes).sum(1) / max(self.frequency, 1.0) / 4
        return Evaluated(terms.sum(), terms, {})


@pytest.mark.parametrize(("frequency", "low", "high"), [(0.1, 0.99, 1.0), (1e4, -0.5, 0.5)])
def test_a_smooth_run_goes_on_as_it_began(frequency: float, low: float, high: float) -> None:
    steps = [ReplayStep(step, [Terms(frequency)], 1, (GroupForm("SGD", ("w",), 0.1),)) for step in range(5)]
    assert low <= metasmoothness(START, steps, n_rows=4) <= high


def test_drift_is_of_the_tensor_that_differs_most_and_infinite_for_nan() -> None:
    def state(w: float, mean: float, count: int) -> RunState:
        return RunState.begin({"w": torch.tensor([w])}, {"mean": torch.tensor([mean]), "count": torch.tensor(count)})

    assert largest_drift(state(1.0, 2.0, 3), state(1.0, 2.0, 3))[1] == 0.0
    assert largest_drift(state(1.0, 2.5, 3), state(1.0, 2.0, 3)) == ("mean", 0.25)
    assert largest_drift(state(1.0, 2.5, 6), state(1.0, 2.0, 3)) == ("count", 1.0)
    assert largest_drift(state(float("nan"), 2.5, 6), state(1.0, 2.0, 3)) == ("w", float("inf"))
