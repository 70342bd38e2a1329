"""Values each sample while it is trained on, by what a step on it does for validation data."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]  # re-exported
from torch import Tensor
from typing_extensions import override

from lightning_attr.arguments.checks import check_flag, check_int, check_path
from lightning_attr.callbacks.attribution import AttributionCallback
from lightning_attr.callbacks.guard import Guard, describe
from lightning_attr.callbacks.validation_gradient import ValidationGradient
from lightning_attr.errors import AttributionError
from lightning_attr.files.io import read_tensors, write_tensors
from lightning_attr.user_code.lightning_names import AnyCallback

_FILE = "in_run_value.safetensors"


class InRunDataValue(AnyCallback):
    r"""In-run data value (Wang et al., 2024): how far steps on a sample lowered the validation loss, to first order.

    .. math::
        v_i = \sum_{t:\, i \in B_t} \nabla\ell_{val}(\theta_t)^\top H_t \nabla\ell_i(\theta_t),

    over the steps looked at, with the learning rate of each parameter in the diagonal of ``H_t``, and the mean loss of
    the validation samples. Positive values help. It is TracIn at the very weights and learning rates of the steps, with
    targets fixed beforehand. Divided by the batch size, the values of a batch add up to the first-order fall of the
    mean validation loss by that step of plain SGD.

    Every ``every`` steps it goes through the validation samples once and through the batch at hand once more; the
    training is bit-identical to one without. Samples are taken in the module's mode of attribution: dropout, and other
    things that are random in the training step, are left out. Which samples a batch holds says the journal of
    :class:`AttributionCallback`, which stands before this callback in the list.

    Args:
        val_dataloaders: a loader of validation samples; by default the Trainer's.
        every: looks at each step whose number is a multiple of it, the first included.
        samples: of the validation data, the first so many; None for all.
        log: log the mean, the smallest and the share of negative values of each batch looked at.

    Raises:
        ValueError: if an argument is out of range; in ``fit`` before the first step, if there is no
            :class:`AttributionCallback` before it, or no validation data.
        AttributionError: in ``fit`` before the first step, if samples cannot be taken from a batch, or the module is
            random in its mode.

    Attributes:
        values: ``(n_train,)``, float64, in units of the validation loss; 0 for samples in no batch looked at.
        counts: ``(n_train,)``, int64: in how many batches looked at each sample was.
        stopped: why it ended before the training did; None if it did not.

    Example:
        >>> callbacks = [AttributionCallback("attribution"), InRunDataValue(every=20)]
    """

    def __init__(
        self, val_dataloaders: Any = None, every: int = 10, samples: int | None = None, log: bool = True
    ) -> None:
        super().__init__()
        self.val_dataloaders = val_dataloaders
        self.every = check_int(self, "every", every, minimum=1)
        self.samples = None if samples is None else check_int(self, "samples", samples, minimum=1, also="None")
        self.log = check_flag(self, "log", log)
        self.values, self.counts = torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
        self.stopped: str | None = None
        self._guard = Guard("warn")
        self._validation: ValidationGradient | None = None
        self._at = -1  # the step looked at last: all of its micro-batches are
        self._recorder: AttributionCallback | None = None

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the callback that knows which samples a batch holds."""
        if stage != "fit":
            return
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning's connectors
        before = callbacks[: callbacks.index(self)]
        self._recorder = next((one for one in before if isinstance(one, AttributionCallback)), None)
        if self._recorder is None:
            raise ValueError(
                "Expected an AttributionCallback before InRunDataValue among the Trainer's callbacks, because its "
                "journal says which samples a batch holds, but found none. Use "
                "callbacks=[AttributionCallback(), InRunDataValue()]."
            )

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the validation data, and go the whole way with a few samples: fail now rather than after an hour."""
        assert self._recorder is not None  # set in `setup`
        self.stopped, self._at, recorder = None, -1, self._recorder
        make = partial(ValidationGradient, trainer, pl_module, recorder.source, self.val_dataloaders, self.samples)
        validation = self._guard.together(partial(make, recorder.mode))
        self._validation = None if trainer.fast_dev_run else validation  # type: ignore[attr-defined]  # by a connector
        if trainer.global_step == 0 or len(self.values) != len(recorder.source):
            self.values = torch.zeros(len(recorder.source), dtype=torch.float64)
            self.counts = torch.zeros(len(recorder.source), dtype=torch.int64)

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Look at the batch, if it is one of those."""
        step = trainer.global_step
        if self.stopped is None and self._validation is not None and step % self.every == 0:
            with self._guard.training(self._stand_down):
                own, counts = self._guard.together(partial(self._look, trainer, pl_module, batch))
                self._add(trainer, own, counts)
                self._at = step

    def _look(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> tuple[Tensor, Tensor]:
        """Value the batch of this process, ``(n_train,)``, and count its samples."""
        assert self._validation is not None
        assert self._recorder is not None
        rows = self._recorder.batch_rows
        if rows is None:
            raise AttributionError(
                "It is not known which samples the batches of training hold: AttributionCallback(journal=False) keeps "
                "no journal, or the journal of its store says why (`callback.store.journal().unknown`)."
            )
        values = self._validation.products(batch, rows, fresh=self._at != trainer.global_step).double().cpu()
        own, counts = torch.zeros_like(self.values), torch.zeros_like(self.counts)
        index = torch.tensor(rows, dtype=torch.int64)
        return own.index_add_(0, index, values), counts.index_add_(0, index, torch.ones_like(index))

    def _add(self, trainer: L.Trainer, own: Tensor, counts: Tensor) -> None:
        """Add up over processes, and tell."""
        if trainer.world_size > 1:
            device = trainer.strategy.root_device
            own, counts = (trainer.strategy.reduce(part.to(device), reduce_op="sum").cpu() for part in (own, counts))
        self.values += own
        self.counts += counts
        if self.log and trainer.is_global_zero:
            with self._guard.training(_logging_failed):
                for logger in trainer.loggers:
                    logger.log_metrics(_statistics(own[counts > 0]), step=trainer.global_step)

    def _stand_down(self, error: Exception) -> None:
        self.stopped = describe(error)
        rank_zero_warn(f"InRunDataValue: {self.stopped} Training goes on; values are those of the steps before.")

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the values beside what the run recorded."""
        recorder, validation, self._validation = self._recorder, self._validation, None
        if recorder is None or recorder.stopped is not None or recorder.store_path is None:
            return
        if trainer.is_global_zero and validation is not None:
            with self._guard.training(self._stand_down):
                self.save(recorder.store_path)

    def save(self, path: str | Path) -> None:
        """Write the values into a directory, such as that of the store.

        Args:
            path: the directory; made if it is not there.
        """
        place = check_path("InRunDataValue.save", "path", path)
        write_tensors(place / _FILE, {"values": self.values, "counts": self.counts}, {"kind": "in-run value"})

    @staticmethod
    def load(path: str | Path) -> tuple[Tensor, Tensor]:
        """Read what :meth:`save` wrote, or the end of a training did.

        Args:
            path: the directory: that of the run's store, or the one given to :meth:`save`.

        Returns:
            ``values`` and ``counts``, as the attributes.

        Raises:
            CorruptedStoreError: if the file is missing or damaged.
        """
        place = check_path("InRunDataValue.load", "path", path)
        found = read_tensors(place / _FILE, remedy="Train again to make it anew.", place={"kind": "in-run value"})
        return found["values"], found["counts"]

    @override
    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the values so far."""
        return {"values": self.values, "counts": self.counts}

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where the checkpoint was written."""
        self.values, self.counts = state_dict["values"], state_dict["counts"]


def _statistics(values: Tensor) -> dict[str, float]:
    """Of the values of one batch, ``(b,)``."""
    return {
        "in_run/mean": float(values.mean()),
        "in_run/least": float(values.min()),
        "in_run/share_negative": float((values < 0).double().mean()),
    }


def _logging_failed(error: Exception) -> None:
    rank_zero_warn(f"InRunDataValue: the values of a step could not be logged: {describe(error)}")
