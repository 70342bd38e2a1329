"""A recorded run, ready to be gone through again: its beginning, its steps, and the snapshots on the way."""

from __future__ import annotations

from collections import Counter
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
from lightning_attr.journal import JournalBatch, JournalStep
from lightning_attr.objectives.modes import seeded
from lightning_attr.objectives.reductions import Reductions
from lightning_attr.randomness.streams import hashed_seed
from lightning_attr.replay.optimizer_forms import Clipping, GroupForm
from lightning_attr.replay.running_statistics import NewStatistics
from lightning_attr.replay.shares import sample_shares
from lightning_attr.replay.state import RunState
from lightning_attr.replay.steps import Evaluated, ReplayStep
from lightning_attr.user_code.calls import Surroundings
from lightning_attr.user_code.step_world import replayed
from lightning_attr.user_code.training_step import followed_loss


@dataclass(frozen=True)
class RecordedRun:
    """All that a replay needs.

    Args:
        module: the user's module; what it holds stays as it is.
        steps: of the run, from its first.
        optimizer: settings of its optimizer, as
            :func:`lightning_attr.parameters.optimizer_settings.optimizer_settings` gives them.
        snapshots: optimizer steps taken -> key of the snapshot there; 0 is the start.
        weights: reads parameters and buffers of a snapshot.
        read: reads the samples of a batch, as training did, onto the device.
        put_back: lets the random streams go on from where they were right before a training step.
        n_rows: of the data set.
        clipping: of the gradients.
        resting: names of the submodules that were in eval mode while the others were in train mode.
        world: of a step, by epoch and optimizer steps taken; None for that around.
        precision: the context that training steps ran in.
    """

    module: Any = field(repr=False)
    steps: Sequence[JournalStep] = field(repr=False)
    optimizer: Mapping[str, Any]
    snapshots: Mapping[int, str]
    weights: Callable[[str], Mapping[str, Tensor]]
    read: Callable[[JournalBatch], Any]
    put_back: Callable[[Mapping[str, Tensor]], object]
    n_rows: int
    clipping: Clipping | None = None
    resting: frozenset[str] = frozenset()
    world: Callable[[int, int], Surroundings] | None = None
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext

    def state_at(self, number: int) -> RunState:
        """Read parameters and buffers of the snapshot after so many steps; no optimizer has kept anything there."""
        weights = self.weights(self.snapshots[number])
        parts = dict(self.module.named_parameters()), dict(self.module.named_buffers())
        return RunState.begin(*({name: weights[name].to(own) for name, own in part.items()} for part in parts))

    @cached_property
    def replay_steps(self) -> list[ReplayStep]:
        """The steps, as functions."""
        most = Counter[int]()
        for step in self.steps:
            most[step.epoch] = max(most[step.epoch], len(step.batches))
        return [
            ReplayStep(
                step.global_step,
                [RecordedBatch(self, batch, step.global_step) for batch in step.batches],
                most[step.epoch],  # Lightning divides a last one that accumulates less by as many
                step_forms(step, self.optimizer),
                self.clipping,
            )
            for step in self.steps
        ]

    @contextmanager
    def around(self, epoch: int, global_step: int) -> Iterator[None]:
        """Surround a training step: its world, the modes of its layers, its precision."""
        world = nullcontext() if self.world is None else replayed(self.module, self.world(epoch, global_step))
        with world, training_modes(self.module, self.resting), self.precision(), plain_execution():
            yield


def step_forms(step: JournalStep, optimizer: Mapping[str, Any]) -> tuple[GroupForm, ...]:
    """Say how an optimizer of known settings updated its parameters in a step.

    Example:
        >>> from lightning_attr.journal import GroupStep
        >>> optimizer = {"kind": "SGD", "groups": [{"parameters": ["w"], "momentum": 0.9, "lr": 1.0}]}
        >>> (form,) = step_forms(JournalStep(0, 0, 0, (), (GroupStep(0.5, 0.0),)), optimizer)
        >>> form.lr, form.settings["momentum"]
        (0.5, 0.9)
    """
    if len(step.groups) != len(optimizer["groups"]):
        raise AttributionError(
            f"The optimizer began with {len(optimizer['groups'])} parameter group(s), but step {step.global_step} was "
            f"taken with {len(step.groups)}: parameters were added while the run went on (unfrozen, for instance), "
            "which a replay does not know of. Take a method on stored features, such as TRAK or TracIn."
        )
    return tuple(
        GroupForm(optimizer["kind"], tuple(group["parameters"]), own.lr, own.weight_decay, group)
        for group, own in zip(optimizer["groups"], step.groups, strict=True)
    )


def resting_layers(module: nn.Module) -> list[str]:
    """Name the submodules that are in eval mode when training begins.

    Example:
        >>> resting_layers(nn.Sequential(nn.Dropout(), nn.Dropout().eval()))
        ['1']
    """
    return [name for name, layer in module.named_modules() if not layer.training]


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
        batch: what the journal says of it.
        global_step: optimizer steps taken before it.
    """

    def __init__(self, run: RecordedRun, batch: JournalBatch, global_step: int) -> None:
        self.run = run
        self.batch = batch
        self.global_step = global_step

    @property
    def rows(self) -> Tensor:
        """Data set row of each sample."""
        return self.batch.rows

    def evaluate(self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], apart: bool) -> Evaluated:
        """Run the user's training step; see :class:`lightning_attr.replay.steps.MicroBatch`."""
        run, module, batch = self.run, self.run.module, self.batch
        statistics = NewStatistics(module, buffers if apart else None)
        given = {name: tensor.detach().clone() for name, tensor in buffers.items()}  # steps write to them
        samples = run.read(batch)  # outside of the step's precision, as loaders do
        with torch.enable_grad(), run.around(batch.epoch, self.global_step):
            if batch.random_state is not None:
                run.put_back(batch.random_state)
            unknown = hashed_seed("replay", self.global_step, batch.batch_idx)  # the same each time, at least
            streams = seeded(unknown if batch.random_state is None else None)
            with streams, statistics, Reductions() if apart else nullcontext() as reductions:
                loss, after = call_with(module, {**parameters, **given}, self._followed, samples)
            shares = None
            if reductions is not None:
                shares = sample_shares(loss, reductions.calls, len(self.rows))
                if shares is None:
                    raise self._no_shares()
        return Evaluated(loss, shares, {**after, **statistics.found})

    def _followed(self, samples: Any) -> tuple[Tensor, dict[str, Tensor]]:
        module = self.run.module

        def left() -> dict[str, Tensor]:
            return {name: tensor.clone() for name, tensor in module.named_buffers()}

        return followed_loss(module, samples, self.batch.batch_idx, left)

    def _no_shares(self) -> AttributionError:
        return AttributionError(
            f"The loss that `training_step` of {type(self.run.module).__name__} returns in step {self.global_step} "
            f"cannot be split into terms of its {len(self.rows)} samples: no mean or sum over them leads to it. "
            "Compute one term a sample and reduce them by `.mean()` or `.sum()`, or by a loss function of "
            'torch.nn.functional with `reduction="mean"` or "sum".'
        )
