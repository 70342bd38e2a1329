"""A recorded run, ready to be gone through again: its beginning, its steps, and the snapshots on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lightning_attr.errors import AttributionError
from lightning_attr.gradients.functional import call_with
from lightning_attr.gradients.plain_execution import plain_execution
from lightning_attr.objectives.reductions import Reductions
from lightning_attr.replay.optimizer_forms import Clipping, GroupForm
from lightning_attr.replay.running_statistics import NewStatistics
from lightning_attr.replay.shares import sample_shares
from lightning_attr.replay.state import RunState
from lightning_attr.replay.steps import Evaluated, ReplayStep
from lightning_attr.user_code.calls import Surroundings
from lightning_attr.user_code.step_world import replayed
from lightning_attr.user_code.training_step import followed_loss


@dataclass(frozen=True)
class Drawn:
    """The samples of one micro-batch, and when they were trained on.

    Args:
        rows: of the data set, in the order of the batch, ``(b,)``, int64.
        epoch: counted from 0.
        global_step: optimizer steps taken before it.
        batch_idx: batches of the epoch before it.
        random_state: puts the random streams back as they were before the batch was read; None where that is unknown.
    """

    rows: Tensor
    epoch: int
    global_step: int
    batch_idx: int
    random_state: Callable[[], object] | None = None


@dataclass(frozen=True)
class RecordedStep:
    """One optimizer step on record.

    Args:
        drawn: its micro-batches.
        divisor: of each of their losses, ``accumulate_grad_batches``.
        groups: how parameters are updated.
    """

    drawn: tuple[Drawn, ...]
    divisor: int
    groups: tuple[GroupForm, ...]


@dataclass(frozen=True)
class RecordedRun:
    """All that a replay needs.

    Args:
        module: the user's module; what it holds stays as it is.
        steps: of the run, from its first.
        snapshots: optimizer steps taken -> key of the snapshot there; 0 is the start.
        weights: reads parameters and buffers of a snapshot.
        read: reads samples, as training does, onto the device.
        clipping: of the gradients.
        resting: names of the submodules that were in eval mode while the others were in train mode.
        world: the world of a step: epoch and optimizer steps taken -> surroundings; None for that around.
        precision: the context that training steps ran in.
    """

    module: Any = field(repr=False)
    steps: Sequence[RecordedStep]
    snapshots: Mapping[int, str]
    weights: Callable[[str], Mapping[str, Tensor]]
    read: Callable[[Sequence[int]], Any]
    clipping: Clipping | None = None
    resting: frozenset[str] = frozenset()
    world: Callable[[int, int], Surroundings] | None = None
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext

    def state_at(self, number: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Read parameters and buffers of the snapshot after so many steps, on the module's device."""
        weights = self.weights(self.snapshots[number])
        parts = dict(self.module.named_parameters()), dict(self.module.named_buffers())
        first, second = ({name: weights[name].to(own) for name, own in part.items()} for part in parts)
        return first, second

    @property
    def start(self) -> RunState:
        """The state before the first step."""
        return RunState.begin(*self.state_at(0))

    @cached_property
    def replay_steps(self) -> list[ReplayStep]:
        """The steps, as functions."""
        return [
            ReplayStep(
                step.drawn[0].global_step,
                [RecordedBatch(self, drawn) for drawn in step.drawn],
                step.divisor,
                step.groups,
                self.clipping,
            )
            for step in self.steps
        ]

    @contextmanager
    def around(self, drawn: Drawn) -> Iterator[None]:
        """Surround a training step: its world, the modes of its layers, its precision."""
        world = (
            nullcontext() if self.world is None else replayed(self.module, self.world(drawn.epoch, drawn.global_step))
        )
        with world, training_modes(self.module, self.resting), self.precision(), plain_execution():
            yield


@contextmanager
def training_modes(module: nn.Module, resting: frozenset[str]) -> Iterator[None]:
    """Put a module into train mode for a while, but for some of its submodules.

    Example:
        >>> net = nn.Sequential(nn.Dropout(), nn.Dropout()).eval()
        >>> with training_modes(net, frozenset({"1"})):
        ...     print(net[0].training, net[1].training)
        True False
    """
    before = [(name, layer, layer.training) for name, layer in module.named_modules()]
    try:
        for name, layer, _ in before:
            layer.training = name not in resting
        yield
    finally:
        for _, layer, training in before:
            layer.training = training


class RecordedBatch:
    """The training loss of a micro-batch, as a function of parameters and buffers.

    Args:
        run: of the batch.
        drawn: its samples.
    """

    def __init__(self, run: RecordedRun, drawn: Drawn) -> None:
        self.run = run
        self.drawn = drawn

    @property
    def rows(self) -> Tensor:
        """Data set row of each sample."""
        return self.drawn.rows

    def evaluate(self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], apart: bool) -> Evaluated:
        """Run the user's training step; see :class:`lightning_attr.replay.steps.MicroBatch`."""
        run, module = self.run, self.run.module
        statistics = NewStatistics(module, buffers if apart else None)
        given = {name: tensor.detach().clone() for name, tensor in buffers.items()}  # steps write to them
        if self.drawn.random_state is not None:
            self.drawn.random_state()
        with torch.enable_grad(), run.around(self.drawn):
            batch = run.read(self.drawn.rows.tolist())
            with statistics, Reductions() if apart else nullcontext() as reductions:
                loss, after = call_with(module, {**parameters, **given}, self._followed, batch)
            shares = None
            if reductions is not None:
                shares = sample_shares(loss, reductions.calls, len(self.rows))
                if shares is None:
                    raise self._no_shares()
        return Evaluated(loss, shares, {**after, **statistics.found})

    def _followed(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        module = self.run.module

        def left() -> dict[str, Tensor]:
            return {name: tensor.clone() for name, tensor in module.named_buffers()}

        return followed_loss(module, batch, self.drawn.batch_idx, left)

    def _no_shares(self) -> AttributionError:
        return AttributionError(
            f"The loss that `training_step` of {type(self.run.module).__name__} returns in step "
            f"{self.drawn.global_step} cannot be split into terms of its {len(self.rows)} samples: no mean or sum over "
            "them leads to it. Compute one term a sample and reduce them by `.mean()` or `.sum()`, or by a loss "
            'function of torch.nn.functional with `reduction="mean"` or "sum".'
        )
