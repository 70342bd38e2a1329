"""Borrows a Trainer for an attribution run and gives it back: the place that touches Lightning's private attributes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ProgressBar
from torch import nn

from lightning_attr.user_code.lightning_names import both


@contextmanager
def attached(trainer: L.Trainer, module: L.LightningModule, datamodule: L.LightningDataModule | None) -> Iterator[None]:
    """Give the hooks of module and datamodule their trainer."""
    modules = [(m, m._trainer) for m in module.modules() if isinstance(m, both(L.LightningModule))]
    own = None if datamodule is None else datamodule.trainer
    module.trainer = trainer
    if datamodule is not None:
        datamodule.trainer = trainer
    try:
        yield
    finally:
        for m, before in modules:
            m._trainer = before
        if datamodule is not None:
            datamodule.trainer = own


@contextmanager
def lent(trainer: L.Trainer, module: L.LightningModule) -> Iterator[None]:
    """Lend the trainer to the predict run: progress bars stay, other callbacks, loggers and datamodule sit it out."""
    val_loop = trainer.fit_loop.epoch_loop.val_loop
    loops: list[Any] = [trainer.fit_loop, val_loop, trainer.validate_loop, trainer.test_loop]
    kept: list[tuple[Any, tuple[str, ...]]] = [
        (trainer, ("callbacks", "loggers", "datamodule", "state", "limit_predict_batches", "predict_loop")),
        (trainer, ("_logger_connector",)),  # with the metrics of the runs before
        (trainer._data_connector, ("_datahook_selector",)),
        (trainer.strategy, ("_lightning_module", "model")),
        *((loop, ("_combined_loader",)) for loop in loops),
        *((loop._data_source, ("instance",)) for loop in loops),
        *((m, ("_device", "_dtype")) for m in module.modules() if isinstance(m, both(L.LightningModule))),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, names in kept for name in names]
    trainer.callbacks = [c for c in trainer.callbacks if isinstance(c, both(ProgressBar))]  # type: ignore[attr-defined]
    trainer.loggers = []
    trainer.datamodule = None  # type: ignore[attr-defined]  # its hooks are for its own loaders
    trainer.state = copy.copy(trainer.state)
    trainer.limit_predict_batches = 1.0
    trainer.predict_loop = type(trainer.predict_loop)(trainer, inference_mode=False)  # the features need gradients
    trainer._logger_connector = copy.copy(trainer._logger_connector)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


@contextmanager
def same_tensors(module: nn.Module) -> Iterator[None]:
    """Put parameters and buffers back on their device and into their dtype: the trainer moves and converts them."""
    parameters = [(p, p.data) for p in module.parameters()]
    holders: list[dict[str, Any]] = [m._buffers for m in module.modules()]
    buffers = [(own, name, buffer) for own in holders for name, buffer in own.items() if buffer is not None]
    try:
        yield
    finally:
        with torch.no_grad():  # the memory from before holds the values from before, in all their digits
            for p, data in parameters:
                if p.dtype != data.dtype or p.device != data.device:
                    p.data = data
            for own, name, buffer in buffers:
                own[name] = buffer
