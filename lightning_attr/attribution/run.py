"""Runs a step that attributes as one predict run of a borrowed Trainer; everything is put back in the end."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lightning_attr.attribution.borrow import attached, lent, same_tensors
from lightning_attr.attribution.predict_step import AttributionStep
from lightning_attr.attribution.processes import Processes
from lightning_attr.attribution.request import AttributionRequest
from lightning_attr.parameters.weights import loaded
from lightning_attr.pilots import train_pilots
from lightning_attr.user_code.calls import set_surroundings, surroundings_of
from lightning_attr.user_code.isolation import preserved_rng, undisturbed
from lightning_attr.user_code.lightning_names import as_lightning_module, both
from lightning_attr.user_code.step_world import StepWorld


@contextmanager
def predicted(
    trainer: L.Trainer, request: AttributionRequest, kind: type[AttributionStep]
) -> Iterator[AttributionStep]:
    """Run a step.

    Yields the step at its end, while what it has written into its folder is still there.
    """
    with ExitStack() as stack:
        with processes_of(trainer).together():  # what fails in one of them before its step can tell the others
            step = _borrowed(stack, trainer, request, kind)
        stack.push(step.end)
        trainer.predict(step, dataloaders=None, return_predictions=False)  # type: ignore[arg-type]  # made one just above
        yield step


def _borrowed(
    stack: ExitStack, trainer: L.Trainer, request: AttributionRequest, kind: type[AttributionStep]
) -> AttributionStep:
    """Make a step, and lend it the trainer and the module until the stack ends."""
    module, datamodule, train = request.module, request.datamodule, request.train
    stack.enter_context(preserved_rng())
    stack.enter_context(attached(trainer, module, datamodule))
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lightning_attr-")))
    if request.pilots is not None:
        moments = request.method.needs_optimizer_state
        train_pilots(request.store, request.pilots, trainer, module, datamodule, train, moments)
    world = StepWorld(trainer, module, datamodule, train.loader)
    step: AttributionStep = as_lightning_module(kind, trainer)(request, folder, world)
    stack.callback(set_surroundings, module, surroundings_of(module))
    stack.enter_context(lent(trainer, module))
    sources = [source for source in (train, request.targets) if source is not None]
    data = [item for source in sources for item in (source.dataset, source.loader.collate_fn, source.loader)]
    stack.enter_context(undisturbed(module, *data, beside=world.beside))
    stack.enter_context(same_tensors(module))  # left first: gradients go back where their parameters are again
    stack.enter_context(loaded(module))
    return step


def processes_of(trainer: Any) -> Processes:
    """The group that a fit has left; without one, a process can only speak for itself."""
    grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not grouped or not isinstance(trainer, both(L.Trainer)):
        return Processes(0, 1, torch.device("cpu"))
    return Processes(trainer.global_rank, trainer.world_size, trainer.strategy.root_device)
