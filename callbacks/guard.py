"""What fails in recording ends the recording, in all processes together, and never the training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from lightning_attr.arguments.checks import check_choice
from lightning_attr.errors import AttributionError

T = TypeVar("T")


class Guard:
    """Lets training go on where recording can not.

    Args:
        on_error: "warn" to go on without recording, "raise" to let errors through.

    Raises:
        ValueError: if it is neither.

    Example:
        >>> failures = []
        >>> with Guard("warn").training(failures.append):
        ...     1 / 0
        >>> describe(failures[0])
        'ZeroDivisionError: division by zero.'
    """

    def __init__(self, on_error: str) -> None:
        check_choice("AttributionCallback", "on_error", on_error, ("warn", "raise"))
        self.on_error = on_error

    @contextmanager
    def training(self, stand_down: Callable[[Exception], None]) -> Iterator[None]:
        """Keep errors away from the training; an interruption by the user is none."""
        try:
            yield
        except Exception as error:
            if self.on_error == "raise":
                raise
            stand_down(error)

    @staticmethod
    def together(step: Callable[[], T]) -> T:
        """Run a step that each process does by itself; no process goes on before all have come through.

        Unlike :meth:`lightning_attr.attribution.processes.Processes.together`, all meet after a failure, too, and can
        meet again: the training goes on.

        Returns what the step returns.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return step()
        failure: Exception | None = None
        try:
            result = step()
        except Exception as error:  # raised below: the others wait to hear of it
            failure = error
        failures: list[str | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(failures, None if failure is None else describe(failure))
        if failure is not None:
            raise failure
        for rank, text in enumerate(failures):
            if text is not None:
                raise AttributionError(f"In process {rank}: {text}")
        return result


def describe(error: Exception) -> str:
    """Put an error into words.

    Returns its message as a sentence, with its class if it is none of this package.

    Example:
        >>> describe(AttributionError("No label.")), describe(KeyError("x"))
        ('No label.', "KeyError: 'x'.")
    """
    text = str(error) if isinstance(error, AttributionError) else f"{type(error).__name__}: {error}"
    return text if text.rstrip().endswith((".", "!", "?")) else f"{text.rstrip()}."
