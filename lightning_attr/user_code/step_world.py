"""The world of a training step: a trainer as its fit had it at a snapshot, while the user's code runs there."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from typing import Any

import lightning as L
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities import CombinedLoader
from torch.optim import Optimizer

from lightning_attr.errors import AttributionError
from lightning_attr.user_code.calls import Surroundings, set_surroundings, surroundings_of
from lightning_attr.user_code.isolation import preserved_rng
from lightning_attr.user_code.lightning_names import own

log = logging.getLogger(__name__)

_LOOPS = ("fit_loop", "validate_loop", "test_loop")


class StepWorld:
    """What a step finds when it asks its trainer, as it is now: taken note of before the trainer is lent for a run.

    A training step sees the stage of training; other code of the user's (the mixin's ``attribution_step``, transfer
    hooks) sees the stage that the trainer is in, which is predicting: hooks augment in training.

    Args:
        trainer: the trainer.
        module: the user's module.
        datamodule: the user's datamodule, if any.
        loader: the training loader, for a trainer that never fitted or has forgotten its own.

    Attributes:
        asked: "optimizers" and "lr_schedulers", as far as the module's code has asked its fit for them.

    Example:
        >>> trainer = L.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu")
        >>> module = L.LightningModule()
        >>> module.trainer = trainer
        >>> with StepWorld(trainer, module, None).at(epoch=3, global_step=12)("training_step"):
        ...     module.current_epoch, module.global_step, module.trainer.training
        (3, 12, True)
        >>> module.current_epoch, module.global_step, module.trainer.training
        (0, 0, False)
    """

    def __init__(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        datamodule: L.LightningDataModule | None,
        loader: Any = None,
    ) -> None:
        self.trainer = trainer
        self.module = module
        loops = [*(getattr(trainer, name) for name in _LOOPS), trainer.fit_loop.epoch_loop.val_loop]
        owned: list[tuple[Any, tuple[str, ...]]] = [
            (trainer, ("callbacks", "_logger_connector")),
            *((loop, ("_combined_loader",)) for loop in loops),
            *((loop._data_source, ("instance",)) for loop in loops),
        ]
        self._real = [(owner, name, getattr(owner, name)) for owner, names in owned for name in names]
        self._real += [
            (trainer, "datamodule", datamodule if datamodule is not None else getattr(trainer, "datamodule", None)),
            (trainer, "loggers", _silent(trainer, trainer.loggers)),
            (trainer.strategy, "_lightning_module", module),
        ]
        self._loader = loader
        if trainer.fit_loop._combined_loader is None:
            self._lend_loader()
        self._fitted = bool(trainer.strategy.optimizers)
        self.asked: set[str] = set()
        self._configured: tuple[list[Any], list[Any]] | None = None

    def _lend_loader(self) -> None:
        if self._loader is not None:
            combined = own(CombinedLoader, self.trainer)(self._loader)
            self._real.append((self.trainer.fit_loop, "_combined_loader", combined))
            if hasattr(self._loader, "__len__"):
                self._real.append((self.trainer.fit_loop, "max_batches", len(self._loader)))

    def __getstate__(self) -> dict[str, Any]:
        """Leave behind what a spawned process is not given either: loggers, callbacks, loaders that have been begun."""
        here = {"callbacks", "_logger_connector", "loggers", "_combined_loader", "max_batches"}
        real = [item for item in self._real if item[1] not in here]
        return {**vars(self), "_real": real, "_loggers": len(self._loggers())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        count = state.pop("_loggers")
        vars(self).update(state)
        self._real.append((self.trainer, "loggers", _silent(self.trainer, [None] * count)))
        self._lend_loader()

    def _loggers(self) -> list[Any]:
        return next(value for _, name, value in self._real if name == "loggers")

    @property
    def beside(self) -> dict[str, object]:
        """What a step reaches through its trainer, and may change."""
        strategy = self.trainer.strategy
        found: dict[str, object] = {"optimizers": strategy.optimizers}
        found["lr_schedulers"] = [config.scheduler for config in strategy.lr_scheduler_configs]
        found["datamodule"] = next(value for _, name, value in self._real if name == "datamodule")
        return found

    def at(self, epoch: int, global_step: int) -> Surroundings:
        """Give the world of a snapshot.

        Returns name of a function of the user's -> the world around its calls.
        """
        epochs = self.trainer.fit_loop.epoch_progress.current
        loop = self.trainer.fit_loop.epoch_loop
        stepped = loop.automatic_optimization.optim_progress.optimizer.step.total
        by_hand = loop.manual_optimization.optim_step_progress.total
        real = [
            *self._real,
            (epochs, "completed", max(0, epoch)),
            (epochs, "processed", max(0, epoch)),
            (stepped if self.module.automatic_optimization else by_hand, "completed", global_step),
        ]
        training = copy.copy(self.trainer.state)
        training.fn = own(TrainerFn, self.trainer).FITTING
        training.stage = own(RunningStage, self.trainer).TRAINING
        return partial(self._around, real, [*real, (self.trainer, "state", training)])

    def _around(self, real: list[Any], training: list[Any], function: str) -> AbstractContextManager[object]:
        asked = {name: partial(self._asked, name) for name in ("optimizers", "lr_schedulers")}
        configured = {"optimizers": self._optimizers, "lr_schedulers": self._lr_schedulers}
        stands_in = asked if self._fitted else configured
        return _Exchanged(training if function == "training_step" else real, vars(self.module), stands_in)

    def _asked(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """In the place of a method of the module that gives what its fit has."""
        self.asked.add(name)
        return getattr(type(self.module), name)(self.module, *args, **kwargs)

    def _optimizers(self, use_pl_optimizer: bool = True) -> Any:
        """In the place of ``self.optimizers`` where there was no fit."""
        found = self._configure()[0]
        return found[0] if len(found) == 1 else found

    def _lr_schedulers(self) -> Any:
        """In the place of ``self.lr_schedulers`` where there was no fit."""
        found = [config.scheduler for config in self._configure()[1]]
        return None if not found else found[0] if len(found) == 1 else found

    def _configure(self) -> tuple[list[Any], list[Any]]:
        if self._configured is None:
            name = type(self.module).__name__
            try:
                self._configured = configured(self.module, self.trainer)
            except Exception as error:
                raise AttributionError(
                    f"The step of {name} asks for its optimizers, which only a fit has, and `configure_optimizers` "
                    f"does not give them here ({type(error).__name__}: {error}). Attribute with the trainer that "
                    "fitted, or let the step do without."
                ) from error
            log.warning(
                "The step of %s asks for its optimizers, but this trainer did not fit: it is given those of "
                "`configure_optimizers`, as they are at the start of training.",
                name,
            )
        return self._configured


def configured_optimizers(module: L.LightningModule) -> list[Optimizer]:
    """Make the optimizers of a module, as at the start of a fit.

    Returns those that ``configure_optimizers`` gives, in its order.
    """
    return configured(module, module.trainer)[0]


def configured(module: L.LightningModule, trainer: L.Trainer) -> tuple[list[Any], list[Any]]:
    """Make optimizers and schedulers as Lightning does; random streams stay where they are."""
    package = sys.modules[own(LightningOptimizer, trainer).__module__]
    with preserved_rng():
        made: tuple[list[Any], list[Any]] = package._init_optimizers_and_lr_schedulers(module)
    return made


class _Exchanged:
    """Exchanges attributes while it is entered; all those of the trainer are put back, new ones as well.

    Args:
        values: ``(owner, name, value)``; the first owner is the trainer.
        attributes: of the module.
        stands_in: what stands in for methods of the module.
    """

    def __init__(self, values: list[Any], attributes: dict[str, Any], stands_in: Mapping[str, Any]) -> None:
        self.values = values
        self.attributes = attributes
        self.stands_in = stands_in

    def __enter__(self) -> None:
        self.trainer = vars(self.values[0][0])
        self.kept = dict(self.trainer)
        self.before = [getattr(owner, name) for owner, name, _ in self.values]
        for owner, name, value in self.values:
            setattr(owner, name, value)
        self.attributes.update(self.stands_in)

    def __exit__(self, *failure: object) -> None:
        for name in self.stands_in:
            self.attributes.pop(name, None)
        for (owner, name, _), value in zip(self.values, self.before, strict=True):
            setattr(owner, name, value)
        for name in self.trainer.keys() - self.kept.keys():
            del self.trainer[name]
        self.trainer.update(self.kept)  # `should_stop`, for instance


@contextmanager
def replayed(module: L.LightningModule, world: Surroundings) -> Iterator[None]:
    """Let the user's code see a world for some time."""
    before = surroundings_of(module)
    set_surroundings(module, world)
    try:
        yield
    finally:
        set_surroundings(module, before)


