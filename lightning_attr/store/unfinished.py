"""What a killed run left of a snapshot that no manifest lists."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_attr.files.io import remains

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

__all__ = ["clear_unfinished"]


def clear_unfinished(folder: Path, rewritten: Collection[str]) -> bool:
    """Delete temporary files, and the files that are about to be written again where nothing else is there.

    Features are another matter: they may be of other weights, so that the caller moves them aside.

    Returns whether the folder is free now.
    """
    for rest in remains(folder):
        rest.unlink()
    files = [file for file in folder.rglob("*") if not file.is_dir()]
    if not all(file.parent == folder and file.name in rewritten for file in files):
        return False
    for file in files:
        file.unlink()
    return True
