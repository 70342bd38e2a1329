"""What a user asks for: how many pilots, how long, and what makes their module and Trainer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L

from lightning_attr.arguments.checks import check_callable, check_int
from lightning_attr.arguments.messages import argument_message
from lightning_attr.outputs import LanguageModel
from lightning_attr.user_code.lightning_names import both

_SHARE, _TEXT_SHARE = 1 / 6, 1 / 3
"""Of the run's epochs, for most models and for language models, whose kernel takes longer to settle. Longer pilots
repeat what the run says."""
_STEPS = 128
"""Fewest optimizer steps: below that a network has hardly learned anything, whatever share of the run that is. On the
digits MLP two pilots of 69, 92, 138, 184 and 230 steps have an LDS of .50, .58, .68, .69, .68 (`tune` subsets)."""
_MOST = 1 / 2
"""Of the run's epochs: a run of few steps is not trained all over again."""


@dataclass(frozen=True)
class Pilots:
    """Short runs to score together with the recorded one; ``pilots=2`` is short for ``pilots=Pilots(2)``.

    Args:
        count: how many.
        module: makes a module as the run's was when it began, new in each call: a class, or any function. By default
            the module's class is called with the hyperparameters that ``self.save_hyperparameters()`` kept.
        trainer: ``epochs -> Trainer`` makes a Trainer with the configuration of the run for so many epochs, for one
            device, new in each call. By default one is made with the settings of the Trainer that attributes, without
            its callbacks.
        epochs: of each pilot. By default a sixth of the run's, a third for a
            :class:`lightning_attr.outputs.LanguageModel`; and more, up to half of them, where that is less than 128
            optimizer steps.

    Raises:
        TypeError: if ``module`` or ``trainer`` is no function.
        ValueError: if ``count`` or ``epochs`` is no integer of at least 1.

    Example:
        >>> Pilots(2)
        Pilots(count=2, module=None, trainer=None, epochs=None)
        >>> Pilots(0)
        Traceback (most recent call last):
        ...
        ValueError: Expected argument `count` of Pilots to be an integer >= 1, but got 0. For none, leave `pilots` out.
    """

    count: int
    module: Callable[[], L.LightningModule] | None = None
    trainer: Callable[[int], L.Trainer] | None = None
    epochs: int | None = None

    def __post_init__(self) -> None:
        check_int(self, "count", self.count, minimum=1, remedy="For none, leave `pilots` out.")
        if self.epochs is not None:
            check_int(self, "epochs", self.epochs, minimum=1, also="None")
        for name, kind, expected in (
            ("module", L.LightningModule, "a function that makes a module, such as its class"),
            ("trainer", L.Trainer, "a function of the number of epochs that makes a Trainer"),
        ):
            value = getattr(self, name)
            if isinstance(value, both(kind)):
                raise TypeError(argument_message(self, name, f"{expected}, new in each call", value))
            if value is not None:
                check_callable(self, name, value, f"{expected}, or None")


def check_pilots(pilots: Any) -> Pilots | None:
    """Check the argument ``pilots`` of ``attribute``.

    Args:
        pilots: what was passed.

    Returns:
        The request; None for none.

    Raises:
        TypeError: if it is neither a number nor a request.
        ValueError: if it is no number of at least 1.

    Example:
        >>> check_pilots(2).count
        2
        >>> check_pilots("two")
        Traceback (most recent call last):
        ...
        TypeError: Expected argument `pilots` of attribute to be an integer >= 1, Pilots(...) or None, but got 'two'.
    """
    if pilots is None or isinstance(pilots, Pilots):
        return pilots
    if isinstance(pilots, bool) or not hasattr(pilots, "__index__"):
        raise TypeError(argument_message("attribute", "pilots", "an integer >= 1, Pilots(...) or None", pilots))
    count = check_int("attribute", "pilots", pilots, minimum=1, remedy="For no pilots, leave it out.")
    return Pilots(count)


def pilot_epochs(epochs: int, steps: int, module: Any) -> int:
    """Choose the length of a pilot.

    Returns epochs, at least 1.

    Example:
        >>> [pilot_epochs(*run, None) for run in ((40, 1800), (20, 460), (20, 60), (1, 9))]
        [7, 6, 10, 1]
    """
    text = isinstance(getattr(module, "model_output", None), LanguageModel)
    share = round(epochs * (_TEXT_SHARE if text else _SHARE))
    enough = math.ceil(_STEPS * epochs / steps)
    return max(1, share, min(enough, round(epochs * _MOST)))
