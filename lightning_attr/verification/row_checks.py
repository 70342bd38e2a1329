"""Whether a batch holds its samples, each in its place: some are collated together, alone and in another order."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_attr.batches.nested import select_rows
from lightning_attr.data.lost_rows import same_content
from lightning_attr.errors import BatchDependenceError
from lightning_attr.gradients.plain_execution import plain_execution
from lightning_attr.objectives.objective import completed, has_mixin, sample_values
from lightning_attr.objectives.remedies import describe_batch, mixin_lines
from lightning_attr.user_code.training_step import training_loss
from lightning_attr.verification.row_batches import RAISED, RowBatches

log = logging.getLogger(__name__)


@dataclass
class RowCheck(RowBatches):
    """Settles whether samples are taken from batches, where these differ, by what the module makes of them."""

    def settle(self, difference: str) -> None:
        """Compare what the module gives for samples in a batch and alone; take them apart where only that is right."""
        with torch.enable_grad(), plain_execution():  # a step may differentiate inside
            alone = torch.cat([self._value(one, row) for row, one in zip(self.rows, self.each(), strict=True)])
            together = self._together()
            if together is not None and _agree(together, alone):
                return  # padded, for instance, and the module does not mind
            if not self._drawn_alone():
                self._check_sum(together, alone, difference)
        self.source.form.apart, self.source.form.rows = True, None
        log.warning(
            "%s: samples cannot be taken from a batch of the %s DataLoader, %s: %s. Each is collated and run on its "
            "own by %s, which takes up to %d times as long.",
            type(self.module).__name__,
            self.source.role,
            describe_batch(self.each()[0]),
            difference,
            self.source.description,
            self.source.batch_size,
        )

    def run_alone(self, position: int) -> None:
        """Run a sample that is collated alone, to see whether it goes through."""
        one = completed(self.module, self.each()[position], self.draw([self.rows[position]]))
        with torch.enable_grad(), plain_execution():
            sample_values(self.module, one, 1)

    def _value(self, one: Any, row: int) -> Tensor:
        """The output of a sample that is collated alone, ``(1,)``."""
        value = sample_values(self.module, completed(self.module, one, self.draw([row])), 1).detach()
        if value.shape != (1,):
            raise BatchDependenceError(
                f"{type(self.module).__name__} gives outputs of shape {tuple(value.shape)} for one sample that is "
                f"collated on its own, dataset[{row}], where one value is expected, of shape (1,). {self._lines()}"
            )
        return value

    def _together(self) -> Tensor | None:
        """The outputs of the samples in one batch, and again in the other order; None if they cannot be had."""
        count = len(self.rows)
        try:
            found = []
            for rows in (self.rows, self.rows[::-1]):
                batch = completed(self.module, self.batch(rows), self.draw(rows))
                found.append(sample_values(self.module, batch, count).detach())
                halves = [range(count // 2), range(count // 2, count)]
                parts = [sample_values(self.module, select_rows(batch, count, part), len(part)) for part in halves]
                if not _agree(torch.cat(parts).detach(), found[-1]):
                    return None
        except RAISED as error:
            log.info("Samples cannot be taken from a batch: %s: %s", type(error).__name__, error)
            return None
        usable = all(values.shape == (count,) for values in found) and _agree(found[0], found[1].flip(0))
        return found[0] if usable else None

    def _check_sum(self, together: Tensor | None, alone: Tensor, difference: str) -> None:
        """Refuse batches that are not made of their samples, in any order."""
        count = len(self.rows)
        parts = [range(count), range(min(3, count)), range(min(3, count), count)]
        if "cannot be collated together" in difference:
            return
        if has_mixin(self.module):
            whole = self._whole_outputs()
            if whole is not None and not _agree(whole.sort().values, alone.sort().values):
                raise self._mixed(f"outputs {_shown(whole)} together, {_shown(alone)} one by one")
            return
        losses = [
            training_loss(self.module, self.raw([self.rows[i] for i in part])).detach() for part in parts if len(part)
        ]
        own = [-alone[list(part)] for part in parts if len(part)]
        for reduced in ("mean", "sum"):
            expected = [getattr(values, reduced)() for values in own]
            if all(_agree(loss, value) for loss, value in zip(losses, expected, strict=True)):
                return
        shown = f"losses {_shown(own[0])} one by one (mean {own[0].mean():.6g}, sum {own[0].sum():.6g})"
        raise self._mixed(f"{shown}, but the loss {losses[0]:.6g} together")

    def _whole_outputs(self) -> Tensor | None:
        try:
            batch = completed(self.module, self.raw(self.rows), self.draw(self.rows))
            found = sample_values(self.module, batch, len(self.rows)).detach()
        except RAISED:
            return None
        return found if found.shape == (len(self.rows),) else None

    def _drawn_alone(self) -> bool:
        """Whether the collate function draws random numbers for a sample that is alone, as in masking."""
        row = self.rows[0]
        return not same_content(self.each()[0], self.source.collated([row], stream="another"))

    def _mixed(self, found: str) -> BatchDependenceError:
        name, count = type(self.module).__name__, len(self.rows)
        return BatchDependenceError(
            f"Batches are not made of their samples: {self.source.description} and `training_step` of {name} give "
            f"{count} samples the {found}. Such are samples that are mixed (mixup, cutmix), padding that a module does "
            "not mask, and means over all nodes, tokens or labels of a batch. Mix in training alone "
            f"(`if self.training:` in `training_step`), mask the padding, or average over samples. {self._lines()}"
        )

    def _lines(self) -> str:
        return mixin_lines(self.module, self.each()[0])


def _agree(found: Tensor, expected: Tensor) -> bool:
    """Whether values are the same but for rounding, which padding and the size of a batch change."""
    share = 1e-4 if found.dtype.itemsize >= 4 and found.device.type == "cpu" else 2.0**-7
    return bool(((found - expected).abs() <= share * (1e-2 + expected.abs().max())).all())


def _shown(values: Tensor) -> str:
    text = ", ".join(f"{value:.6g}" for value in values[:4].tolist())
    return text + (", ..." if len(values) > 4 else "")
