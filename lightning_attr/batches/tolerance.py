"""Tensors of two computations compared, as closely as their dtype allows."""

from __future__ import annotations

import torch
from torch import Tensor


def in_dtype(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Detach a tensor, and convert it if it is of a floating-point dtype; None keeps the dtype."""
    return tensor.detach().to(dtype) if dtype is not None and tensor.dtype.is_floating_point else tensor.detach()


def assert_close(found: list[Tensor], expected: list[Tensor], message: str) -> None:
    """Assert that tensors are the same, up to rounding in sums of their dtype; the message says by how much not."""
    for a, b in zip(found, expected, strict=True):
        error = (a - b).abs().max().item()
        scale = max(a.abs().max().item(), b.abs().max().item())
        tolerance = {torch.float64: 1e-8, torch.float32: 1e-3}.get(a.dtype, 0.1)
        assert error <= tolerance * scale + 1e-12, (
            f"{message}, but they differ by up to {error:.3g} (largest value {scale:.3g})."
        )
