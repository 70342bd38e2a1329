"""What a sample is inside a batch: tensors, tuples, lists, dicts, dataclasses, nested in any way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_attr.batches.samples_apart import SamplesApart

_SHARED = "_shared_by_samples"


class _SharedList(list[Any]):
    """A list of one plain value each for something other than the samples."""


class _SharedTuple(tuple[Any, ...]):
    """Likewise."""

    __slots__ = ()


def map_tensors(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to every tensor of a batch, keeping the structure.

    Returns the same structure with the results in the tensors' places.
    """
    return apply_to_collection(batch, Tensor, function)


def shared_alias(leaf: Any) -> Any:
    """Mark a tensor or a list of plain values as one that all samples of a batch share, however long it is.

    Returns another one of the same content, which nothing here splits.

    Example:
        >>> import torch
        >>> scale = torch.ones(2)
        >>> len(batched_tensors((scale, torch.zeros(2)), 2)), len(batched_tensors((shared_alias(scale),), 2))
        (2, 0)
    """
    if isinstance(leaf, Tensor):
        alias = leaf.detach()
        setattr(alias, _SHARED, True)
        return alias
    return _SharedList(leaf) if isinstance(leaf, list) else _SharedTuple(leaf)


def map_leaves(batch: Any, function: Callable[[Any], Any]) -> Any:
    """Apply a function to all of a batch that may have one entry per sample: tensors, and lists of plain values.

    Returns the same structure with the results in their places.

    Example:
        >>> import torch
        >>> map_leaves({"x": torch.ones(2), "id": ["a", "b", "c"]}, len)
        {'x': 2, 'id': 3}
    """

    def inner(data: Any) -> Any:
        if isinstance(data, Tensor):
            return function(data)
        named = hasattr(data, "_fields")
        if len(data) and not named and all(map(_is_plain, data)):
            return function(data)
        items = [apply_to_collection(item, (Tensor, list, tuple), inner) for item in data]
        return type(data)(*items) if named else type(data)(items)

    return apply_to_collection(batch, (Tensor, list, tuple), inner)


