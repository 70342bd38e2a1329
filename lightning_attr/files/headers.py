"""The header of a tensor file: which file of which store it is, the hash of its content, and a hash of the header.

All of it is one text of JSON in the file's metadata, as safetensors writes several entries in any order: files of equal
content are equal byte by byte.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from lightning_attr.errors import CorruptedStoreError

_ENTRY, _CONTENT, _SEAL = "lightning_attr", "sha256", "header_sha256"


def header_of(metadata: Mapping[str, str], content: str) -> dict[str, str]:
    """Complete what a file says about itself.

    Returns the metadata of the file: the same with both hashes.
    """
    header = {**metadata, _CONTENT: content}
    return {_ENTRY: json.dumps({**header, _SEAL: config_digest(header)}, sort_keys=True)}


def check_header(metadata: Mapping[str, str] | None, place: Mapping[str, str]) -> Mapping[str, str]:
    """Check that a header is as it was written, and that its file is the one that belongs in its place.

    Returns what the file says about itself.

    Example:
        >>> check_header(header_of({"kind": "weights", "store": "a"}, "ab"), {"kind": "weights", "store": "b"})
        Traceback (most recent call last):
        ...
        lightning_attr.errors.CorruptedStoreError: is not the file that belongs here: it is of store a, not b.
    """
    own = _sealed((metadata or {}).get(_ENTRY, ""))
    if own is None:
        raise CorruptedStoreError(
            "is damaged: its header does not match its checksum, or was not written by this version of lightning_attr."
        )
    if "kind" in place and "kind" not in own:
        raise CorruptedStoreError(f"is not the file that belongs here: it does not say to be {place['kind']}.")
    different = [name for name in place if name in own and own[name] != place[name]]
    if different:
        name = different[0]
        raise CorruptedStoreError(
            f"is not the file that belongs here: it is of {name} {own[name][:80]}, not {place[name][:80]}."
        )
    return own


@lru_cache(1024)  # shards are read again and again
def _sealed(entry: str) -> Mapping[str, str] | None:
    """What the entry says without its seal; None where that does not match."""
    own = _parsed(entry)
    seal = own.pop(_SEAL, None)
    return MappingProxyType(own) if _CONTENT in own and seal == config_digest(own) else None


def _parsed(entry: str) -> dict[str, str]:
    """Texts by name; nothing where the entry is anything else."""
    try:
        found = json.loads(entry)
    except (ValueError, RecursionError):
        return {}
    fits = isinstance(found, dict) and all(isinstance(value, str) for value in found.values())
    return found if fits else {}


def config_digest(config: Any) -> str:
    """Hash plain values.

    Returns a SHA-256 in hexadecimal; it does not depend on the order of mappings.

    Example:
        >>> config_digest({"a": 1, "b": 2}) == config_digest({"b": 2, "a": 1})
        True
    """
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
