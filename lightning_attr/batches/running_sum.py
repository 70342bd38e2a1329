"""Running sums on devices that have them in no fixed order."""

from __future__ import annotations

import torch
from torch import Tensor


def running_sum(values: Tensor) -> Tensor:
    """Sum up along the last dimension; on the CPU where ``torch.use_deterministic_algorithms`` forbids it on a device.

    Shapes: values (..., n). Returns the same shape, dtype and device.
    """
    if torch.are_deterministic_algorithms_enabled() and values.device.type != "cpu":
        return values.cpu().cumsum(-1).to(values.device)
    return values.cumsum(-1)
