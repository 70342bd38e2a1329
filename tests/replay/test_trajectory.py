"""Going through a run forwards and backwards: states put in place on the way, and runs that do not repeat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_attr.errors import AttributionError
from lightning_attr.replay.optimizer_forms import GroupForm
from lightning_attr.replay.state import RunState
from lightning_attr.replay.steps import Evaluated, ReplayStep
from lightning_attr.replay.trajectory import Trajectory

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double()
START = RunState.begin({"w": torch.ones(3).double()}, {})


class Squares:
    """Half the mean of squares over some rows, whose gradient may grow with each call."""

    def __init__(self, rows: list[int], growth: float = 0.0) -> None:
        self.rows = torch.tensor(rows)
        self.growth = growth
        self.calls = 0

    def evaluate(self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], apart: bool) -> Evaluated:
        self.calls += 1
        terms = (X[self.rows] @ parameters["w"] - 1).square() / 2
        bent = self.growth * self.calls * (parameters["w"] - parameters["w"].detach()).sum()
        return Evaluated(terms.mean() + bent, terms / len(terms), {})


def steps(count: int, growth: float = 0.0, **settings: Any) -> list[ReplayStep]:
    form = GroupForm("SGD", ("w",), 0.1, settings=settings)
    return [ReplayStep(step, [Squares([step % 4, (step + 1) % 4], growth)], 1, (form,)) for step in range(count)]


@pytest.mark.parametrize("count", [1, 2, 9, 11])
def test_a_quadratic_run_has_its_closed_form(count: int) -> None:
    trajectory = Trajectory(START, steps(count))
    query = torch.tensor([1.0, -2.0, 0.5]).double()
    found = trajectory.weight_derivatives([RunState.adjoint({"w": query}, {}, trajectory.end)], 4)
    w, expected = START.parameters["w"], torch.zeros(4).double()
    path = []
    for step in range(count):
        rows = [step % 4, (step + 1) % 4]
        path.append((rows, w))
        w = w - 0.1 * (X[rows].T @ (X[rows] @ w - 1)) / 2
    torch.testing.assert_close(trajectory.end.parameters["w"], w)
    for rows, before in reversed(path):  # q (I - lr H) ... against lr g_z / 2
        for row in rows:
            expected[row] -= 0.1 * (X[row] @ before - 1) * X[row] @ query / 2
        query = query - 0.1 * X[rows].T @ (X[rows] @ query) / 2
    torch.testing.assert_close(found[:, 0], expected)


def test_a_visit_may_put_another_state_in_place() -> None:
    seen: list[int] = []

    def visit(number: int, state: RunState) -> RunState:
        seen.append(number)
        return START if number == 2 else state

    trajectory = Trajectory(START, steps(4), visit)
    assert seen == [0, 1, 2, 3, 4]
    after = Trajectory(START, steps(4)[2:])
    assert torch.equal(trajectory.end.parameters["w"], after.end.parameters["w"])


def test_several_outputs_share_the_walk_and_each_is_as_alone() -> None:
    trajectory = Trajectory(START, steps(7, momentum=0.9))
    adjoints = [RunState.adjoint({"w": row}, {}, trajectory.end) for row in torch.eye(3).double()]
    together = trajectory.weight_derivatives(adjoints, 4)
    for number, adjoint in enumerate(adjoints):
        alone = Trajectory(START, steps(7, momentum=0.9)).weight_derivatives([adjoint], 4)
        assert torch.equal(together[:, number], alone[:, 0])


def test_a_run_that_ends_elsewhere_the_second_time_is_refused() -> None:
    trajectory = Trajectory(START, steps(9, growth=0.1))
    with pytest.raises(AttributionError, match="Two replays of the steps 6 to 8 end in different weights, in `w`"):
        trajectory.weight_derivatives([RunState.adjoint({}, {}, trajectory.end)], 4)
