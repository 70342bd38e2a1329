"""The user's functions that make module, Trainer and datamodule: what they make has to be new each time."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelSummary, ProgressBar, Timer

from lightning_attr.arguments.messages import argument_message
from lightning_attr.errors import AttributionError
from lightning_attr.user_code.lightning_names import both, check_one_world

_Kind = TypeVar("_Kind")


class Factories:
    """Makes what one training needs.

    Args:
        module: makes a module.
        trainer: makes a Trainer.
        datamodule: makes a datamodule, or is one; None if the module has the loaders.
        verbose: whether the Trainers keep their progress bar and model summary.

    Raises:
        TypeError: if ``module`` or ``trainer`` is no function, or ``datamodule`` none of the three.

    Example:
        >>> module = L.LightningModule()
        >>> factories = Factories(lambda: module, L.Trainer, None)
        >>> first = factories.module()
        >>> factories.module()
        Traceback (most recent call last):
        ...
        lightning_attr.errors.AttributionError: The function `module` returned the same LightningModule twice: ...
    """

    def __init__(
        self,
        module: Callable[[], L.LightningModule],
        trainer: Callable[[], L.Trainer],
        datamodule: Callable[[], L.LightningDataModule] | L.LightningDataModule | None,
        verbose: bool = False,
    ) -> None:
        self._module, self._trainer, self._datamodule, self.verbose = module, trainer, datamodule, verbose
        self.seen: dict[int, weakref.ref[Any]] = {}
        shared = datamodule is None or isinstance(datamodule, both(L.LightningDataModule))
        for name, value in (("module", module), ("trainer", trainer), *((("datamodule", datamodule),) * (not shared))):
            if isinstance(value, torch.nn.Module) or not callable(value):
                expected = "a function that makes a new one for each retraining, such as a class or a lambda"
                raise TypeError(argument_message("retrain_*", name, expected, value))

    def module(self) -> L.LightningModule:
        """Make a module.

        Returns one that shares no parameter with those before.
        """
        found = _of_kind("module", self._module(), L.LightningModule)
        self._check_new("module", found, f"the same {type(found).__name__} twice")
        for name, parameter in found.named_parameters():
            self._check_new("module", parameter, f"a module with the parameter `{name}` of an earlier one")
        return found

    def trainer(self) -> L.Trainer:
        """Make a Trainer.

        Returns one for one device, that shares no callback with those before.
        """
        trainer = _of_kind("trainer", self._trainer(), L.Trainer)
        self._check_new("trainer", trainer, f"the same {type(trainer).__name__} twice")
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # set by its connector
        for callback in callbacks:
            self._check_new("trainer", callback, f"a Trainer with the {type(callback).__name__} of an earlier one")
        never = trainer.max_epochs in {None, -1} and trainer.max_steps == -1
        if never and not any(isinstance(callback, both(Timer)) for callback in callbacks):
            raise AttributionError(
                "Expected the function `trainer` to make a Trainer that ends, but its max_epochs is "
                f"{trainer.max_epochs} and its max_steps is -1. Give it the max_epochs or max_steps of the real run."
            )
        if trainer.num_devices * trainer.num_nodes > 1:
            raise AttributionError(
                f"Expected the function `trainer` to make a Trainer for one device, but it has {trainer.num_devices} "
                f"on {trainer.num_nodes} node(s). Use devices=1, and `num_workers` to retrain several at a time."
            )
        overfit: float = trainer.overfit_batches  # type: ignore[attr-defined]
        if overfit:
            raise AttributionError(
                "Expected the function `trainer` to make a Trainer that trains on all of a subset, but it has "
                f"overfit_batches={overfit}. Leave that out."
            )
        if not self.verbose:
            loud = both(ProgressBar, ModelSummary)
            trainer.callbacks = [c for c in callbacks if not isinstance(c, loud)]  # type: ignore[attr-defined]
        return trainer

    def datamodule(self) -> L.LightningDataModule | None:
        """Make a datamodule, or give the one there is.

        Returns the datamodule, or None.
        """
        given: Any = self._datamodule
        if given is None:
            return None
        found = given if isinstance(given, both(L.LightningDataModule)) else given()
        return _of_kind("datamodule", found, L.LightningDataModule)

    def check(self) -> tuple[L.LightningModule, L.Trainer, L.LightningDataModule | None]:
        """Make everything, module and Trainer twice.

        Returns module, Trainer and datamodule.
        """
        states = []
        for seed in (0, 1):
            L.seed_everything(seed, verbose=False)
            module = self.module()
            states.append(torch.get_rng_state())
            trainer = self.trainer()
        if torch.equal(*states):
            raise AttributionError(
                "The function `module` sets the seed of torch's random numbers itself, so that every repeat would be "
                "the same training. Leave seeds to this call: drop `seed_everything` and `manual_seed` there (for "
                "LightningCLI: `--seed_everything=false`)."
            )
        datamodule = self.datamodule()
        check_one_world(trainer, module, datamodule)
        return module, trainer, datamodule

    def _check_new(self, name: str, found: Any, what: str) -> None:
        known = self.seen.get(id(found))
        if known is not None and known() is found:
            raise AttributionError(
                f"The function `{name}` returned {what}: it would go on from where the training before ended. Make a "
                "new one, with all its parts, in each call."
            )
        self.seen[id(found)] = weakref.ref(found)


def _of_kind(name: str, found: Any, kind: type[_Kind]) -> _Kind:
    if not isinstance(found, both(kind)):
        raise TypeError(f"Expected the function `{name}` to return a {kind.__name__}, but got {type(found).__name__}.")
    return found
