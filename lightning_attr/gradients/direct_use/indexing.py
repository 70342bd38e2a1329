"""Rows taken from a table by the batch's integers, and values written into a part of each sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_attr.gradients.direct_use.use import Use, handles
from lightning_attr.gradients.factored import GatherSum, ParameterGradient


@handles("__getitem__", "index_select")
def index(use: Use) -> Any:
    """Rows of a table by integers of the batch."""
    table, ids = use.args[0], use.args[-1]
    selects = use.func.__name__ == "index_select"
    if not use.is_derived(table) or not use.is_batch(ids) or len(use.derived) > 1 or use.kwargs:
        return NotImplemented
    if ids.dtype not in {torch.int64, torch.int32} or (selects and use.args[1] != 0):
        return NotImplemented

    def rule(_: Any, ids: Tensor, backprops: Tensor) -> dict[str, ParameterGradient]:
        ids = ids.reshape(len(ids), -1).long() % len(table)
        return {"weight": GatherSum(ids, backprops.reshape(*ids.shape, -1), len(table))}

    return use.mode.attach({"weight": table}, rule, None, ids, use.run_detached())


@handles("__setitem__")
def assign(use: Use) -> Any:
    """A value written into a part of each sample: ``x[:, ...] = value``."""
    x, index, value = use.args
    first = index[0] if isinstance(index, tuple) and index else index
    whole = first is Ellipsis or (isinstance(first, slice) and first == slice(None))
    if not use.is_batch(x) or not use.is_derived(value) or not whole or len(use.derived) > 1:
        return NotImplemented
    region = x.detach()[index]
    copy = use.mode.copy(value, region.ndim) if region.shape[0] == use.mode.batch_size else None
    return NotImplemented if copy is None else use.run({id(value): copy})
