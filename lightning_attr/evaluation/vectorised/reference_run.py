"""A pilot: one retraining by the Trainer itself, recorded, so that many others can be trained like it at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import (
    DeviceStatsMonitor,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    ProgressBar,
)
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_attr.errors import AttributionError
from lightning_attr.evaluation.subsets import Retraining
from lightning_attr.evaluation.train_one import Beat, Fitted, LightningRetraining
from lightning_attr.user_code.lightning_names import both, overrides

_EARLY = 8
"""Optimizer steps after which rounding has had no time to grow."""
_TOLERANCES = {torch.float32: (1e-4, 1e-2), torch.float64: (1e-10, 1e-8)}
"""How far weights may be from the pilot's, early and later, as a share of how far they have gone."""
_ELEMENTWISE = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
"""Optimizers that treat each number of a parameter on its own, so that stacked parameters train as single ones."""
_HARMLESS = (ProgressBar, ModelSummary, ModelCheckpoint, LearningRateMonitor, DeviceStatsMonitor)
_HOOKS = (
    *("setup", "configure_model", "on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start"),
    *("on_before_zero_grad", "optimizer_zero_grad", "on_before_backward", "backward", "on_after_backward"),
    *("on_before_optimizer_step", "configure_gradient_clipping", "optimizer_step", "lr_scheduler_step"),
    *("on_train_batch_end", "on_train_epoch_end", "on_train_end"),
)
_TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class NotVectorisableError(AttributionError):
    """Models can not be trained at once as they are one at a time; the message is a clause that says why.

    Example:
        >>> issubclass(NotVectorisableError, AttributionError)
        True
    """


