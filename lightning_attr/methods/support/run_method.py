"""Methods that replay the whole run, and go back through it."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lightning_attr.arguments.checks import check_flag
from lightning_attr.data.memory import free_bytes
from lightning_attr.errors import AttributionError, MemoryBudgetError
from lightning_attr.features.snapshot_model import SnapshotModel
from lightning_attr.methods.base import AttributionMethod, ScoreBlock, SnapshotFeatures
from lightning_attr.methods.cache import CacheKey
from lightning_attr.methods.support.end_of_run import batch_adjoints, target_adjoints
from lightning_attr.methods.support.module_method import model_of
from lightning_attr.replay.recorded_run import RecordedRun
from lightning_attr.replay.state import RunState
from lightning_attr.replay.trajectory import Trajectory, Visit, memory_needed

T = TypeVar("T")

_OWN = 64
"""Training samples that are scored for their own output in one walk."""
_REPLAY: CacheKey[tuple[RecordedRun, Trajectory]] = CacheKey("replay")


class RunMethod(AttributionMethod):
    """A method that replays the run and walks it backwards from its end, where the targets are seen.

    Args:
        self_influence: whether each training sample is scored for its own output: as many targets more.
    """

    hessian = "exact"

    def __init__(self, self_influence: bool) -> None:
        self.projector = None
        self.self_influence = check_flag(self, "self_influence", self_influence)

    def select(self, snapshots: Sequence[T]) -> Sequence[T]:
        """Take the end of the run, where targets are seen; the store has the others."""
        return snapshots[-1:]

    @abstractmethod
    def _visit(self, run: RecordedRun, found: dict[str, float]) -> Visit:
        """Say what is made of each state that a replay comes to, and note the drift at each snapshot."""

    def score(self, snapshots: Sequence[SnapshotFeatures]) -> Iterator[ScoreBlock]:
        """Go through the run and back, for all targets together; see :meth:`AttributionMethod.score`."""
        (snapshot,) = snapshots
        model = model_of(snapshot)
        if not (model.writer or self.self_influence):  # one process does it all: the steps of a run have an order
            return
        run, trajectory = snapshot.cache.once(_REPLAY, lambda: self._replay(snapshot, model))
        model.load()
        adjoints = target_adjoints(model, trajectory.end, snapshot.target_rows)
        scores = self._derivatives(run, trajectory, adjoints if model.writer else [])
        if not model.writer:
            scores = scores.new_zeros(run.n_rows, len(adjoints))
        yield ScoreBlock(range(run.n_rows), scores, self._self_influence(model, run, trajectory).to(scores))

    def _replay(self, snapshot: SnapshotFeatures, model: SnapshotModel) -> tuple[RecordedRun, Trajectory]:
        run = _run_of(model, type(self).__name__)
        start = run.state_at(0)
        self._check_memory(model, start, len(run.steps), len(snapshot.target_rows))
        self._look(snapshot, run)
        found: dict[str, float] = {}
        trajectory = Trajectory(start, run.replay_steps, self._visit(run, found))
        snapshot.evidence.update(steps=len(run.steps), drift=found)
        return run, trajectory

    def _derivatives(self, run: RecordedRun, trajectory: Trajectory, adjoints: Sequence[RunState]) -> Tensor:
        if not adjoints:
            return next(iter(trajectory.end.parameters.values())).new_zeros(run.n_rows, 0)
        return trajectory.weight_derivatives(adjoints, run.n_rows, self.hessian)

    def _self_influence(self, model: SnapshotModel, run: RecordedRun, trajectory: Trajectory) -> Tensor:
        """Score each training sample of this process for its own output, some of them in a walk."""
        found = torch.full((run.n_rows,), 0.0 if self.self_influence else math.nan)
        own: list[int] = []
        adjoints: list[RunState] = []

        def walk() -> None:
            found[own] = self._derivatives(run, trajectory, adjoints)[own].diagonal().to(found)
            own.clear()
            adjoints.clear()

        for rows, batch in model.train_batches() if self.self_influence else ():
            model.load()
            own += rows
            adjoints += batch_adjoints(model, model.plan, trajectory.end, rows, batch)
            if len(own) >= _OWN:
                walk()
        if own:
            walk()
        return found

    def _look(self, snapshot: SnapshotFeatures, run: RecordedRun) -> None:
        """Look at the run before it is replayed."""

    def _check_memory(self, model: SnapshotModel, start: RunState, steps: int, targets: int) -> None:
        needed, free = memory_needed(4 * start.nbytes, steps, targets), free_bytes(model.device)
        if free is not None and needed > free:
            raise MemoryBudgetError(
                f"{type(self).__name__} keeps states of the run ({steps:,} steps) and of each target ({targets}), "
                f"about {needed / 1e9:,.1f} GB, but {free / 1e9:,.1f} GB are free on {model.device}. Score fewer "
                "targets at once, or take a method on stored features: TRAK, TracIn, LESS."
            )


def _run_of(model: SnapshotModel, name: str) -> RecordedRun:
    if model.run is None:
        raise AttributionError(
            f"{name} replays the run that led to a snapshot, but this one has no record of a run. Train with "
            '`AttributionCallback(snapshots="start+geometric", journal=True)` and call `trainer.attribute`.'
        )
    return model.run()
