"""Settings of a run's optimizers, as plain values that a store records."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer


def optimizer_settings(optimizers: Iterable[Optimizer], module: nn.Module) -> list[dict[str, Any]]:
    """List the optimizers of a run, with the settings of each parameter group.

    Returns class, as ``kind`` and ``module``, and ``groups``: name -> plain value, and the names of its ``parameters``.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> import torch
        >>> (found,) = optimizer_settings([torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)], layer)
        >>> found["kind"], found["groups"][0]["parameters"], found["groups"][0]["momentum"]
        ('SGD', ['weight'], 0.9)
    """
    names = {id(p): name for name, p in module.named_parameters()}
    return [
        {
            "kind": type(optimizer).__name__,
            "module": type(optimizer).__module__,
            "groups": [
                {
                    **{name: _plain(value) for name, value in group.items() if _known(_plain(value))},
                    "parameters": [names[id(p)] for p in group["params"] if id(p) in names],
                }
                for group in optimizer.param_groups
            ],
        }
        for optimizer in optimizers
    ]


def _plain(value: Any) -> Any:
    """Numbers of tensors, lists of tuples: a scheduler may have made the one, betas are the other."""
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value


def _known(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(part, (int, float)) and math.isfinite(part) for part in value)
    return value is None or isinstance(value, (bool, str, int)) or (isinstance(value, float) and math.isfinite(value))
