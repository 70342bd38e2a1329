"""Whether a batch holds its samples as they are alone, by the batches themselves; the module does not run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning as L

from lightning_attr.batches.nested import batched_tensors, select_rows
from lightning_attr.batches.samples_apart import SamplesApart
from lightning_attr.data.loader import DataSource
from lightning_attr.data.lost_rows import dropped_rows, refuse_lost_rows, same_content
from lightning_attr.errors import AttributionError, BatchDependenceError, SampleReadError
from lightning_attr.features.transfer import own_hooks, placed, to_device
from lightning_attr.randomness.draws import Draw

RAISED = (AttributionError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)
"""What modules and collate functions raise of batches that are not what they expect."""


@dataclass
class RowBatches:
    """A source's way from rows to batches, tried on a few rows.

    Args:
        trainer: the trainer, for its precision and device.
        module: the user's module, in eval mode.
        datamodule: the user's datamodule, if any.
        source: the data, whose ``form`` is filled in.
        rows: some rows, the most unlike first.
    """

    trainer: L.Trainer
    module: L.LightningModule
    datamodule: L.LightningDataModule | None
    source: DataSource
    rows: list[int]
    _alone: list[Any] = field(default_factory=list)

    def batch(self, rows: Sequence[int]) -> Any:
        """Read, collate and move rows, as featurizing does."""
        device = self.trainer.strategy.root_device
        return placed(self._collated(rows), rows, self.module, self.datamodule, device, self.source)

    def _collated(self, rows: Sequence[int]) -> Any:
        source = self.source
        batch = next(source.iterated([rows]))[1] if source.form.iterates else source.collated(rows)
        return self.trainer.precision_plugin.convert_input(batch)

    def raw(self, rows: Sequence[int]) -> Any:
        """A batch as training has it, whatever its size."""
        device = self.trainer.strategy.root_device
        return to_device(self._collated(rows), self.module, self.datamodule, device, rows, self.source)

    def each(self) -> list[Any]:
        """Give the samples, each collated alone, once."""
        self._alone = self._alone or [self.raw([row]) for row in self.rows]
        return self._alone

    def draw(self, rows: Sequence[int]) -> Draw:
        """Give the random numbers of samples, as featurizing draws them."""
        return Draw(rows, device=self.trainer.strategy.root_device)

    def probed(self, count: int) -> tuple[Any, list[int]]:
        """Give the samples with which a module is checked."""
        rows = self.rows[:count]
        if self.source.form.apart:
            one_by_one = [self.batch([row]) for row in rows]
            return SamplesApart(part[0] for part in one_by_one), rows
        return self.batch(rows), rows

    def look(self) -> str | None:
        """Compare the batches themselves.

        Returns None if each sample is in its batch as it is alone, to the last bit; else what is not so.
        """
        source, rows, form = self.source, self.rows, self.source.form
        hooks = own_hooks(self.module, self.datamodule)
        if source.own_iteration:
            form.iterates = not same_content(source.collated(rows), next(source.iterated([rows]))[1])
        if form.apart or len(rows) == 1:
            return None
        try:
            whole, fewer = self.raw(rows), self.raw(rows[:-1])
        except RAISED as error:
            self.each()  # an error of its own says more
            cause = error.__cause__ if isinstance(error, SampleReadError) else error
            return f"they cannot be collated together ({type(cause).__name__}: {cause})"
        form.learn(whole, len(rows), fewer, len(rows) - 1)
        size = form.wrong_size(whole, len(rows))
        if size is not None:
            lost = hooks and batched_tensors(self._collated(rows), len(rows))
            if lost or dropped_rows(source, rows):
                refuse_lost_rows(source, rows, size, hooks)
            return "no tensor has one row a sample"
        if source.stacks and not hooks and not form.iterates:
            return None
        if hooks and not same_content(whole, self.raw(rows)):
            raise BatchDependenceError(
                f"The transfer hooks ({', '.join(hooks)}) give other values each time for the same samples: they draw "
                "random numbers. Attribution needs a sample to be one thing: let them do that in training alone, under "
                "`if self.trainer.training:`."
            )
        whole, reverse = form.marked(whole, len(rows)), range(len(rows))[::-1]
        parts = [(reverse, self.batch(rows[::-1])), *(([i], one) for i, one in enumerate(self.each()))]
        same = all(same_content(select_rows(whole, len(rows), part), batch) for part, batch in parts)
        return None if same else "a sample lies in it in another way than alone"
