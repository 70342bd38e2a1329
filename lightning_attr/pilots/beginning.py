"""Whether a pilot begins as the run did: weights that were loaded after the constructor are not in a fresh module."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_attr.parameters.weights import weights_of

_FEW = 32
"""Numbers too few to tell two random draws from others; a constant is told from two on."""
_LOOKED_AT = 2**20
_ROUNDING, _DEVIATIONS = 1e-3, 6.0


def sizes_of_weights(module: Any) -> dict[str, list[float]]:
    """Describe the weights of a module: name -> mean and root mean square; those that are not finite are left out."""
    found = {name: _sizes(tensor) for name, tensor in weights_of(module).items() if _counts(tensor)}
    return {name: sizes for name, sizes in found.items() if all(map(math.isfinite, sizes))}


def unlike_a_fresh_one(recorded: Mapping[str, Any], module: Any) -> str | None:
    """Name a weight of the run that chance does not explain, if modules begin as this one does.

    Returns its name; None where all are as they would be.
    """
    weights = weights_of(module)
    names = (name for name in recorded if name in weights and _counts(weights[name]) and _two(recorded[name]))
    return next((name for name in names if _differs(recorded[name], weights[name])), None)


def _two(recorded: Any) -> bool:
    """Whether this is what was written: a store may come from anywhere."""
    return isinstance(recorded, list) and len(recorded) == 2 and all(isinstance(value, float) for value in recorded)


def _counts(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.numel() > 1


def _sizes(tensor: Tensor) -> list[float]:
    values = tensor.detach().float()
    return [values.mean().item(), torch.linalg.vector_norm(values).item() / math.sqrt(values.numel())]


def _differs(recorded: list[float], fresh: Tensor) -> bool:
    """Compare two draws of one distribution, whose spread the fresh one shows."""
    values, n = fresh.detach().flatten()[:_LOOKED_AT].double(), fresh.numel()
    constant = bool((values == values[0]).all())
    if n < _FEW and not constant:
        return False
    mean, size = _sizes(fresh)
    variance, fourth = values.var(correction=0).item(), values.pow(4).mean().item()
    scale = max(size, recorded[1])
    # sd of the difference of two means: sqrt(2 var / n); of two root mean squares: sqrt((E x^4 / s^4 - 1) / 2n) s
    kurtosis = fourth / size**4 if size else 1.0
    of_mean = math.sqrt(2 * variance / n)
    of_size = math.sqrt(max(0.0, kurtosis - 1) / (2 * n)) * size
    far_mean = abs(recorded[0] - mean) > _ROUNDING * scale + _DEVIATIONS * of_mean
    return far_mean or abs(recorded[1] - size) > _ROUNDING * scale + _DEVIATIONS * of_size
