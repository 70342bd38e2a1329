"""What a replay of a run needs to know beside its steps: optimizers, their groups, clipping, how samples are read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import lightning as L
from torch.optim import Optimizer


def replay_settings(trainer: L.Trainer, module: L.LightningModule, loader: Any) -> dict[str, Any]:
    """Describe how a run takes its steps, in plain values.

    Returns ``optimizers`` (``kind``, the class with its module, and ``groups`` with ``parameters``, their names, and
    ``settings`` at the start), ``clip_value`` and ``clip_algorithm``, ``automatic_optimization`` and ``num_workers``.
    """
    algorithm = trainer.gradient_clip_algorithm
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {
        "optimizers": [_optimizer(optimizer, names) for optimizer in trainer.optimizers],
        "clip_value": None if trainer.gradient_clip_val is None else float(trainer.gradient_clip_val),
        "clip_algorithm": None if algorithm is None else str(algorithm.value),
        "automatic_optimization": bool(module.automatic_optimization),
        "precision": str(trainer.precision),
        "num_workers": int(getattr(loader, "num_workers", 0)),
    }


def _optimizer(optimizer: Optimizer, names: Mapping[int, str]) -> dict[str, Any]:
    kind = type(optimizer)
    groups = [
        {
            "parameters": [names.get(id(parameter)) for parameter in group["params"]],
            "settings": {name: _plain(value) for name, value in group.items() if name != "params" and _fits(value)},
        }
        for group in optimizer.param_groups
    ]
    return {"kind": f"{kind.__module__}.{kind.__qualname__}", "groups": groups}


def _fits(value: Any) -> bool:
    value = _plain(value)
    if isinstance(value, list):
        return all(_fits(item) for item in value)
    return value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value))


def _plain(value: Any) -> Any:
    """Tensors of one number as that number, tuples as lists."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value
