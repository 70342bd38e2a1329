"""What a journal says of an optimizer step, and of the batches that it was taken on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class GroupStep:
    """What the optimizer did to one of its parameter groups.

    Args:
        lr: learning rate of the step.
        weight_decay: factor of its weight decay; 0 where the optimizer has none.
    """

    lr: float
    weight_decay: float


@dataclass(frozen=True)
class JournalBatch:
    """A batch that was trained on: one micro-batch, where gradients are accumulated.

    Args:
        rows: ``(batch,)``, int64, in the order of the batch: sample ``i`` of it is ``dataset[rows[i]]``. Empty where
            the order is not known.
        rank: of the process that trained on it.
        epoch: index of the epoch.
        batch_idx: as ``training_step`` got it.
        random_state: stream ("torch", "numpy", "python", "cuda") -> its state at ``on_train_batch_start``, uint8, as
            :func:`lightning_attr.user_code.random_states.put_back` takes it; those of numpy and Python only where they
            were seen to move from batch to batch. None where it was not kept.
        reading_state: likewise, right before the samples were read; None with workers, or where it was not kept.
    """

    rows: Tensor
    rank: int
    epoch: int
    batch_idx: int
    random_state: Mapping[str, Tensor] | None = None
    reading_state: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class JournalStep:
    """An optimizer step.

    Args:
        epoch: index of the epoch.
        global_step: steps taken before it, in Lightning's counting.
        optimizer: its index among the trainer's optimizers.
        batches: what its gradient comes from, in the order of training; of several processes, those of the first
            process before those of the second.
        groups: of each parameter group.
        clip_factor: what clipping multiplied the gradient with, 1.0 without; None where it is not known.
        loss_scale: that a scaler for half precision used, 1.0 without.
    """

    epoch: int
    global_step: int
    optimizer: int
    batches: tuple[JournalBatch, ...]
    groups: tuple[GroupStep, ...]
    clip_factor: float | None = 1.0
    loss_scale: float = 1.0

    @property
    def rows(self) -> tuple[Tensor, ...]:
        """Rows of each batch."""
        return tuple(batch.rows for batch in self.batches)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Process of each batch."""
        return tuple(batch.rank for batch in self.batches)