@contextmanager
def silent_loggers(trainer: L.Trainer | None) -> Iterator[None]:
    """Put loggers that write nothing into the places of a trainer's.

    Example:
        >>> with silent_loggers(None):
        ...     pass
    """
    if trainer is None:
        yield
        return
    loggers = trainer.loggers
    trainer.loggers = _silent(trainer, loggers)
    try:
        yield
    finally:
        trainer.loggers = loggers


def _silent(trainer: L.Trainer, loggers: Sequence[Any]) -> list[Any]:
    """As many loggers that write nothing; one where there are none."""
    kind = _silent_kind(own(DummyLogger, trainer))
    return [kind(logger) for logger in loggers] or [kind(None)]


@cache
def _silent_kind(dummy: type[DummyLogger]) -> Any:
    return type("SilentLogger", (_InThePlaceOf, dummy), {})


class _InThePlaceOf:
    """Takes everything and writes nothing; it is where the logger is that it stands for, so that paths can be made.

    Where there was no logger it stands for none, for steps write to ``self.logger.experiment``.
    """

    def __init__(self, real: Any) -> None:
        super().__init__()
        self._real = real

    @property
    def name(self) -> Any:
        """As the logger that it stands for."""
        return getattr(self._real, "name", "")

    @property
    def version(self) -> Any:
        """As the logger that it stands for."""
        return getattr(self._real, "version", "")

    @property
    def save_dir(self) -> Any:
        """As the logger that it stands for."""
        return getattr(self._real, "save_dir", None)

    @property
    def log_dir(self) -> Any:
        """As the logger that it stands for."""
        return getattr(self._real, "log_dir", None)

    @property
    def root_dir(self) -> Any:
        """As the logger that it stands for."""
        return getattr(self._real, "root_dir", None)
