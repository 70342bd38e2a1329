"""What a batch is made of, in words: to tell targets that have no labels from those that look like training samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

_MOST = 12
"""How many entries of a batch are written out."""


def form(batch: Any, depth: int = 3) -> str:
    """Describe what a batch holds.

    Returns its containers with their keys, and the types of what they hold.
    """
    named = _named(batch)
    if depth == 0 or (named is None and not isinstance(batch, (list, tuple))):
        return _kind(batch)
    if named is not None:
        inner = [f'"{key}": {form(value, depth - 1)}' for key, value in named.items()]
        start, end = ("{", "}") if isinstance(batch, Mapping) else (f"{type(batch).__name__}(", ")")
    else:
        inner = [form(value, depth - 1) for value in batch]
        start, end = ("[", "]") if isinstance(batch, list) else ("(", ")")
    more = ["..."] if len(inner) > _MOST else []
    return start + ", ".join(inner[:_MOST] + more) + end


def same_form(batch: Any, model: Any, inside: bool = False) -> bool:
    """Say whether code that takes one batch finds in another what it needs.

    Returns True if it holds the same containers with the same entries; more keys than those of ``model`` do no harm.
    """
    wanted = _named(model)
    if wanted is not None:
        found = _named(batch)
        return found is not None and all(
            key in found and same_form(found[key], value, True) for key, value in wanted.items()
        )
    if isinstance(model, (list, tuple)):
        if not isinstance(batch, (list, tuple)):
            return False
        if inside and isinstance(model, list):
            return not batch or not model or same_form(batch[0], model[0], True)
        return len(batch) == len(model) and all(
            same_form(one, other, True) for one, other in zip(batch, model, strict=True)
        )
    return _kind(batch) == _kind(model)


def _named(batch: Any) -> Mapping[str, Any] | None:
    """What a batch keeps under names: of a mapping, a dataclass, or an object with keys such as a batch of graphs."""
    if isinstance(batch, Mapping):
        return batch
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    if callable(getattr(batch, "keys", None)) and hasattr(batch, "__getitem__"):
        return {str(key): batch[key] for key in batch.keys()}  # noqa: SIM118 - it is no mapping
    if isinstance(batch, tuple) and hasattr(batch, "_asdict"):
        return dict(batch._asdict())
    return None


def _kind(value: Any) -> str:
    """The type of one entry; numbers and tensors are told apart by nothing but that."""
    return "Tensor" if isinstance(value, Tensor) else type(value).__name__
