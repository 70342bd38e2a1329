"""At the end of which epochs, and after which steps of the first, a snapshot is taken."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import lightning as L

from lightning_attr.arguments.checks import check_choice, check_int


class SnapshotSchedule:
    """Epochs with a snapshot; the last epoch of a run has one in any case.

    Args:
        snapshots: "geometric" for the epochs 0, 1, 2, 4, 8, ...; "start+geometric" for the weights that training starts
            from as well; "early+geometric" for the optimizer steps 4, 8, 16, ... of the first epoch, too; "all"; an
            integer ``n`` for every ``n``-th epoch, the first included; or a list of epoch indices, counted from 0, with
            -1 for the start.

    Raises:
        ValueError: if it is none of these.

    Example:
        >>> schedule = SnapshotSchedule("geometric")
        >>> [epoch for epoch in range(20) if schedule.due(epoch)]
        [0, 1, 2, 4, 8, 16]
        >>> schedule.count(20), SnapshotSchedule(5).count(20), SnapshotSchedule([-1, 3]).count(4)
        (7, 5, 2)
    """

    def __init__(self, snapshots: str | int | Sequence[int] = "geometric") -> None:
        self.snapshots: str | int | frozenset[int]
        if isinstance(snapshots, Sequence) and not isinstance(snapshots, (str, bytes)):
            places = [f"snapshots[{place}]" for place in range(len(snapshots))]
            self.snapshots = frozenset(
                check_int(_OWNER, place, epoch, minimum=-1) for place, epoch in zip(places, snapshots, strict=True)
            )
        elif isinstance(snapshots, numbers.Integral) and not isinstance(snapshots, bool):
            self.snapshots = check_int(_OWNER, "snapshots", snapshots, minimum=1)
        else:
            check_choice(_OWNER, "snapshots", snapshots, _NAMES, _OTHERS)
            assert isinstance(snapshots, str)  # one of the names
            self.snapshots = snapshots

    def due(self, epoch: int) -> bool:
        """Whether an epoch has a snapshot, be it the last or not.

        Returns True if it has.
        """
        if epoch < 0:
            return self.snapshots in {"start+geometric", "early+geometric"} or (
                isinstance(self.snapshots, frozenset) and -1 in self.snapshots
            )
        if self.snapshots in {"geometric", "start+geometric", "early+geometric"}:
            return epoch & (epoch - 1) == 0
        if self.snapshots == "all":
            return True
        if isinstance(self.snapshots, int):
            return epoch % self.snapshots == 0
        return isinstance(self.snapshots, frozenset) and epoch in self.snapshots

    def due_between(self, before: int, step: int) -> bool:
        """Whether a step of the first epoch has a snapshot.

        Returns True if a power of two from 4 on lies in between.

        Example:
            >>> schedule = SnapshotSchedule("early+geometric")
            >>> [step for step in range(1, 20) if schedule.due_between(step - 1, step)]
            [4, 8, 16]
        """
        early = self.snapshots == "early+geometric" and step >= _FIRST_STEP
        return early and max(before, _FIRST_STEP - 1).bit_length() < step.bit_length()

    def count(self, epochs: int, steps: int = 0) -> int:
        """Count the snapshots of a run.

        Returns snapshots, that of the last epoch included.
        """
        early = sum(self.due_between(step - 1, step) for step in range(1, steps))
        return self.due(-1) + early + sum(self.due(epoch) or epoch == epochs - 1 for epoch in range(epochs))


def steps_of_an_epoch(trainer: L.Trainer) -> int:
    """Find how many optimizer steps an epoch has.

    Returns steps of one optimizer; 0 where nobody knows.

    Example:
        >>> trainer = L.Trainer(logger=False, barebones=True)
        >>> trainer.fit_loop.max_batches = 7
        >>> steps_of_an_epoch(trainer)
        7
    """
    batches = trainer.num_training_batches
    return 0 if math.isinf(batches) else math.ceil(batches / trainer.accumulate_grad_batches)


def epoch_limit(trainer: L.Trainer) -> int:
    """Find how many epochs a run has at most.

    Returns epochs, a last one cut short by ``max_steps`` included; 0 if there is no limit.
    """
    limits = [] if trainer.max_epochs in {None, -1} else [int(trainer.max_epochs or 0)]
    if trainer.max_steps != -1:
        batches = trainer.max_steps * trainer.accumulate_grad_batches
        limits.append(math.ceil(batches / trainer.num_training_batches))
    return min(limits, default=0)


_OWNER = "AttributionCallback"
_NAMES = ("geometric", "start+geometric", "early+geometric", "all")
_FIRST_STEP = 4
_OTHERS = "an integer n >= 1 for every n epochs, or a list of epoch indices >= 0 and -1 for the start"
