"""JSON files in which a changed byte is found: the last field is a hash of all text before it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_attr.errors import CorruptedStoreError
from lightning_attr.files.io import RESTORE, write_bytes
from lightning_attr.files.paths import inside, read_regular

_MOST_BYTES = 2**28
_SEAL = re.compile(rb',\n "sha256": "([0-9a-f]{64})"\n}\Z')


def seal(record: Mapping[str, Any]) -> bytes:
    """Write a record as JSON, with a hash of its text in the last field, ``sha256``.

    Returns the content of a file.
    """
    body = json.dumps(record, indent=1).encode().removesuffix(b"\n}")
    return body + f',\n "sha256": "{hashlib.sha256(body).hexdigest()}"\n}}'.encode()


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record, at once; see :func:`seal`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_record(Path(folder) / "a", {"format": 1, "seed": 3})
        ...     read_record(Path(folder) / "a", "ground truth", 1)
        {'format': 1, 'seed': 3}
    """
    write_bytes(path, seal(record))


def read_record(path: Path, what: str, version: int, remedy: str = RESTORE) -> dict[str, Any]:
    """Read what :func:`write_record` wrote; its fields are still to be checked.

    Returns the record, without its hash.
    """
    try:
        content = read_regular(inside(path.parent, path.name), _MOST_BYTES)
        record: dict[str, Any] = json.loads(content.decode("utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CorruptedStoreError(f"{path.parent} holds no {what}: {path.name} is missing.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptedStoreError(f"{path} is damaged: {error}. {remedy}") from error
    found = record.get("format") if isinstance(record, dict) else None
    if found != version or isinstance(found, bool):
        raise CorruptedStoreError(
            f"{path} has the format {str(found)[:20] if not isinstance(found, str) else repr(found[:20])}, but this "
            f"version of lightning_attr reads {version}. Write it anew, in another directory."
        )
    tail = _SEAL.search(content)
    if tail is None or hashlib.sha256(content[: tail.start()]).hexdigest().encode() != tail[1]:
        raise CorruptedStoreError(
            f"{path} is damaged: its text does not match its checksum, so it was changed after it was written. {remedy}"
        )
    del record["sha256"]
    return record
