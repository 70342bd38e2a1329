"""The targets of a ground truth: the model output for each, and a hash of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_attr.batches.nested import map_tensors, select_rows
from lightning_attr.data.loader import DataSource, OrderedLoader
from lightning_attr.errors import named_samples
from lightning_attr.features.failing_samples import named_failures
from lightning_attr.features.featurizer import PROBE_SIZE
from lightning_attr.features.transfer import placed
from lightning_attr.files.io import digest
from lightning_attr.objectives.apart import objective_of
from lightning_attr.objectives.mode_choice import choose_mode
from lightning_attr.objectives.modes import set_mode
from lightning_attr.objectives.objective import Objective, completed, draws_of, needs_setup
from lightning_attr.randomness.draws import Draw
from lightning_attr.user_code.reading_state import unchanged_data
from lightning_attr.verification.probe import look_at


def target_outputs(
    trainer: L.Trainer,
    module: L.LightningModule,
    datamodule: L.LightningDataModule | None,
    targets: DataSource,
    beat: Callable[[], None] = lambda: None,
    train: DataSource | None = None,
) -> Tensor:
    """Compute what is attributed of a trained module, for each target, as the attribution step does.

    Returns ``f``, float, ``(n_target,)``, on the CPU.
    """
    return outputs_at(trainer, module, datamodule, targets, [lambda: None], beat, train)[0]


def outputs_at(
    trainer: L.Trainer,
    module: L.LightningModule,
    datamodule: L.LightningDataModule | None,
    targets: DataSource,
    loads: Sequence[Callable[[], None]],
    beat: Callable[[], None] = lambda: None,
    train: DataSource | None = None,
) -> Tensor:
    """Compute what :func:`target_outputs` does for several sets of weights.

    Each target is read once, unless the module is to be set up at each set of weights: then once for each.

    Returns ``f``, float, ``(len(loads), n_target)``, on the CPU.
    """
    if train is not None and needs_setup(module) and len(loads) > 1:
        return torch.cat([outputs_at(trainer, module, datamodule, targets, [load], beat, train) for load in loads])
    device, precision = trainer.strategy.root_device, trainer.precision_plugin
    module.eval().to(device)

    def prepared(batch: Any, rows: Sequence[int]) -> Any:
        return placed(precision.convert_input(batch), rows, module, datamodule, device, targets)

    loads[0]()
    check = look_at(trainer, module, datamodule, targets, train)
    batch, rows = check.probed(PROBE_SIZE)
    with precision.forward_context():
        with (
            torch.autocast(device.type, enabled=False),
            named_samples(rows),
            named_failures(module, rows, check.run_alone),
        ):
            first = completed(module, batch, Draw(rows, device=device))
            set_mode(module, choose_mode(module, first[0] if targets.form.apart else first), dropout=False)
            objective = objective_of(module, first, len(rows))
        found: list[list[Tensor]] = [[] for _ in loads]
        for rows, given in OrderedLoader(targets, targets.batches(range(len(targets)))):
            batch = prepared(given, rows)
            for load, own in zip(loads, found, strict=True):
                load()
                own.append(_mean_output(objective, batch, rows, device))
                beat()
    return torch.stack([torch.cat(own) for own in found])


@torch.enable_grad()  # some steps differentiate
def _mean_output(objective: Objective, batch: Any, rows: Sequence[int], device: torch.device) -> Tensor:
    """Average the outputs over the module's draws, the same for every set of weights."""
    module = objective.module
    count = draws_of(module)
    batches = (completed(module, batch, Draw(rows, number=number, device=device)) for number in range(count))

    def alone(position: int) -> None:
        one = select_rows(batch, len(rows), [position])
        objective.sample_outputs(completed(module, one, Draw([rows[position]], device=device)), 1)

    with named_samples(rows), named_failures(module, rows, alone):
        outputs = [objective.sample_outputs(given, len(rows)).detach() for given in batches]
    return torch.stack(outputs).mean(0).cpu()


def digest_of_all(source: DataSource) -> str:
    """Hash every sample, one by one, as the collation gives it.

    Returns the hash; it does not depend on the batch size.
    """
    tensors: dict[str, Tensor] = {}

    def add(tensor: Tensor) -> Tensor:
        tensors[str(len(tensors))] = tensor
        return tensor

    total = ""
    with unchanged_data(source.dataset):
        for _, batch in OrderedLoader(source, [[row] for row in range(len(source))]):
            tensors.clear()
            map_tensors(batch, add)
            total = digest({total: torch.empty(0), **tensors})  # a chain takes the memory of one sample
    return total[:16]
