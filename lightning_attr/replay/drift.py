"""How far a replay is from what was recorded."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_attr.replay.state import RunState


def largest_drift(found: RunState, recorded: RunState) -> tuple[str, float]:
    r"""Compare parameters and buffers with those of a snapshot.

    Returns the name of the tensor that differs most, and :math:`|x - x_0| / |x_0|` of it; 0.0 if all are the same to
    the last bit.

    Example:
        >>> states = [RunState.begin({"w": torch.tensor([value])}, {}) for value in (1.5, 1.0)]
        >>> largest_drift(*states)
        ('w', 0.5)
    """
    drifts = {
        name: _drift(tensor, kept[name])
        for own, kept in zip(found[:2], recorded[:2], strict=True)
        for name, tensor in own.items()
    }
    worst = max(drifts, key=lambda name: drifts[name])
    return worst, drifts[worst]


def _drift(found: Tensor, recorded: Tensor) -> float:
    if torch.equal(found, recorded):
        return 0.0
    difference = torch.linalg.vector_norm((found - recorded).double()).item()
    length = torch.linalg.vector_norm(recorded.double()).item()
    ratio = difference / max(length, 1e-12)
    return ratio if ratio == ratio else float("inf")
