"""Float64 on devices that may not have it, as Apple's."""

from __future__ import annotations

import torch
from torch import Tensor


def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64.

    Returns False for Apple's, and for others that refuse.
    """
    if device.type in {"cpu", "cuda"}:
        return True
    try:
        torch.empty(0, dtype=torch.float64, device=device)
    except TypeError:
        return False
    return True


def doubled(values: Tensor) -> Tensor:
    """Give values in float64, on the CPU where their device has none."""
    return values.double() if has_float64(values.device) else values.cpu().double()
