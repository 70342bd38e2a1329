"""Metrics of torchmetrics in a step that runs on few samples: some need two, and raise where only one goes through."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torchmetrics import Metric

_CALLS = ("forward", "update", "compute")


@contextmanager
def answered_metrics(metrics: Sequence[tuple[str, Metric]], failed: dict[str, str]) -> Iterator[None]:
    """Answer with NaN where metrics raise: a step that only reports them goes on, and a loss of them becomes NaN.

    Shapes: metrics (name, metric).

    Example:
        >>> from torchmetrics import R2Score
        >>> r2, failed = R2Score(), {}
        >>> with answered_metrics([("r2", r2)], failed):
        ...     r2(torch.ones(1), torch.ones(1))
        tensor(nan)
        >>> failed
        {'r2': 'ValueError: Needs at least two samples to calculate r2 score.'}
    """
    calls = [(metric, _Answered(name, metric, failed)) for name, metric in metrics]
    before = [{name: vars(metric)[name] for name in _CALLS if name in vars(metric)} for metric, _ in calls]
    for metric, answered in calls:
        vars(metric).update({name: partial(answered.call, name, getattr(metric, name)) for name in _CALLS})
    try:
        yield
    finally:
        for (metric, _), kept in zip(calls, before, strict=True):
            for name in _CALLS:
                vars(metric).pop(name, None)
            vars(metric).update(kept)


class _Answered:
    """The calls of one metric; what one of its calls makes itself may raise: the outermost is answered."""

    def __init__(self, name: str, metric: Metric, failed: dict[str, str]) -> None:
        self.name = name
        self.metric = metric
        self.failed = failed
        self.depth = 0
        self.broken = False

    def call(self, which: str, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call the metric; after it has raised once, its state is not what its step expects."""
        if not self.broken:
            self.depth += 1
            try:
                return run(*args, **kwargs)
            except torch.cuda.OutOfMemoryError:
                raise
            except (ValueError, RuntimeError, IndexError, ZeroDivisionError) as error:
                if self.depth > 1:
                    raise
                self.broken = True
                self.failed[self.name] = f"{type(error).__name__}: {error}"
            finally:
                self.depth -= 1
        return None if which == "update" else torch.tensor(float("nan"), device=self.metric.device)
