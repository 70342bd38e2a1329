"""Models whose parameters a strategy divides among processes: configured by it, and made whole for an attribution."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]  # re-exported
from torch import Tensor, nn

from lightning_attr.attribution.borrow import attached, lent
from lightning_attr.attribution.run import processes_of
from lightning_attr.attribution.strategies import check_strategy, divides
from lightning_attr.data.memory import free_bytes
from lightning_attr.errors import AttributionError, MemoryBudgetError
from lightning_attr.features.featurizer import PROBE_SIZE
from lightning_attr.parameters.whole import check_division, divided_parameters, whole_parameters
from lightning_attr.user_code.isolation import preserved_rng
from lightning_attr.user_code.lightning_names import as_lightning_module, both, check_one_world, overrides


@contextmanager
def whole_module(trainer: Any, model: Any) -> Iterator[None]:
    """Have the module of an attribution as one process has it, configured and whole, whatever a strategy divides.

    All processes of the strategy enter and leave together. What each has to hold is said before, or refused. What is no
    trainer or module is left to who checks arguments.
    """
    if not isinstance(trainer, both(L.Trainer)):
        yield
        return
    module = model if model is not None else trainer.lightning_module
    if not isinstance(module, both(L.LightningModule)):
        yield
        return
    check_one_world(trainer, module)
    check_strategy(trainer.strategy)
    if divides(trainer.strategy) and not divided_parameters(module):
        _configure(trainer, module)
    elif next(module.parameters(), None) is None and overrides("configure_model", module):
        _configure_here(trainer, module)
    with processes_of(trainer).together():
        check_whole_fits(trainer, module)
    with whole_parameters(module):
        yield


def check_whole_fits(trainer: L.Trainer, module: nn.Module) -> None:
    """Say what each process holds while parameters are whole, and refuse what there is no memory for."""
    check_division(module)
    divided = divided_parameters(module)
    if not divided:
        return
    strategy: Any = trainer.strategy
    if not divides(strategy):
        raise AttributionError(
            f"Expected a module with whole parameters under {type(strategy).__name__}, but those of "
            f"{type(module).__name__} are divided by `fully_shard`. Train and attribute it with "
            "ModelParallelStrategy(data_parallel_size=..., tensor_parallel_size=1) and call `fully_shard` in "
            "`configure_model`; or pass a module fresh from its constructor."
        )
    whole, trained = (sum(p.nbytes for p in found) for found in (divided.values(), _trained(divided)))
    size, device = whole + PROBE_SIZE * trained, strategy.root_device
    sharing = strategy.num_processes if device.type == "cpu" else 1
    free = free_bytes(device)
    if free is not None and size * sharing > free:
        raise MemoryBudgetError(
            f"Expected room for the whole parameters of {type(module).__name__} on each device while samples are "
            f"featurized, {whole / 1e9:,.2f} GB, and for the gradients of {PROBE_SIZE} samples on which it is checked, "
            f"{PROBE_SIZE * trained / 1e9:,.2f} GB, for each of {sharing} process(es) on {device}, but "
            f"{free / 1e9:,.2f} GB are free. Free some, spread the processes over more machines, or train a part of "
            "the parameters only (LoRA adapters): then the gradients are small."
        )
    rank_zero_info(
        f"{type(module).__name__} is divided among {trainer.world_size} processes; while samples are featurized, each "
        f"holds its parameters whole, {whole / 1e6:,.2f} MB, and while it is checked on {PROBE_SIZE} of them their "
        f"gradients, {PROBE_SIZE * trained / 1e6:,.2f} MB."
    )


def _trained(parameters: Mapping[str, Tensor]) -> list[Tensor]:
    return [p for p in parameters.values() if p.requires_grad]


def check_divided_run(trainer: L.Trainer, module: nn.Module, optimizer_state: bool) -> None:
    """Refuse, before the first step, what cannot be recorded of a module that is divided."""
    check_whole_fits(trainer, module)
    if optimizer_state and divided_parameters(module):
        raise AttributionError(
            f"Expected optimizer moments that one process has of all parameters, but those of {type(module).__name__} "
            "are divided among processes. Record without `optimizer_state`, and score by a method that needs none: "
            "TRAK, TracIn or GradCos in place of LESS and SOURCE."
        )


def _configure(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Let a module make and divide its layers in `configure_model`, in the processes of the strategy."""
    if not overrides("configure_model", module):
        raise AttributionError(
            f"Expected {type(module).__name__} to define `configure_model`, in which it calls `fully_shard` with "
            f"`self.device_mesh`, because the trainer's strategy is {type(trainer.strategy).__name__}."
        )
    with ExitStack() as stack:
        stack.enter_context(preserved_rng())
        stack.enter_context(attached(trainer, module, None))
        stack.enter_context(lent(trainer, module))
        step = as_lightning_module(_Configuration, trainer)(module)
        trainer.predict(step, dataloaders=None, return_predictions=False)  # type: ignore[arg-type]  # made just above


def _configure_here(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Let a module make its layers where nothing divides them."""
    try:
        with preserved_rng(), attached(trainer, module, None):
            module.configure_model()
    except Exception as error:
        raise AttributionError(
            f"`configure_model` of {type(module).__name__} raised {type(error).__name__}: {error}. Under "
            f"{type(trainer.strategy).__name__} there is no device mesh: let it make its layers in any case, and call "
            "`fully_shard` only `if self.device_mesh is not None`."
        ) from error


class _Configuration(nn.Module):
    """Stands in for the user's module in a predict run of nothing, which starts the processes of a strategy."""

    _device_mesh: Any = None

    def __init__(self, module: L.LightningModule) -> None:
        super().__init__()
        self.module = module

    def configure_model(self) -> None:
        """Configure the user's module, as Lightning would."""
        self.module._device_mesh = self._device_mesh
        self.module.configure_model()

    def predict_dataloader(self) -> list[int]:
        """One batch, of nothing."""
        return [0]

    def predict_step(self, batch: int, batch_idx: int) -> int:
        """Do nothing."""
        return batch_idx