class Recorder(L.Callback):
    """Records what all trainings of a kind have in common, and some weights to compare with.

    Attributes:
        options: for each optimizer step, those of each parameter group, such as the learning rate.
        states: weights and buffers at the start, after steps 1, 2, 4, 8, ..., and in the end.
        modes: the ``training`` flags.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> class Line(L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.slope = nn.Parameter(torch.zeros(()))
        ...     def training_step(self, batch):
        ...         return (self.slope - batch).square().mean()
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.5)
        >>> recorder = Recorder()
        >>> quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
        >>> trainer = L.Trainer(
        ...     max_epochs=1, callbacks=[recorder], enable_progress_bar=False, accelerator="cpu", **quiet
        ... )
        >>> trainer.fit(Line(), DataLoader(torch.ones(3)))
        >>> [groups[0]["lr"] for groups in recorder.options], list(recorder.states)
        ([0.5, 0.5, 0.5], [0, 1, 2, 3])
    """

    def __init__(self) -> None:
        self.options: list[list[dict[str, Any]]] = []
        self.states: dict[int, dict[str, Tensor]] = {}
        self.modes: list[tuple[nn.Module, bool]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record where training starts from."""
        self._keep(trainer, pl_module)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Record which layers are in train mode."""
        self.modes = self.modes or [(layer, layer.training) for layer in pl_module.modules()]

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Record the options of the step."""
        self.options.append([_options(group) for group in optimizer.param_groups])

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Record where training has come to, rarely."""
        if trainer.global_step.bit_count() == 1:
            self._keep(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record where training ends."""
        self._keep(trainer, pl_module)

    def _keep(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.states[trainer.global_step] = {name: tensor.detach().clone() for name, tensor in state_of(module).items()}


@dataclass(frozen=True)
class Pilot:
    """A retraining that others are trained like.

    Args:
        retraining: which.
        fitted: its model, and what it was made with.
        kept: ``(n_train,)``, bool: its training samples.
        recorder: what was recorded.
        outputs: ``(n_target,)``: its outputs.

    See :class:`lightning_attr.evaluation.vectorised.stacked_models.Stack` for an example.
    """

    retraining: Retraining
    fitted: Fitted
    kept: Tensor
    recorder: Recorder
    outputs: Tensor

    @classmethod
    def train(cls, one: LightningRetraining, retraining: Retraining, kept: Tensor, beat: Any) -> Pilot:
        """Train it, as any other; to be called in :func:`lightning_attr.evaluation.train_one.isolated`.

        Shapes: kept (n_train,).
        """
        recorder = Recorder()
        fitted = one.fit(retraining, kept, beat, [recorder])
        return cls(retraining, fitted, kept, recorder, one.outputs(retraining, fitted, beat))

    @property
    def steps(self) -> int:
        """How many optimizer steps it took."""
        return len(self.recorder.options)

    def check_kind(self) -> None:
        """Refuse what is not the same for every model, or not known to be."""
        for why in self._refusals():
            raise NotVectorisableError(why)

    def _refusals(self) -> Iterable[str]:
        module, trainer, datamodule = self.fitted.module, self.fitted.trainer, self.fitted.datamodule
        name, callbacks = type(module).__name__, trainer.callbacks  # type: ignore[attr-defined]  # set by its connector
        if not module.automatic_optimization:
            yield f"{name} optimizes by hand (automatic_optimization=False)"
        for hook in _HOOKS + _TRANSFER_HOOKS:
            if overrides(hook, module):
                yield f"{name} overrides `{hook}`, which may change training"
        for hook in _TRANSFER_HOOKS if datamodule is not None else ():
            if overrides(hook, datamodule):
                yield f"{type(datamodule).__name__} overrides `{hook}`, which may change samples"
        for callback in callbacks:
            if not isinstance(callback, (*both(*_HARMLESS), Beat, Recorder)):
                yield f"the Trainer has the callback {type(callback).__name__}, which may change training"
        if trainer.enable_validation:
            yield "the Trainer validates while it trains, which takes random numbers: give it limit_val_batches=0"
        if trainer.accumulate_grad_batches != 1:
            yield f"the Trainer has accumulate_grad_batches={trainer.accumulate_grad_batches}"
        if trainer.gradient_clip_val:
            yield f"the Trainer has gradient_clip_val={trainer.gradient_clip_val}"
        if trainer.precision not in {"32-true", "64-true"}:
            yield f"the Trainer's precision is {trainer.precision}, and not 32-true or 64-true"
        if trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]  # set by its connector
            yield "the Trainer reloads its data (reload_dataloaders_every_n_epochs)"
        if not isinstance(trainer.strategy, both(SingleDeviceStrategy)):
            yield f"the Trainer's strategy is {type(trainer.strategy).__name__}"
        if trainer.should_stop:
            yield "training was stopped before its end"
        yield from _optimizer_refusals(trainer)
        loader = self.fitted.train.loader
        if type(loader) is not DataLoader:
            yield f"the training loader is a {type(loader).__name__}, and not torch's DataLoader"
        if loader.persistent_workers:
            yield "the training loader has persistent_workers=True, which draws other random numbers"

    def check_state(self, step: int, state: Mapping[str, Tensor]) -> None:
        """Compare with a model that was trained otherwise, if this step was recorded."""
        own = self.recorder.states.get(step)
        if own is None:
            return
        start = self.recorder.states[0]
        dtype = next(tensor.dtype for tensor in own.values() if tensor.is_floating_point())
        tolerance = _TOLERANCES[dtype][step > _EARLY]
        gone, rounding = _distance(own, start), 10 * torch.finfo(dtype).eps * _distance(own, None)
        apart = _distance(own, state)
        if not apart <= tolerance * gone + rounding:
            raise NotVectorisableError(
                f"after {step} of {self.steps} steps the weights of {self.retraining} differ from those of the "
                f"Trainer's model by {apart / gone:.1e} of the way they went, more than {tolerance:.0e}"
            )

    def check_outputs(self, outputs: Tensor) -> None:
        """Compare the outputs of a model that was trained otherwise.

        Shapes: outputs (n_target,).
        """
        tolerance = _TOLERANCES[torch.float64 if outputs.dtype == torch.float64 else torch.float32][1]
        apart, size = (outputs - self.outputs).norm(), self.outputs.norm()
        if not apart <= tolerance * size:
            raise NotVectorisableError(
                f"the outputs of {self.retraining} differ from those of the Trainer's model by {apart / size:.1e} of "
                f"their norm, more than {tolerance:.0e}"
            )


def _optimizer_refusals(trainer: L.Trainer) -> Iterable[str]:
    if len(trainer.optimizers) != 1:
        yield f"there are {len(trainer.optimizers)} optimizers"
        return
    kind = type(trainer.optimizers[0])
    if kind not in _ELEMENTWISE:
        yield f"the optimizer is {kind.__name__}, and not one of {', '.join(one.__name__ for one in _ELEMENTWISE)}"
    if any(config.reduce_on_plateau for config in trainer.lr_scheduler_configs):
        yield "the learning rate depends on a metric (ReduceLROnPlateau)"


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """List what makes up a model.

    Returns name -> parameter or buffer, each once.
    """
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor] | None) -> float:
    differences = [tensor.double() - (0 if other is None else other[name].double()) for name, tensor in one.items()]
    return float(torch.stack([difference.norm() for difference in differences]).norm())


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value.clone() if isinstance(value, Tensor) else value for name, value in group.items() if name != "params"
    }
