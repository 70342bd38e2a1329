"""Scores in a directory: tensors, and beside them a sealed record of what they are, which knows the tensors' hash."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_attr.errors import CorruptedStoreError
from lightning_attr.files.fields import Check, checked, one_of, pairs, sha256, text
from lightning_attr.files.io import read_tensors, write_tensors
from lightning_attr.files.paths import inside
from lightning_attr.files.sealed_records import read_record, write_record

FORMAT = 1
REMEDY = "Save the result again, or restore it from a copy."
"""What to do about a damaged result."""
_FIELDS: dict[str, Check] = {
    "kind": one_of("matrix", "top", "reranked"),
    "content": sha256,
    "provenance": pairs(text(), lambda value: value),
}
_RECORD = "scores.json"
_FILES = {"matrix": "scores.safetensors", "top": "top_scores.safetensors", "reranked": "reranked_scores.safetensors"}


def save_scores(folder: Path, kind: str, tensors: Mapping[str, Tensor], provenance: Mapping[str, Any]) -> None:
    """Write scores; those that were there before are replaced.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_scores(Path(folder), "matrix", {"values": torch.ones(1, 1)}, {"method": "trak"})
        ...     load_scores(Path(folder), "matrix", {"values": (2, True)})
        ({'values': tensor([[1.]])}, {'method': 'trak'})
    """
    content = write_tensors(folder / _FILES[kind], tensors, {"kind": f"scores ({kind})"})
    write_record(folder / _RECORD, {"format": FORMAT, "kind": kind, "content": content, "provenance": dict(provenance)})
    for other in _FILES.keys() - {kind}:
        (folder / _FILES[other]).unlink(missing_ok=True)  # of a result that was here before


def saved_scores(folder: Path) -> dict[str, Any]:
    """Read what is known of saved scores.

    Returns their ``kind``, the hash of their ``content``, and their ``provenance``.
    """
    path = folder / _RECORD
    record = read_record(path, "scores", FORMAT, REMEDY)
    try:
        for name, check in _FIELDS.items():
            checked(name, record.get(name), check)
    except ValueError as error:
        raise CorruptedStoreError(f"{path} is damaged: {error}. {REMEDY}") from error
    return record


def load_scores(
    folder: Path, kind: str, expected: Mapping[str, tuple[int, bool]], optional: frozenset[str] = frozenset()
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save_scores` wrote.

    Returns the tensors, mapped from the file, and the provenance.
    """
    record = saved_scores(folder)
    if record["kind"] != kind:
        raise CorruptedStoreError(
            f"{folder} holds scores of the kind {record['kind']!r}, not {kind!r}. `AttributionResult.load` reads all."
        )
    path = inside(folder, _FILES[kind])
    tensors = read_tensors(path, record["content"], REMEDY, place={"kind": f"scores ({kind})"})
    check_tensors(path, tensors, expected, optional)
    return tensors, record["provenance"]


def check_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, tuple[int, bool]],
    optional: frozenset[str] = frozenset(),
) -> None:
    """Refuse tensors of other names, dimensions or kinds than a file must have.

    Example:
        >>> import torch
        >>> check_tensors(Path("a"), {"loss": torch.ones(2)}, {"loss": (1, True)})
    """
    for name in tensors.keys() | expected.keys() - optional:
        shape, found = expected.get(name), tensors.get(name)
        fits = found is not None and shape == (found.ndim, found.dtype.is_floating_point)
        if not fits or (found is not None and found.dtype.is_complex):
            shown = "nothing" if found is None else f"shape {tuple(found.shape)} of {found.dtype}"
            kind = "nothing" if shape is None else f"{shape[0]} dimensions of {'real' if shape[1] else 'whole'} numbers"
            raise CorruptedStoreError(f"{path} is damaged: `{name[:80]}` has {shown}, where {kind} belongs. {REMEDY}")
