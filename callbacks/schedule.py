"""At the end of which epochs a snapshot is taken."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import lightning as L

from lightning_attr.arguments import check_choice, check_int

__all__ = ["SnapshotSchedule", "epoch_limit"]


class SnapshotSchedule:
    """Epochs with a snapshot; the last epoch of a run has one in any case.

    Args:
        snapshots: "geometric" for the epochs 0, 1, 2, 4, 8, ...; "start+geometric" for the weights that training starts
            from as well; "all"; an integer ``n`` for every ``n``-th epoch, the first included; or a list of epoch
            indices, counted from 0, with -1 for the start.

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
        if isinstance(snapshots, Sequence) and not isinstance(snapshots, str):
            places = [f"snapshots[{place}]" for place in range(len(snapshots))]
            self.snapshots = frozenset(
                check_int(_OWNER, place, epoch, minimum=-1) for place, epoch in zip(places, snapshots, strict=True)
            )
        elif isinstance(snapshots, numbers.Integral) and not isinstance(snapshots, bool):
            self.snapshots = check_int(_OWNER, "snapshots", snapshots, minimum=1)
        else:
            check_choice(_OWNER, "snapshots", snapshots, ("geometric", "start+geometric", "all"), _OTHERS)
            self.snapshots = snapshots

    def due(self, epoch: int) -> bool:
        """Whether an epoch has a snapshot, be it the last or not.

        Args:
            epoch: its index, from 0; -1 for the weights that training starts from.

        Returns:
            True if it has.
        """
        if epoch < 0:
            return self.snapshots == "start+geometric" or (
                isinstance(self.snapshots, frozenset) and -1 in self.snapshots
            )
        if self.snapshots in {"geometric", "start+geometric"}:
            return epoch & (epoch - 1) == 0
        if self.snapshots == "all":
            return True
        if isinstance(self.snapshots, int):
            return epoch % self.snapshots == 0
        return isinstance(self.snapshots, frozenset) and epoch in self.snapshots

    def count(self, epochs: int) -> int:
        """Count the snapshots of a run.

        Args:
            epochs: how many it has.

        Returns:
            Snapshots, that of the last epoch included.
        """
        return self.due(-1) + sum(self.due(epoch) or epoch == epochs - 1 for epoch in range(epochs))


def epoch_limit(trainer: L.Trainer) -> int:
    """Find how many epochs a run has at most.

    Args:
        trainer: in its fit.

    Returns:
        Epochs, a last one cut short by ``max_steps`` included; 0 if there is no limit.

    Example:
        >>> epoch_limit(L.Trainer(max_epochs=3, logger=False, barebones=True))
        3
    """
    limits = [] if trainer.max_epochs in {None, -1} else [int(trainer.max_epochs or 0)]
    if trainer.max_steps != -1:
        batches = trainer.max_steps * trainer.accumulate_grad_batches
        limits.append(math.ceil(batches / trainer.num_training_batches))
    return min(limits, default=0)


_OWNER = "AttributionCallback"
_OTHERS = "an integer n >= 1 for every n epochs, or a list of epoch indices >= 0 and -1 for the start"