def input_bytes(batch: Any, batch_size: int) -> tuple[int, torch.device | None]:
    """Measure what the samples of a batch hold.

    Returns bytes of the tensors of a sample, and their device; None where there are no tensors.

    Example:
        >>> import torch
        >>> input_bytes((torch.ones(2, 3), "text"), 2)
        (12, device(type='cpu'))
    """
    found: list[Tensor] = [] if isinstance(batch, SamplesApart) else batched_tensors(batch, batch_size)
    if isinstance(batch, SamplesApart):
        map_tensors(batch, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    size = sum(part.nbytes for tensor in found for part in dense_parts(tensor))
    return size // batch_size, found[0].device if found else None


def batched_tensors(batch: Any, batch_size: int) -> list[Tensor]:
    """List the tensors whose first dimension is the batch, in the order of :func:`map_tensors`.

    Returns the tensors with ``shape[0] == batch_size``, but for those that are marked as shared.
    """
    found: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        if _is_batched(tensor, batch_size):
            found.append(tensor)
        return tensor

    map_tensors(batch, collect)
    return found


def replace_tensors(batch: Any, batch_size: int, tensors: Sequence[Tensor]) -> Any:
    """Put other tensors in the places that :func:`batched_tensors` lists.

    Returns the same structure, with the other tensors.
    """
    source = iter(tensors)
    return map_tensors(batch, lambda t: next(source) if _is_batched(t, batch_size) else t)


def select_rows(batch: Any, batch_size: int, rows: Sequence[int] | Tensor) -> Any:
    """Take some samples of a batch.

    Returns the same structure with only these samples: tensors whose first dimension is the batch are indexed, and so
    are lists and tuples of one plain value (a string, a number) a sample.
    """
    if isinstance(batch, SamplesApart):
        return batch.rows(rows)
    index = rows if isinstance(rows, Tensor) else torch.tensor(rows, dtype=torch.long)

    def select(data: Any) -> Any:
        if isinstance(data, Tensor):
            return _rows_of(data, index.to(data.device)) if _is_batched(data, batch_size) else data
        if isinstance(data, (_SharedList, _SharedTuple)):
            return data
        named = hasattr(data, "_fields")
        if len(data) == batch_size and not named and all(map(_is_plain, data)):
            return type(data)(data[row] for row in index.tolist())
        items = [apply_to_collection(item, (Tensor, list, tuple), select) for item in data]
        return type(data)(*items) if named else type(data)(items)

    return apply_to_collection(batch, (Tensor, list, tuple), select)


def dense_parts(tensor: Tensor) -> list[Tensor]:
    """Give the dense tensors that hold the numbers of a tensor.

    Returns the tensor itself, or the indices and values of a sparse one.
    """
    if tensor.layout == torch.strided:
        return [tensor]
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    return dense_parts(tensor.to_sparse_coo())


def _rows_of(tensor: Tensor, index: Tensor) -> Tensor:
    if tensor.layout == torch.strided:
        return tensor[index]
    if tensor.layout == torch.sparse_coo:
        return tensor.index_select(0, index)
    rows: Tensor = tensor.to_sparse_coo().index_select(0, index).to_sparse(layout=tensor.layout)
    return rows


def join_batches(batches: Sequence[Any], sizes: Sequence[int]) -> Any:
    """Put the samples of several batches one after the other.

    Returns one batch of all: what :func:`select_rows` takes from a batch is joined, what it shares has to be equal.
    """
    first = batches[0]
    if all(isinstance(batch, SamplesApart) for batch in batches):
        return SamplesApart(one for batch in batches for one in batch)
    if len({type(batch) for batch in batches}) > 1:
        raise ValueError(_APART)
    if isinstance(first, Tensor):
        return _joined_tensors(batches, sizes)
    if isinstance(first, Mapping):
        if any(batch.keys() != first.keys() for batch in batches):
            raise ValueError(_APART)
        return type(first)({key: join_batches([batch[key] for batch in batches], sizes) for key in first})  # type: ignore[call-arg]
    if isinstance(first, (list, tuple)):
        named = hasattr(first, "_fields")
        lengths = [len(batch) for batch in batches]
        if not named and lengths == [*sizes] and all(_is_plain(value) for batch in batches for value in batch):
            return type(first)(value for batch in batches for value in batch)
        if len({*lengths}) > 1:
            raise ValueError(_APART)
        items = [join_batches(parts, sizes) for parts in zip(*batches, strict=True)]
        return type(first)(*items) if named else type(first)(items)
    if not isinstance(first, (str, bytes, int, float, type(None))) or any(batch != first for batch in batches):
        raise ValueError(_APART)
    return first


_APART = "Expected batches that differ in nothing but their samples."


def _joined_tensors(tensors: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    batched = all(_is_batched(tensor, size) for tensor, size in zip(tensors, sizes, strict=True))
    forms = {(tensor.shape[1:] if batched else tensor.shape, tensor.dtype, tensor.device) for tensor in tensors}
    if len(forms) > 1 or not (batched or all(torch.equal(tensor, tensors[0]) for tensor in tensors)):
        raise ValueError(_APART)
    return torch.cat([*tensors]) if batched else tensors[0]


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, bytes)) or not isinstance(value, (Tensor, Sequence, Mapping))


def _is_batched(tensor: Tensor, batch_size: int) -> bool:
    return tensor.ndim > 0 and tensor.shape[0] == batch_size and not getattr(tensor, _SHARED, False)


def float_tensors(batch: Any) -> list[Tensor]:
    """List the floating-point tensors of a structure.

    Returns its floating-point tensors, in the order of :func:`map_tensors`.
    """
    found: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        if torch.is_floating_point(tensor):
            found.append(tensor)
        return tensor

    map_tensors(batch, collect)
    return found


def plain_tensors(columns: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give columns as plain tensors: a library's subclass, as of its batches, goes no further."""
    return {name: v if type(v) is Tensor else v.as_subclass(Tensor) for name, v in columns.items()}
