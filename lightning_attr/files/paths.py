"""Names and places inside a directory that may come from a stranger: nothing leads out of it."""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path

from lightning_attr.errors import CorruptedStoreError

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_=.,+-]{0,99}")
_MOST_PARTS = 10
_RESERVED = {"con", "prn", "aux", "nul", *(f"{name}{i}" for name in ("com", "lpt") for i in range(1, 10))}
"""Names of devices under Windows, with any suffix."""


def check_key(key: object) -> str:
    """Check the name of a snapshot, which is part of a path."""
    parts = key.split("/") if isinstance(key, str) else []
    fits = 0 < len(parts) <= _MOST_PARTS and all(
        _PART.fullmatch(part) and not part.endswith(".") and part.lower().split(".")[0] not in _RESERVED
        for part in parts
    )
    if not fits:
        shown = repr(key)
        raise ValueError(
            f"Expected the name of a snapshot to be letters, digits and _=.,+- (at most 100, with / between up to "
            f"{_MOST_PARTS} parts), but got {shown if len(shown) <= 120 else shown[:120] + '...'}."
        )
    return str(key)


def inside(root: Path, *parts: str) -> Path:
    """Place a file or folder below a directory, and see that no link leads out of it.

    Returns the path, which need not exist.
    """
    path = root.joinpath(*parts)
    if _is_plain(root, "/".join(parts)):
        return path
    top = os.path.realpath(root)
    try:
        real = os.path.realpath(path, strict=True)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise CorruptedStoreError(f"{path} leads to itself, by a link. Put the files there.") from error
        real = os.path.realpath(path)  # it is not there yet, or not all of the way
    if real != top and not real.startswith(top.rstrip(os.sep) + os.sep):
        raise CorruptedStoreError(
            f"{path} leads out of its directory, to {real}: what is stored is read and written only inside {root}. Put "
            "the files themselves in the place of the link."
        )
    return path


def _is_plain(root: Path, below: str) -> bool:
    """Whether a path goes straight down without a link, which is quick to see."""
    place = str(root)
    for part in below.split("/"):
        place = f"{place}{os.sep}{part}"
        if part in {"", ".", ".."} or "\\" in part or ":" in part or os.path.islink(place):  # noqa: PTH114 - a third of the time
            return False
    return True


def is_there(path: Path) -> bool:
    """See whether a file or folder is there; what cannot be looked at is not said to be missing.

    Example:
        >>> is_there(Path("no such folder", "file"))
        False
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise CorruptedStoreError(
            f"{path} cannot be looked at: {error}. See to the permissions of its folder."
        ) from error
    return True


def names_in(folder: Path) -> list[str]:
    """List the names in a folder.

    Returns none where it is missing.

    Example:
        >>> names_in(Path("no such folder"))
        []
    """
    try:
        return sorted(path.name for path in folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CorruptedStoreError(
            f"{folder} cannot be listed: {error}. See that it is a folder, and to its permissions."
        ) from error


def read_regular(path: Path, most: int) -> bytes:
    """Read a file that may be anything."""
    check_regular(path, most)
    return path.read_bytes()


def check_regular(path: Path, most: int | None = None) -> int:
    """Refuse what is no file of a sensible size, before it is opened.

    Returns its size in bytes.
    """
    info = path.stat()
    if not stat.S_ISREG(info.st_mode):
        raise ValueError("it is no regular file")
    if most is not None and info.st_size > most:
        raise ValueError(f"it has {info.st_size:,} bytes, where {most:,} are the most that make sense")
    return info.st_size


def regular_files(root: Path, folder: str) -> list[Path]:
    """List the files of a folder and below, of which none may be a link or anything else."""
    found = []
    for place, folders, files in os.walk(inside(root, folder)):
        for name in [*folders, *files]:
            path = Path(place) / name
            mode = path.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise CorruptedStoreError(
                    f"{path} is a link or no regular file, which is not copied. Put the file there, or delete it."
                )
        found += [Path(place) / name for name in files]
    return sorted(found)
