"""The user's module and Trainer once more: by the user's functions, or from what the objects at hand tell."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import (
    DeviceStatsMonitor,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    ProgressBar,
    Timer,
)
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.data import DataLoader

from lightning_attr.errors import AttributionError
from lightning_attr.user_code.lightning_names import both, own

_WATCHING = (
    *(ProgressBar, ModelSummary, ModelCheckpoint, LearningRateMonitor, DeviceStatsMonitor, Timer, EarlyStopping),
)
_WITH_MODULE = "`pilots=Pilots({count}, module=...)` with a function that makes the module as the run began with it"
_WITH_TRAINER = "`pilots=Pilots({count}, trainer=...)` with a function `epochs -> Trainer`"


def module_again(module: L.LightningModule, count: int) -> Callable[[], L.LightningModule]:
    """Find out how a module was made, from its hyperparameters.

    Returns a function that makes a fresh one.

    Example:
        >>> class Line(L.LightningModule):
        ...     def __init__(self, rate=0.1):
        ...         super().__init__()
        ...         self.save_hyperparameters()
        >>> module_again(Line(0.2), 1)().hparams
        "rate": 0.2
    """
    kind, hparams = type(module), module.hparams
    name, remedy = (
        kind.__name__,
        f"Call `self.save_hyperparameters()` first in its `__init__`, or pass {_module(count)}.",
    )
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    if kind.__init__ in {base.__init__ for base in both(L.LightningModule)}:
        parameters = []
    given, rest = {}, {key: value for key, value in hparams.items() if not key.startswith("_")}
    whole = getattr(module, "_hparams_name", None)
    for parameter in parameters:
        if parameter.kind is parameter.VAR_KEYWORD:
            given.update(rest)
        elif parameter.name == whole and parameter.name not in hparams:  # `save_hyperparameters(config)`
            given[whole], rest = hparams, {}
        elif parameter.name in hparams and parameter.kind is not parameter.VAR_POSITIONAL:
            given[parameter.name] = rest.pop(parameter.name)
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            raise AttributionError(
                f"Pilots train a fresh {name}, but nothing tells which `{parameter.name}` it was made with. {remedy}"
            )
    positional = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_ONLY]
    first = [given.pop(key) for key in positional]

    def make() -> L.LightningModule:
        try:
            found = kind(*first, **given)
        except Exception as error:
            raise AttributionError(
                f"Pilots train a fresh {name}, but it cannot be made again of its hyperparameters "
                f"({type(error).__name__}: {error}). Pass {_module(count)}."
            ) from error
        changed = [key for key, value in _plain(hparams).items() if _plain(found.hparams).get(key) != value]
        if changed:
            raise AttributionError(
                f"Pilots train a fresh {name}, but made again of its hyperparameters it has another `{changed[0]}`: "
                f"{_plain(found.hparams).get(changed[0])!r} and not {hparams[changed[0]]!r}. Pass {_module(count)}."
            )
        return found

    return make


def trainer_again(trainer: L.Trainer, run_epochs: int, count: int) -> Callable[[int], L.Trainer]:
    """Find out how a Trainer was made.

    Returns a function of the number of epochs that makes one for one device, without callbacks and loggers.

    Example:
        >>> trainer = L.Trainer(max_epochs=12, accelerator="cpu", logger=False, gradient_clip_val=1.0)
        >>> again = trainer_again(trainer, 12, 1)(2)
        >>> again.max_epochs, again.gradient_clip_val, again.callbacks
        (2, 1.0, [])
    """
    why = next(iter(_other_parts(trainer)), None)
    if why is not None:
        raise AttributionError(f"Pilots are trained by a Trainer like this one, but {why}. Pass {_trainer(count)}.")
    index = trainer.strategy.root_device.index
    settings: dict[str, Any] = {
        "accelerator": trainer.accelerator,
        "devices": 1 if index is None or trainer.strategy.root_device.type != "cuda" else [index],
        "num_sanity_val_steps": 0,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        **training_settings(trainer),
    }
    for name in ("limit_val_batches", "check_val_every_n_epoch", "reload_dataloaders_every_n_epochs"):
        settings[name] = getattr(trainer, name)
    settings["default_root_dir"] = trainer.default_root_dir

    def make(epochs: int) -> L.Trainer:
        steps = trainer.max_steps
        limit = steps if steps == -1 else max(1, round(steps * epochs / run_epochs))
        kind = own(L.Trainer, trainer)
        made = kind(max_epochs=epochs, max_steps=limit, **settings)
        if type(made.precision_plugin) is not type(trainer.precision_plugin):
            raise AttributionError(
                "Pilots are trained by a Trainer like this one, but its precision plugin "
                f"({type(trainer.precision_plugin).__name__}) is one of its own. Pass {_trainer(count)}."
            )
        return made

    return make


def _other_parts(trainer: L.Trainer) -> Any:
    """Say what a Trainer has that cannot be made again from its settings."""
    if trainer.world_size > 1 or not isinstance(trainer.strategy, both(SingleDeviceStrategy)):
        yield (
            f"its strategy is {type(trainer.strategy).__name__} with {trainer.world_size} process(es), and a pilot "
            "takes one. Let a Trainer with devices=1 attribute once with `pilots` and this `store`: they are kept "
            "there, and all Trainers score with them"
        )
    overfit: float = trainer.overfit_batches  # type: ignore[attr-defined]  # set by its connector
    if overfit:
        yield f"it has overfit_batches={overfit}"
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if acts_on_training(callback):
            yield f"its callback {type(callback).__name__} may change training, and can not be copied"


def acts_on_training(callback: Any) -> bool:
    """Say whether a callback may change what training does, beside ending it.

    Returns True if it comes in before steps, or is none that is known to watch only.

    Example:
        >>> acts_on_training(ModelCheckpoint())
        False
    """
    ours = any(base.__module__.startswith("lightning_attr.callbacks") for base in type(callback).__mro__)
    if ours or isinstance(callback, both(*_WATCHING)):
        return False
    bases = both(L.Callback)
    return any(getattr(type(callback), hook, None) not in {getattr(base, hook) for base in bases} for hook in _BEFORE)


_BEFORE = (
    *("on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_before_zero_grad"),
    *("on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_train_batch_end"),
)
"""Hooks in which a callback can change the next step; at the end of epochs most of them log."""


def training_settings(trainer: L.Trainer) -> dict[str, Any]:
    """List the settings of a Trainer that each training step depends on.

    Returns argument of the Trainer -> plain value.

    Example:
        >>> training_settings(L.Trainer(accelerator="cpu", logger=False, precision="64-true"))["precision"]
        '64-true'
    """
    algorithm = trainer.gradient_clip_algorithm
    clip = trainer.gradient_clip_val
    return {
        "precision": str(trainer.precision),
        "accumulate_grad_batches": int(trainer.accumulate_grad_batches),
        "gradient_clip_val": None if clip is None else float(clip),
        "gradient_clip_algorithm": None if algorithm is None else str(algorithm.value),
        "limit_train_batches": trainer.limit_train_batches,
    }


def run_settings(trainer: L.Trainer, loader: DataLoader[Any]) -> dict[str, Any]:
    """Describe how a run is trained, so that pilots can be trained like it.

    Args:
        trainer: its own.
        loader: its training loader.

    Returns:
        What :func:`training_settings` gives, and the class of the ``sampler``.

    Example:
        >>> trainer = L.Trainer(accelerator="cpu", logger=False)
        >>> run_settings(trainer, DataLoader([1.0], shuffle=True))["sampler"]
        'RandomSampler'
    """
    return {**training_settings(trainer), "sampler": type(loader.sampler).__name__}


def check_settings(recorded: Mapping[str, Any] | None, trainer: L.Trainer, loader: DataLoader[Any]) -> None:
    """Refuse a Trainer of other settings than the run's, or a loader that takes samples in another order.

    Example:
        >>> check_settings(None, L.Trainer(accelerator="cpu", logger=False), DataLoader([1.0]))
    """
    recorded, found = recorded or {}, run_settings(trainer, loader)
    for name in training_settings(trainer):
        if recorded.get(name, found[name]) != found[name]:
            raise AttributionError(
                f"Pilots are trained as the run was, which had {name}={recorded[name]!r}, but this Trainer has "
                f"{name}={found[name]!r}. Attribute with a Trainer of the run's settings, or pass {_trainer('n')}."
            )
    sampler = str(recorded.get("sampler", found["sampler"]))
    if sampler != found["sampler"] and not sampler.startswith("Distributed"):
        raise AttributionError(
            f"Pilots are trained as the run was, whose loader drew samples by {sampler}, but this one has "
            f"{found['sampler']}. Pass the datamodule or the loader that the run was fitted with (`shuffle=True`, for "
            "instance): pilots train by it."
        )


def _module(count: object) -> str:
    return _WITH_MODULE.format(count=count)


def _trainer(count: object) -> str:
    return _WITH_TRAINER.format(count=count)


def _plain(hparams: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in hparams.items() if isinstance(value, (str, int, float, bool, type(None)))}
