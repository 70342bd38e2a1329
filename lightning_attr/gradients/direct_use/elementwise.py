"""Elementwise functions: each sample has its own copy of the value, aligned to the batch from the right."""

from __future__ import annotations

from typing import Any

import torch

from lightning_attr.gradients.direct_use.use import Use, handles, is_in_place

_ELEMENTWISE = """
    add radd iadd sub subtract rsub isub mul multiply rmul imul div divide true_divide rdiv rtruediv truediv itruediv
    idiv pow rpow ipow float_power maximum minimum fmax fmin where addcmul addcdiv lerp masked_fill clamp clamp_min
    clamp_max clip atan2 hypot logaddexp copysign xlogy copy
"""
_NAMES = [name for plain in _ELEMENTWISE.split() for name in (plain, f"{plain}_", f"__{plain}__")]


@handles(*_NAMES)
def broadcast(use: Use) -> Any:
    """Elementwise functions: operands are aligned from the right, and the largest has the batch in front."""
    ndim = max(t.ndim for t in (*use.derived, *use.rows))
    widest = [row for row in use.rows if row.ndim == ndim]
    elsewhere = is_in_place(use.func) and not any(use.args[0] is row for row in use.rows)
    if elsewhere or not widest or not any(use.is_batch(row) for row in widest):
        return NotImplemented
    copies = {}
    for value in use.derived:
        # A scalar tensor takes part in no promotion of types; its copies would.
        dtype = torch.result_type(widest[0], value) if value.ndim == 0 and value.dtype != widest[0].dtype else None
        copy = use.mode.copy(value, ndim, dtype)
        if copy is None:
            return NotImplemented
        copies[id(value)] = copy
    return use.run(copies)
