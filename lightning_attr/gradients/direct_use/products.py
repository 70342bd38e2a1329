"""Products of the batch with matrices: a linear layer without its module, and sums of products by `einsum`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_attr.gradients.direct_use.use import Use, handles
from lightning_attr.gradients.factored import OuterSum, ParameterGradient
from lightning_attr.gradients.linear import positions, transposed_linear


@handles("matmul", "mm", "bmm", "__matmul__", "__rmatmul__")
def matmul(use: Use) -> Any:
    """A matrix, or a stack of them, from the right or from the left."""
    if len(use.derived) != 1 or len(use.rows) != 1 or not use.is_batch(use.rows[0]) or use.kwargs:
        return NotImplemented
    (x,), (value,) = use.rows, use.derived
    right = use.is_derived(use.args[0]) == (use.func.__name__ == "__rmatmul__")
    if value.ndim == 2 and x.ndim >= (2 if right else 3):

        def rule(_: Any, activations: Tensor, backprops: Tensor) -> dict[str, ParameterGradient]:
            if right:
                return {"weight": OuterSum(positions(activations), positions(backprops))}
            return {"weight": OuterSum(positions(backprops.mT), positions(activations.mT))}

        return use.mode.attach({"weight": value}, rule, None, x, use.run_detached())
    if value.ndim == 1 and right and x.ndim >= 2:
        copy = use.mode.copy(value, x.ndim)
        return NotImplemented if copy is None else (x * copy).sum(-1)
    copy = use.mode.copy(value, x.ndim) if value.ndim >= 3 else None
    return NotImplemented if copy is None else use.run({id(value): copy})


@handles("addmm")
def addmm(use: Use) -> Any:
    """``bias + x W`` for a matrix of one row per sample."""
    if use.kwargs or len(use.args) != 3:  # beta and alpha
        return NotImplemented
    bias, x, weight = use.args
    values = {local: v for local, v in {"weight": weight, "bias": bias}.items() if use.is_derived(v)}
    if len(values) != len(use.derived) or len(use.rows) != 1 or not use.is_batch(x) or bias.ndim != 1:
        return NotImplemented
    return use.mode.attach(values, transposed_linear, None, x, use.run_detached())


@handles("einsum")
def einsum(use: Use) -> Any:
    """Sums of products whose first index is the batch in every operand that depends on it, and in the result."""
    equation, operands = use.args[0], use.args[1:]
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or "->" not in equation or "." in equation:
        return NotImplemented
    left, result = equation.replace(" ", "").split("->")
    terms = left.split(",")
    batch = result[:1]
    if not batch or len(terms) != len(operands):
        return NotImplemented
    for i, (term, operand) in enumerate(zip(terms, operands, strict=True)):
        if any(operand is row for row in use.rows):
            if not use.is_batch(operand) or term[0] != batch:
                return NotImplemented
        elif batch in term:
            return NotImplemented
        elif use.is_derived(operand):
            terms[i] = batch + term
    copies = {id(value): use.mode.copy(value, value.ndim + 1) for value in use.derived}
    return use.func(f"{','.join(terms)}->{result}", *(copies.get(id(operand), operand) for operand in operands))
