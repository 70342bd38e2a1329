"""Batches on their way to the device, through the hooks of training, and a first look at a few samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import lightning as L
import torch

from lightning_attr.attributed import set_up
from lightning_attr.draws import Samples
from lightning_attr.errors import named_samples
from lightning_attr.featurizer import PROBE_SIZE, AttributionPlan, plan
from lightning_attr.loader import DataSource, OrderedLoader
from lightning_attr.worlds import overrides

__all__ = ["probe", "samples_on_device", "set_up_at", "to_device"]


def to_device(
    batch: Any,
    module: L.LightningModule,
    datamodule: L.LightningDataModule | None,
    device: torch.device,
) -> Any:
    """Move a batch to the device through the transfer hooks of the user's datamodule or module, as training does.

    Args:
        batch: what the loader yields.
        module: the user's module.
        datamodule: the user's datamodule, if any; a hook that it overrides wins.
        device: where to.

    Returns:
        The batch on the device.

    Example:
        >>> to_device((torch.ones(1),), L.LightningModule(), None, torch.device("cpu"))
        (tensor([1.]),)
    """

    def owner(hook: str) -> Any:
        return datamodule if datamodule is not None and overrides(hook, datamodule) else module

    batch = owner("on_before_batch_transfer").on_before_batch_transfer(batch, 0)
    batch = owner("transfer_batch_to_device").transfer_batch_to_device(batch, device, 0)
    return owner("on_after_batch_transfer").on_after_batch_transfer(batch, 0)


def samples_on_device(
    trainer: L.Trainer, module: L.LightningModule, datamodule: L.LightningDataModule | None, source: DataSource
) -> Samples:
    """Give samples as training sees them, batch after batch.

    Args:
        trainer: the trainer, for its precision and device.
        module: the user's module.
        datamodule: the user's datamodule, if any.
        source: the data.

    Returns:
        The samples, in the order of the data set.

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
            yield numbers, to_device(precision.convert_input(batch), module, datamodule, device)

    return Samples(len(source), read)


def set_up_at(
    snapshot: str,
    trainer: L.Trainer,
    module: L.LightningModule,
    datamodule: L.LightningDataModule | None,
    source: DataSource,
) -> None:
    """Let the module compute what it needs of the training samples at a snapshot, in the trainer's precision.

    Args:
        snapshot: key of the snapshot, at whose weights the module is.
        trainer: the trainer.
        module: the user's module, in eval mode.
        datamodule: the user's datamodule, if any.
        source: the training data.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> source = DataSource.of(DataLoader([3.0]), "training")
        >>> trainer = L.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu")
        >>> set_up_at("final", trainer, L.LightningModule(), None, source)
    """
    with trainer.precision_plugin.forward_context():
        set_up(module, samples_on_device(trainer, module, datamodule, source), snapshot)


def probe(
    trainer: L.Trainer,
    module: L.LightningModule,
    datamodule: L.LightningDataModule | None,
    source: DataSource,
    mode: str | None = None,
) -> tuple[AttributionPlan, Any, list[int]]:
    """Check the module on the first samples, in the trainer's precision and on its device.

    Args:
        trainer: the trainer.
        module: the user's module, in eval mode; it is put into that of the plan.
        datamodule: the user's datamodule, if any.
        source: the training data.
        mode: "eval" or "train"; by default as :func:`lightning_attr.featurizer.plan` chooses.

    Returns:
        The gradient path of each parameter, and the samples as a batch with their rows.

    Example:
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from lightning_attr import AttributionMixin
        >>> class Classifier(AttributionMixin, L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(2, 2)
        ...     def forward(self, x):
        ...         return self.layer(x)
        >>> source = DataSource.of(DataLoader(TensorDataset(torch.eye(2), torch.tensor([0, 1]))), "training")
        >>> trainer = L.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu")
        >>> probe(trainer, Classifier().eval(), None, source)[0].hooked
        ('layer.weight', 'layer.bias')
    """
    rows, batch = source.first(PROBE_SIZE)
    device, precision = trainer.strategy.root_device, trainer.precision_plugin
    batch = to_device(precision.convert_input(batch), module, datamodule, device)
    set_up_at("", trainer, module, datamodule, source)
    # The comparisons want all digits: the default dtype of the precision, but no autocast.
    with precision.forward_context(), torch.autocast(device.type, enabled=False), named_samples(rows):
        return plan(module, batch, len(rows), mode), batch, rows
