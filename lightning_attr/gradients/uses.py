"""The functions of torch in which a parameter may meet the batch, and how each sample's part in it is told apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_attr.gradients.convolution import convolution, transposed_convolution
from lightning_attr.gradients.embedding import embedding
from lightning_attr.gradients.factored import GatherSum, OuterSum, ParameterGradient
from lightning_attr.gradients.linear import linear, positions, prelu, transposed_linear
from lightning_attr.gradients.normalisation import batch_norm, group_norm, instance_norm, layer_norm, rms_norm
from lightning_attr.gradients.rules import GradientRule

__all__ = ["USES", "WITHOUT_TENSORS", "WITHOUT_VALUES", "Use", "is_in_place", "repeats_rows", "replace", "tensors_in"]


class Uses(Protocol):
    """What a use asks of the mode that sees it."""

    batch_size: int

    def copy(self, value: Tensor, ndim: int, dtype: torch.dtype | None = None) -> Tensor | None:
        """Give each sample its own copy."""

    def attach(self, values: Any, rule: GradientRule, layer: Any, x: Tensor, output: Tensor) -> Tensor:
        """Follow one use by a rule."""


@dataclass(frozen=True)
class Use:
    """One call of a function with values derived from parameters.

    Args:
        mode: what sees it.
        func: the function.
        args: its arguments.
        kwargs: its keyword arguments.
        derived: tensors among them that derive from parameters and not from the batch.
        rows: tensors among them that depend on the batch.
    """

    mode: Uses
    func: Any
    args: Any
    kwargs: Any
    derived: list[Tensor]
    rows: list[Tensor]

    def is_batch(self, tensor: Any) -> bool:
        """Tell whether an argument has a row a sample."""
        return (
            isinstance(tensor, Tensor)
            and any(tensor is row for row in self.rows)
            and tensor.ndim > 0
            and tensor.shape[0] == self.mode.batch_size
        )

    def is_derived(self, tensor: Any) -> bool:
        """Tell whether an argument derives from a parameter."""
        return any(tensor is value for value in self.derived)

    def run(self, values: dict[int, Tensor]) -> Any:
        """Call the function with other tensors in the place of some."""
        args, kwargs = replace((self.args, self.kwargs), lambda t: values.get(id(t), t))
        return self.func(*args, **kwargs)

    def run_detached(self) -> Any:
        """Call the function with constants in the place of the derived values."""
        return self.run({id(value): value.detach() for value in self.derived})


Handler: TypeAlias = Callable[[Use], Any]


def tensors_in(data: Any) -> list[Tensor]:
    """List the tensors in nested lists, tuples and dicts."""
    found = []
    for item in data.values() if isinstance(data, dict) else data:
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, (list, tuple, dict)):
            found += tensors_in(item)
    return found


def replace(data: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to the tensors in nested lists, tuples and dicts."""
    if isinstance(data, Tensor):
        return function(data)
    if isinstance(data, dict):
        return {key: replace(item, function) for key, item in data.items()}
    if type(data) in {list, tuple}:
        return type(data)(replace(item, function) for item in data)
    return data


def is_in_place(func: Any) -> bool:
    """Tell whether a function changes its first argument."""
    name = func.__name__
    return name in _AUGMENTED if name.endswith("__") else bool(name.endswith("_"))


def _broadcast(use: Use) -> Any:
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


def repeats_rows(func: Any, args: Any, kwargs: Any, single: bool) -> bool:
    """Tell whether a call without values of the batch repeats a value along a new, or single, first dimension.

    Args:
        func: the function.
        args: its arguments.
        kwargs: its keyword arguments.
        single: whether once counts, too.

    Returns:
        Whether it does.
    """
    if func.__name__ not in _REPETITIONS or not isinstance(args[0], Tensor):
        return False
    value = args[0].detach()
    output = func(value, *args[1:], **kwargs)
    before = value.shape[0] if 0 < value.ndim == output.ndim else 1
    return bool(output.ndim > 0 and (output.shape[0] != before or (single and before == 1)))


