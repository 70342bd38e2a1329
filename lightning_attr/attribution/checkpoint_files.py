"""Lightning's checkpoint files: which ones a ``ckpt_path`` means, and what is in them. Only plain data is unpickled."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.migration import migrate_checkpoint  # type: ignore[attr-defined]  # re-exported

from lightning_attr.arguments.messages import argument_message
from lightning_attr.errors import AttributionError, CorruptedStoreError
from lightning_attr.user_code.lightning_names import both

_EXPECTED = '"best", "last", a path or URL of a checkpoint, or a list of these'
_PARTS = ("state_dict", "epoch", "global_step")


def checkpoint_paths(trainer: L.Trainer, ckpt_path: Any, owner: str) -> list[str]:
    """Say which files a ``ckpt_path`` means.

    Returns paths or URLs, in the order given.
    """
    several = isinstance(ckpt_path, Sequence) and not isinstance(ckpt_path, (str, bytes))
    wanted = list(ckpt_path) if several else [ckpt_path]
    if not wanted:
        raise ValueError(argument_message(owner, "ckpt_path", f"{_EXPECTED}, at least one", ckpt_path))
    for path in wanted:
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(argument_message(owner, "ckpt_path", _EXPECTED, path))
        if not os.fspath(path):
            raise ValueError(argument_message(owner, "ckpt_path", _EXPECTED, path))
    named = {"best": _best, "last": _last}
    return [named[path](trainer) if path in named else os.fspath(path) for path in wanted]


def read_checkpoints(paths: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """Read checkpoints that a Trainer wrote, each once; objects other than tensors and plain values are not unpickled.

    Tensors are mapped, so that files of many gigabytes stay on the disk until their weights are used.

    Returns the parts of each, in the form of the installed Lightning.
    """
    return [_read(path, folder / str(number)) for number, path in enumerate(paths)]


def _read(path: str, copied: Path) -> dict[str, Any]:
    if Path(path).is_dir():
        raise AttributionError(
            f"Expected a checkpoint file, but {path} is a directory: a sharded strategy (FSDP, DeepSpeed) writes such. "
            "Turn it into one file first, with `python -m lightning.pytorch.utilities.consolidate_checkpoint` for "
            "instance."
        )
    found = _unpickled(path, _local(path, copied))
    missing = [part for part in _PARTS if not isinstance(found, dict) or part not in found]
    if missing:
        raise AttributionError(
            f"Expected {path} to be a checkpoint that a Trainer wrote, but it lacks {', '.join(missing)}. A file of "
            "weights alone is loaded into the module; attribute that without `ckpt_path`."
        )
    return migrate_checkpoint(found)[0]


def _local(path: str, copied: Path) -> Path:
    """The file itself where it is on this machine, else a copy."""
    if Path(path).is_file():
        return Path(path)
    try:
        with fsspec.open(path, "rb") as file, copied.open("wb") as copy:
            shutil.copyfileobj(file, copy)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"There is no checkpoint {path}. Check `ckpt_path`.") from error
    return copied


def _unpickled(path: str, file: Path) -> Any:
    try:
        zipped = zipfile.is_zipfile(file)  # all but those of before 2020
        if zipped:
            _check_sums(path, file)
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        refused = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line]
        if refused:
            raise AttributionError(
                f"{path} holds objects that are not read from a file that anybody may have written: {refused[0]} If "
                "you trust it, allow their classes with `torch.serialization.add_safe_globals([...])` before."
            ) from error
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        # A file that ends too early is an invalid argument to the system; other errors of it are no damage.
        if isinstance(error, AttributionError) or (isinstance(error, OSError) and error.errno != errno.EINVAL):
            raise
        raise _damaged(path, f"{type(error).__name__}: {error}") from error


def _check_sums(path: str, file: Path) -> None:
    """Compare a file with the checksums in it, as torch does not; with ``set_crc32_options(False)`` it has none."""
    with zipfile.ZipFile(file) as parts:
        wrong = parts.testzip() if any(part.CRC for part in parts.infolist()) else None
    if wrong is not None:
        raise _damaged(path, f"the checksum of {wrong} in it does not match")


def _damaged(path: str, why: str) -> CorruptedStoreError:
    return CorruptedStoreError(f"{path} is damaged, or no checkpoint ({why}).")


def _checkpoints_of(trainer: L.Trainer, which: str) -> list[ModelCheckpoint]:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    found = [callback for callback in callbacks if isinstance(callback, both(ModelCheckpoint))]
    if not found:
        raise AttributionError(
            f'There is no {which} checkpoint: ckpt_path="{which}" asks the ModelCheckpoint of this trainer, which has '
            "none. Pass the path of a file."
        )
    return found


def _best(trainer: L.Trainer) -> str:
    paths = [callback.best_model_path for callback in _checkpoints_of(trainer, "best") if callback.best_model_path]
    if not paths:
        raise AttributionError(
            "There is no best checkpoint: the ModelCheckpoint of this trainer has saved none. Call `fit` before "
            'ckpt_path="best", or pass the path of a file.'
        )
    return paths[0]


def _last(trainer: L.Trainer) -> str:
    paths = []
    for callback in _checkpoints_of(trainer, "last"):
        folder = Path(callback.dirpath) if callback.dirpath is not None else None
        own = [callback.last_model_path] if callback.last_model_path else []
        name = f"{callback.CHECKPOINT_NAME_LAST}*{callback.FILE_EXTENSION}"
        paths += own or ([str(file) for file in folder.glob(name)] if folder is not None and folder.is_dir() else [])
    if not paths:
        raise AttributionError(
            "There is no last checkpoint: no ModelCheckpoint of this trainer has written one. Use "
            "ModelCheckpoint(save_last=True), or pass the path of a file."
        )
    return max(paths, key=lambda path: Path(path).stat().st_mtime if Path(path).exists() else 0.0)
