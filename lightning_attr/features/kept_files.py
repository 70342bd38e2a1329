"""Files of what was computed at a snapshot: they may come from a stranger, so that what they hold must make sense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from torch import Tensor

from lightning_attr.errors import CorruptedStoreError
from lightning_attr.files.io import read_tensors

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
"""Name of a tensor -> its shape."""
_LARGEST = 1e150
"""What is kept is squared, and must stay finite."""
_REMEDY = "Delete it: it is computed again."


def read_kept(
    path: Path,
    place: Mapping[str, str],
    shapes: Shapes | None = None,
    optional: Sequence[Sequence[str]] = (),
) -> dict[str, Tensor]:
    """Read what was computed once."""
    tensors = read_tensors(path, remedy=_REMEDY, place=place)
    if shapes is None:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    missing = shapes.keys() - tensors.keys()
    for group in optional:
        if missing.issuperset(group):
            missing -= set(group)
    for name in sorted(missing | tensors.keys()):
        found = _wrong(tensors.get(name), shapes.get(name))
        if found is not None:
            raise CorruptedStoreError(f"{path} is damaged: `{name[:80]}` {found}. {_REMEDY}")
    return tensors


def _wrong(tensor: Tensor | None, shape: tuple[int, ...] | None) -> str | None:
    """Say what is wrong with a tensor, if anything is."""
    if tensor is None:
        return "is missing"
    if shape is None:
        return "does not belong there"
    if tuple(tensor.shape) != shape:
        return f"has the shape {tuple(tensor.shape)}, where {shape} belongs"
    if tensor.dtype.is_complex or tensor.dtype.itemsize < 2:
        return f"has the dtype {tensor.dtype}"
    if tensor.numel() and not tensor.abs().amax() < _LARGEST:
        return "holds NaN, Inf, or numbers that overflow when squared"
    return None
