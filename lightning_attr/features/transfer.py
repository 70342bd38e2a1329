"""Batches on their way to the device, through the hooks of training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import lightning as L
import torch

from lightning_attr.batches.samples_apart import SamplesApart
from lightning_attr.data.loader import DataSource, OrderedLoader
from lightning_attr.data.lost_rows import refuse_lost_rows
from lightning_attr.data.sample_errors import refuse_samples
from lightning_attr.errors import AttributionError
from lightning_attr.objectives.objective import set_up
from lightning_attr.randomness.draws import Samples
from lightning_attr.user_code.calls import user_call
from lightning_attr.user_code.lightning_names import overrides


def to_device(
    batch: Any,
    module: L.LightningModule,
    datamodule: L.LightningDataModule | None,
    device: torch.device,
    rows: Sequence[int] = (),
    source: DataSource | None = None,
) -> Any:
    """Move a batch to the device through the transfer hooks of the user's datamodule or module, as training does.

    Returns the batch on the device.
    """

    def owner(hook: str) -> Any:
        return datamodule if datamodule is not None and overrides(hook, datamodule) else module

    try:
        with user_call(module, "the transfer hooks"):  # a batch comes here once
            batch = owner("on_before_batch_transfer").on_before_batch_transfer(batch, 0)
            batch = owner("transfer_batch_to_device").transfer_batch_to_device(batch, device, 0)
            return owner("on_after_batch_transfer").on_after_batch_transfer(batch, 0)
    except Exception as error:
        if source is None or isinstance(error, AttributionError):
            raise
        what = ", ".join(own_hooks(module, datamodule)) or "The transfer to the device"
        refuse_samples(source.dataset, rows, error, what)


def placed(
    batch: Any,
    rows: Sequence[int],
    module: L.LightningModule,
    datamodule: L.LightningDataModule | None,
    device: torch.device,
    source: DataSource,
) -> Any:
    """Move a batch of a source to the device, and see that it holds the rows that were asked for.

    Returns the batch on the device; samples that are apart stay so, and what samples share is marked.
    """
    if isinstance(batch, SamplesApart):
        return SamplesApart(
            to_device(one, module, datamodule, device, [row], source) for one, row in zip(batch, rows, strict=True)
        )
    moved = to_device(batch, module, datamodule, device, rows, source)
    size = source.form.wrong_size(moved, len(rows))
    if size is not None:
        refuse_lost_rows(source, list(rows), size, own_hooks(module, datamodule))
    return source.form.marked(moved, len(rows))


def own_hooks(module: L.LightningModule, datamodule: L.LightningDataModule | None) -> list[str]:
    """Name the transfer hooks that the user wrote.

    Returns such as "`on_after_batch_transfer` of Net".

    Example:
        >>> own_hooks(L.LightningModule(), None)
        []
    """
    names = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
    found = []
    for name in names:
        if datamodule is not None and overrides(name, datamodule):
            found.append(f"`{name}` of {type(datamodule).__name__}")
        elif overrides(name, module):
            found.append(f"`{name}` of {type(module).__name__}")
    return found


def samples_on_device(
    trainer: L.Trainer, module: L.LightningModule, datamodule: L.LightningDataModule | None, source: DataSource
) -> Samples:
    """Give samples as training sees them, batch after batch.

    Returns the samples, in the order of the data set.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> source = DataSource.of(DataLoader([3.0, 4.0, 5.0], batch_size=2), "training")
        >>> trainer = L.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu")
        >>> samples = samples_on_device(trainer, L.LightningModule(), None, source)
        >>> [(rows, batch.tolist()) for rows, batch in samples.batches([2])]
        [([2], [5.0])]
    """
    device, precision = trainer.strategy.root_device, trainer.precision_plugin

    def read(rows: Sequence[int]) -> Iterator[tuple[Sequence[int], Any]]:
        for numbers, batch in OrderedLoader(source, source.batches(rows)):
            yield numbers, placed(precision.convert_input(batch), numbers, module, datamodule, device, source)

    return Samples(len(source), read)


def set_up_at(
    snapshot: str,
    trainer: L.Trainer,
    module: L.LightningModule,
    datamodule: L.LightningDataModule | None,
    source: DataSource,
) -> None:
    """Let the module compute what it needs of the training samples at a snapshot, in the trainer's precision."""
    samples = samples_on_device(trainer, module, datamodule, source)
    with trainer.precision_plugin.forward_context():
        set_up(module, Samples(len(source), lambda rows: _one_by_one(samples.batches(rows))), snapshot)


def _one_by_one(batches: Iterator[tuple[Sequence[int], Any]]) -> Iterator[tuple[Sequence[int], Any]]:
    """Give the user's code batches as its loader makes them: one a sample where samples are apart."""
    for rows, batch in batches:
        if isinstance(batch, SamplesApart):
            yield from (([row], one) for row, one in zip(rows, batch, strict=True))
        else:
            yield rows, batch
