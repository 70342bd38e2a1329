"""Attention with a mask that is added and learned, such as a bias by relative position."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from lightning_attr.gradients.direct_use.use import Use, handles


@handles(F.scaled_dot_product_attention)
def attention_mask(use: Use) -> Any:
    """An additive mask, such as a bias by relative position."""
    mask = use.kwargs.get("attn_mask", use.args[3] if len(use.args) > 3 else None)
    query = use.kwargs.get("query", use.args[0] if use.args else None)
    if not use.is_derived(mask) or len(use.derived) > 1 or not all(use.is_batch(row) for row in use.rows):
        return NotImplemented
    copy = use.mode.copy(mask, query.ndim)
    return NotImplemented if copy is None else use.run({id(mask): copy})
