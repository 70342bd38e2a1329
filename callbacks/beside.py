"""Attribution beside training: training is left untouched, and the user's code sees the world that it expects."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import lightning as L
from torch import Tensor

from lightning_attr.data.loader import DataSource
from lightning_attr.objectives.modes import set_mode
from lightning_attr.parameters.whole import whole_parameters
from lightning_attr.user_code.isolation import undisturbed
from lightning_attr.user_code.step_world import StepWorld, replayed


@contextmanager
def beside_training(
    trainer: L.Trainer,
    pl_module: L.LightningModule,
    source: DataSource,
    mode: str,
    epoch: int | None,
    values: Callable[[], Mapping[str, Tensor]],
) -> Iterator[None]:
    """Leave training untouched, and tell hooks that ask the trainer that this is no training; its step sees one."""
    world = StepWorld(trainer, pl_module, getattr(trainer, "datamodule", None))
    at = world.at(trainer.current_epoch if epoch is None else epoch, trainer.global_step)
    data = (source.dataset, source.loader.collate_fn, source.loader)
    stage = trainer.state.stage
    trainer.predicting = True
    try:
        with (
            whole_parameters(pl_module),
            replayed(pl_module, at),
            undisturbed(pl_module, *data, beside=world.beside, values=values),
        ):
            set_mode(pl_module, mode)
            yield
    finally:
        trainer.state.stage = stage
