"""Hands on to the journal of a run what Lightning says of batches and steps."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_attr.callbacks.checking import CheckedRun
from lightning_attr.callbacks.journalling import RunJournal


class JournalledRun(CheckedRun):
    """Keeps a journal, unless it is told not to.

    Args:
        on_error: as in :class:`lightning_attr.callbacks.run_hooks.RunHooks`.
        dirpath: likewise.
        log: likewise.
        journal: whether to keep one.
    """

    def __init__(self, on_error: str, dirpath: Path | None, log: bool, journal: bool) -> None:
        super().__init__(on_error, dirpath, log)
        self._journal = RunJournal(self._run.guard) if journal else None

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Hear of the training loader before its workers begin to draw."""
        if stage == "fit" and self._journal is not None:
            self._journal.listen(trainer)

    @property
    def batch_rows(self) -> list[int] | None:
        """Rows of the batch that is trained on now, from its ``on_train_batch_start`` on; None where nobody knows."""
        return None if self._journal is None else self._journal.batch_rows

    def _open_journal(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._journal is not None:
            guard, run = self._run.guard, self._run
            guard.together(partial(self._journal.make_room, trainer, run.store))
            guard.together(partial(self._journal.begin, trainer, pl_module, run.store, run.found.source))

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop listening for loaders: those of this fit are known."""
        if self._journal is not None:
            self._journal.let_go()

    @override
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen to what this epoch draws."""
        if self._journal is not None:
            self._journal.epoch_start(trainer)

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Find the rows of the batch."""
        if self._journal is not None:
            self._journal.batch_start(trainer, pl_module, batch, batch_idx)

    @override
    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Note that the batch leads to a gradient."""
        if self._journal is not None:
            self._journal.trained()

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Integrate the learning rates, and note the step."""
        self._run.step(trainer, pl_module, optimizer)
        if self._journal is not None:
            self._journal.step(trainer, pl_module, optimizer)

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any) -> None:
        """Write what is due."""
        if self._journal is not None:
            self._journal.batch_end(pl_module)

    def _flush_journal(self) -> None:
        if self._journal is not None:
            self._journal.flush()

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Write what is known, and let others write the store."""
        self._flush_journal()
        self._end_journal()
        super().on_exception(trainer, pl_module, exception)

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let others write the store."""
        if stage == "fit":
            self._end_journal()
        super().teardown(trainer, pl_module, stage)

    def _end_journal(self) -> None:
        if self._journal is not None:
            self._journal.end()

    @override
    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps; the journal up to here is on disk when it is written."""
        self._flush_journal()
        return super().state_dict()
