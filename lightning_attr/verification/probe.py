"""The first look at a module and its data: a few samples go the whole way before anything is featurized."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch

from lightning_attr.data.loader import DataSource
from lightning_attr.errors import named_samples
from lightning_attr.features.failing_samples import named_failures
from lightning_attr.features.featurizer import PROBE_SIZE, AttributionPlan, plan
from lightning_attr.features.transfer import set_up_at
from lightning_attr.verification.probe_rows import probe_rows
from lightning_attr.verification.repeated_reads import check_repeated_reads
from lightning_attr.verification.row_checks import RowCheck


def probe(
    trainer: L.Trainer,
    module: L.LightningModule,
    datamodule: L.LightningDataModule | None,
    source: DataSource,
    mode: str | None = None,
) -> tuple[AttributionPlan, Any, list[int]]:
    """Check the module on samples across the data set, in the trainer's precision and on its device.

    Returns the gradient path of each parameter, and the samples as a batch with their rows.
    """
    check = look_at(trainer, module, datamodule, source, source)
    batch, rows = check.probed(PROBE_SIZE)
    precision, device = trainer.precision_plugin, trainer.strategy.root_device
    # The comparisons want all digits: the default dtype of the precision, but no autocast.
    with (
        precision.forward_context(),
        torch.autocast(device.type, enabled=False),
        named_samples(rows),
        named_failures(module, rows, check.run_alone),
    ):
        return plan(module, batch, len(rows), mode), batch, rows


def look_at(
    trainer: L.Trainer,
    module: L.LightningModule,
    datamodule: L.LightningDataModule | None,
    source: DataSource,
    train: DataSource | None = None,
) -> RowCheck:
    """Find how samples lie in the batches of a source, and refuse batches that do not hold them.

    Returns the check, with the samples that it was made on.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> source = DataSource.of(DataLoader([3.0, 4.0, 5.0]), "target")
        >>> trainer = L.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu")
        >>> look_at(trainer, L.LightningModule(), None, source).rows
        [0, 2, 1]
    """
    check = RowCheck(trainer, module, datamodule, source, probe_rows(source))
    check_repeated_reads(source, check.rows)
    difference = check.look()
    if train is not None:
        set_up_at("", trainer, module, datamodule, train)
    if difference is not None:
        precision, device = trainer.precision_plugin, trainer.strategy.root_device
        with (
            precision.forward_context(),
            torch.autocast(device.type, enabled=False),
            named_samples(check.rows),
            named_failures(module, check.rows, check.run_alone),
        ):
            check.settle(difference)
    return check
