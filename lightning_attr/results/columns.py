"""What the columns of a result are: one entry a sample, of one kind of numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_attr.arguments.checks import check_tensor
from lightning_attr.arguments.messages import argument_message

_KINDS = {"float": "floating-point numbers", "int": "whole numbers", "bool": "True and False"}

_COLUMNS = {
    **dict.fromkeys(("self_influence", "loss"), "float"),
    **dict.fromkeys(("labels", "exposure"), "int"),
    **dict.fromkeys(("noise_mask", "trained_on"), "bool"),
}


def check_columns(result: object, n_train: int) -> None:
    """Check the columns of an :class:`AttributionResult`, of which self-influence and loss are always there."""
    for name, kind in _COLUMNS.items():
        check_column(result, name, n_train, kind, needed=name in {"self_influence", "loss"})


def check_column(owner: object, name: str, size: int, kind: str, needed: bool = False) -> None:
    """Check the attribute ``name`` of ``owner``: ``(size,)``, a "float", "int" or "bool"; None unless needed."""
    column: Tensor | None = getattr(owner, name)
    if column is None and not needed:
        return
    check_tensor(owner, name, column, f"({size},)")
    assert column is not None  # just checked
    if column.shape != (size,):
        raise ValueError(argument_message(owner, name, f"a tensor of shape ({size},)", column))
    found = "bool" if column.dtype == torch.bool else "float" if column.dtype.is_floating_point else "int"
    if found != kind:
        raise TypeError(argument_message(owner, name, f"a tensor of {_KINDS[kind]} of shape ({size},)", column))
