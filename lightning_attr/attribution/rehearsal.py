"""Runs something in the world of a fit without a fit: model, data, trainer and random streams are as before then."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning as L
from torch import nn

from lightning_attr.attribution.borrow import attached, lent, same_tensors
from lightning_attr.data.sources import train_source
from lightning_attr.parameters.weights import loaded
from lightning_attr.user_code.isolation import preserved_rng, undisturbed
from lightning_attr.user_code.lightning_names import as_lightning_module, check_one_world, own
from lightning_attr.user_code.step_world import StepWorld, configured

_LOGGERS = ("lightning_attr", "lightning.pytorch.utilities.rank_zero")


def rehearse(
    trainer: L.Trainer | None,
    module: L.LightningModule,
    datamodule: L.LightningDataModule | None,
    loaders: Any,
    run: Callable[[L.Trainer], None],
) -> None:
    """Call something as at the start of a fit, on one device: trainer, optimizers and training loader are there."""
    with ExitStack() as stack:
        stack.enter_context(preserved_rng())
        alone = trainer if trainer is not None and trainer.world_size == 1 else _single(trainer, module)
        check_one_world(alone, module)
        stack.enter_context(attached(alone, module, datamodule))
        stack.enter_context(undisturbed(module, beside={"datamodule": datamodule}))  # its setup, for one
        source = train_source(alone, module, datamodule, loaders)
        step = as_lightning_module(_Rehearsal, alone)(module, datamodule, source.loader, run)
        step.world = StepWorld(alone, module, datamodule, source.loader)
        stack.enter_context(lent(alone, module))
        stack.enter_context(same_tensors(module))
        stack.enter_context(loaded(module))
        alone.predict(step, dataloaders=None, return_predictions=False)  # type: ignore[arg-type]  # made just above


class _Rehearsal(nn.Module):
    """Stands in for the user's module in a predict run, which sets up strategy, device and precision."""

    trainer: L.Trainer
    world: StepWorld

    def __init__(
        self, module: L.LightningModule, datamodule: Any, loader: Any, run: Callable[[L.Trainer], None]
    ) -> None:
        super().__init__()
        self.module = module
        self.run = run

    def predict_dataloader(self) -> list[int]:
        """One batch, of nothing."""
        return [0]

    def predict_step(self, batch: Any, batch_idx: int) -> int:
        """Run it as a fit would, with optimizers as they are at its start."""
        strategy = self.trainer.strategy
        with self.world.at(0, 0)("training_step"):
            for name in ("optimizers", "lr_schedulers"):
                vars(self.module).pop(name, None)  # what stands in for a fit's: here they are, below
            before = strategy.optimizers, strategy.lr_scheduler_configs
            try:
                strategy.optimizers, strategy.lr_scheduler_configs = configured(self.module, self.trainer)
                self.run(self.trainer)
            finally:
                strategy.optimizers, strategy.lr_scheduler_configs = before
        return batch_idx


def _single(trainer: L.Trainer | None, module: L.LightningModule) -> L.Trainer:
    """A trainer of one process that writes nothing; of another one, its precision, epochs and batches."""
    settings: dict[str, Any] = {"accelerator": "auto", "max_epochs": -1}
    if trainer is not None:
        settings = {
            "accelerator": type(trainer.accelerator)(),
            "precision": trainer.precision,
            "max_epochs": trainer.max_epochs,
            "max_steps": trainer.max_steps,
            "limit_train_batches": trainer.limit_train_batches,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
        }
    for name in ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"):
        settings[name] = False
    return own(L.Trainer, module)(devices=1, **settings)


@contextmanager
def heard(said: list[str]) -> Iterator[None]:
    """Collect what is logged or warned of meanwhile, instead of showing it."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [(logger.level, logger.propagate, logger.handlers) for logger in loggers]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", UserWarning)
        for logger in loggers:
            logger.setLevel(logging.INFO)
            logger.propagate, logger.handlers = False, [_Listener(said)]
        try:
            yield
        finally:
            for logger, (level, propagates, handlers) in zip(loggers, before, strict=True):
                logger.setLevel(level)
                logger.propagate, logger.handlers = propagates, handlers
            said.extend(str(one.message).strip() for one in warned)


class _Listener(logging.Handler):
    def __init__(self, said: list[str]) -> None:
        super().__init__(logging.INFO)
        self.said = said

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage().strip())