def _repeat(use: Use) -> Any:
    """Repetition along a new, or single, first dimension: that is the batch, or nothing for us."""
    value = use.args[0]
    if not use.is_derived(value):
        return NotImplemented
    output = use.run_detached()
    if output.ndim == 0 or output.shape[0] != use.mode.batch_size:
        return NotImplemented
    copy = use.mode.copy(value, output.ndim)
    if copy is None:
        return NotImplemented
    if use.func.__name__ in {"repeat", "tile"}:
        return copy.repeat(1, *(n // m for n, m in zip(output.shape[1:], copy.shape[1:], strict=True)))
    return copy.expand(output.shape)


def _expand_as(use: Use) -> Any:
    return _repeat(use) if all(use.is_batch(row) for row in use.rows) else NotImplemented


def _matmul(use: Use) -> Any:
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


def _einsum(use: Use) -> Any:
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


def _index(use: Use) -> Any:
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


def _assign(use: Use) -> Any:
    """A value written into a part of each sample: ``x[:, ...] = value``."""
    x, index, value = use.args
    first = index[0] if isinstance(index, tuple) and index else index
    whole = first is Ellipsis or (isinstance(first, slice) and first == slice(None))
    if not use.is_batch(x) or not use.is_derived(value) or not whole or len(use.derived) > 1:
        return NotImplemented
    region = x.detach()[index]
    copy = use.mode.copy(value, region.ndim) if region.shape[0] == use.mode.batch_size else None
    return NotImplemented if copy is None else use.run({id(value): copy})


def _attention(use: Use) -> Any:
    """An additive mask, such as a bias by relative position."""
    mask = use.kwargs.get("attn_mask", use.args[3] if len(use.args) > 3 else None)
    query = use.kwargs.get("query", use.args[0] if use.args else None)
    if not use.is_derived(mask) or len(use.derived) > 1 or not all(use.is_batch(row) for row in use.rows):
        return NotImplemented
    copy = use.mode.copy(mask, query.ndim)
    return NotImplemented if copy is None else use.run({id(mask): copy})


def _layer(rule: GradientRule, names: str, **constants: Any) -> Handler:
    """Make the handler of the functional form of a layer, by the rule of the layer.

    Args:
        rule: the rule.
        names: of the function's arguments, in order.
        constants: what the rule reads from the layer and the function does not take, or has as a default.

    Returns:
        The handler.
    """

    def handle(use: Use) -> Any:
        given = {**constants, **dict(zip(names.split(), use.args, strict=False)), **use.kwargs}
        x = given["input"]
        values = {local: given[local] for local in ("weight", "bias") if use.is_derived(given.get(local))}
        known = use.is_batch(x) and x.ndim >= 2 and len(use.rows) == 1 and len(values) == len(use.derived)
        if not known or given.get("training") or given.get("max_norm") or given.get("scale_grad_by_freq"):
            return NotImplemented
        weight = given.get("weight")
        if weight is not None:
            layer = {"kernel_size": weight.shape[2:], "num_embeddings": len(weight), "num_parameters": weight.numel()}
            dims = len(layer["kernel_size"])
            if "stride" in given and x.ndim != dims + 2:
                return NotImplemented  # a single sample
            for key in ("stride", "padding", "dilation"):
                if isinstance(given.get(key), int):
                    given[key] = (given[key],) * dims
            given |= layer
        if given.get("padding_idx") is not None:
            given["padding_idx"] %= len(given["weight"])
        given["training"] = given.get("use_input_stats", False)
        return use.mode.attach(values, rule, SimpleNamespace(**given), x, use.run_detached())

    return handle


def _addmm(use: Use) -> Any:
    """``bias + x W`` for a matrix of one row a sample."""
    if use.kwargs or len(use.args) != 3:  # beta and alpha
        return NotImplemented
    bias, x, weight = use.args
    values = {local: v for local, v in {"weight": weight, "bias": bias}.items() if use.is_derived(v)}
    if len(values) != len(use.derived) or len(use.rows) != 1 or not use.is_batch(x) or bias.ndim != 1:
        return NotImplemented
    return use.mode.attach(values, transposed_linear, None, x, use.run_detached())


_CONVOLUTION = "input weight bias stride padding dilation groups"
_TRANSPOSED = "input weight bias stride padding output_padding groups dilation"
_ONE = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "padding_mode": "zeros"}
_ELEMENTWISE = """
    add radd iadd sub subtract rsub isub mul multiply rmul imul div divide true_divide rdiv rtruediv truediv itruediv
    idiv pow rpow ipow float_power maximum minimum fmax fmin where addcmul addcdiv lerp masked_fill clamp clamp_min
    clamp_max clip atan2 hypot logaddexp copysign xlogy copy
"""
_AUGMENTED = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__idiv__", "__itruediv__", "__ipow__"}
_REPETITIONS = {"expand", "broadcast_to", "repeat", "tile", "repeat_interleave"}

WITHOUT_TENSORS = {
    getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_leaf")
} | {Tensor.size, Tensor.dim}
"""Functions that say something of a tensor without its values, and give no tensor."""

WITHOUT_VALUES = {"to", "type_as", "view_as", "reshape_as"}
"""Functions that take from their second argument its form only."""

USES: dict[Any, Handler] = {
    **{name: _broadcast for plain in _ELEMENTWISE.split() for name in (plain, f"{plain}_", f"__{plain}__")},
    **dict.fromkeys(_REPETITIONS, _repeat),
    "expand_as": _expand_as,
    **dict.fromkeys(("matmul", "mm", "bmm", "__matmul__", "__rmatmul__"), _matmul),
    "einsum": _einsum,
    **dict.fromkeys(("__getitem__", "index_select"), _index),
    "__setitem__": _assign,
    "addmm": _addmm,
    F.scaled_dot_product_attention: _attention,
    F.linear: _layer(linear, "input weight bias"),
    F.embedding: _layer(embedding, "input weight padding_idx max_norm norm_type scale_grad_by_freq", padding_idx=None),
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _layer(convolution, _CONVOLUTION, **_ONE)),
    **dict.fromkeys(
        (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
        _layer(transposed_convolution, _TRANSPOSED, **_ONE),
    ),
    F.layer_norm: _layer(layer_norm, "input normalized_shape weight bias eps", eps=1e-5),
    F.rms_norm: _layer(rms_norm, "input normalized_shape weight eps", eps=None),
    F.group_norm: _layer(group_norm, "input num_groups weight bias eps", eps=1e-5),
    F.batch_norm: _layer(
        batch_norm, "input running_mean running_var weight bias training momentum eps", training=False, eps=1e-5
    ),
    F.instance_norm: _layer(
        instance_norm,
        "input running_mean running_var weight bias use_input_stats momentum eps",
        running_mean=None,
        running_var=None,
        use_input_stats=True,
        eps=1e-5,
    ),
    F.prelu: _layer(prelu, "input weight"),
}
"""What is done for a function, by the function or by its name."""
