"""A whole run: forwards once, then backwards with some of its states kept and those between computed again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lightning_attr.errors import AttributionError
from lightning_attr.replay.state import RunState
from lightning_attr.replay.steps import ReplayStep, Trace, advance, go_back

Visit = Callable[[int, RunState], RunState]
"""Optimizer steps taken, and the state after them -> the state to go on with."""


class Trajectory:
    r"""The states of a run, in memory of the order of :math:`\sqrt T` states for :math:`T` steps.

    Going forwards keeps every :math:`\sqrt T`-th state; going backwards computes the states between two of them again,
    so that each step is taken twice.

    Args:
        start: the state before the first step.
        steps: all of them, in order.
        visit: sees each state, the first as well: to compare it, or to put another in its place, the same each time.

    Example:
        >>> Trajectory(RunState.begin({"w": torch.ones(3)}, {}), []).end.parameters
        {'w': tensor([1., 1., 1.])}
    """

    def __init__(
        self, start: RunState, steps: Sequence[ReplayStep], visit: Visit = lambda number, state: state
    ) -> None:
        self.steps = steps
        self.visit = visit
        self.stride = max(1, math.isqrt(len(steps)))
        self.end = self._run(start)

    def _run(self, start: RunState) -> RunState:
        state = self.visit(0, start)
        self.kept = [state]
        for place in range(len(self.steps)):
            state = self._advance(place, state)[0]
            if (place + 1) % self.stride == 0:
                self.kept.append(state)
        return state

    def _advance(self, place: int, state: RunState) -> tuple[RunState, Trace]:
        after, trace = advance(self.steps[place], state)
        return self.visit(place + 1, after), trace

    def backwards(self) -> Iterator[tuple[ReplayStep, Trace]]:
        """Go back from the last step to the first.

        Yields each step, and what going back through it needs.
        """
        for number in reversed(range(len(self.kept))):
            first = number * self.stride
            places = range(first, min(first + self.stride, len(self.steps)))
            state, traces = self.kept[number], []
            for place in places:
                state, trace = self._advance(place, state)
                traces.append(trace)
            if number + 1 < len(self.kept):
                _check_repeated(places, state, self.kept[number + 1])
            for place, trace in zip(reversed(places), reversed(traces), strict=True):
                yield self.steps[place], trace

    def weight_derivatives(self, adjoints: Sequence[RunState], n_rows: int, hessian: str = "exact") -> Tensor:
        """Differentiate outputs of the run's end, of which there are adjoints, by the weight that a sample has.

        Returns ``(n_rows, m)``, in the dtype of the parameters: over all losses that it was in; zero for rows that no
        step drew. For ``hessian`` see :func:`lightning_attr.replay.steps.go_back`.
        """
        reference = next(iter(self.end.parameters.values()))
        scores = torch.zeros(n_rows, len(adjoints), dtype=reference.dtype, device=reference.device)
        found = list(adjoints)
        for step, trace in self.backwards():
            found = go_back(step, trace, found, scores, hessian)
        return scores


def memory_needed(state_bytes: int, steps: int, outputs: int) -> int:
    """Count the bytes that going back through a run takes, beside the graph of one step.

    Example:
        >>> memory_needed(1000, steps=100, outputs=5)
        30000
    """
    stride = max(1, math.isqrt(steps))
    return state_bytes * (math.ceil(steps / stride) + stride + 2 * outputs)


def _check_repeated(places: range, again: RunState, before: RunState) -> None:
    """Refuse a run that does not come out the same twice."""
    for name, tensor in before.parameters.items():
        other = again.parameters[name]
        if not torch.equal(other, tensor) and not torch.allclose(other, tensor, rtol=1e-4, atol=1e-7, equal_nan=True):
            raise AttributionError(
                f"Two replays of the steps {places.start} to {places.stop - 1} end in different weights, in `{name}`: "
                "something in the training step is not deterministic. torch.use_deterministic_algorithms(True) finds "
                "such operations; generators of the user's own have to be seeded in each step."
            )
