"""Files that are whole or absent: written beside their place, flushed, then renamed."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_attr.errors import AttributionError, CorruptedStoreError
from lightning_attr.files.headers import check_header, header_of
from lightning_attr.files.paths import check_regular

RESTORE = "Restore it from a copy, or start afresh in another directory."
"""What to do about a damaged file that nothing else holds."""
_UNREADABLE = (SafetensorError, OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, MemoryError)
"""What safetensors and torch raise where a header makes no sense: a dtype of a later version, a shape without end."""


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file at once: a reader, or a run after a crash, sees all of it or nothing."""
    with whole_file(path) as temporary:
        temporary.write_bytes(data)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write tensors as safetensors, with a digest of their content in the header, and one of the header itself."""
    own: dict[str, Tensor] = {}
    storages = set()
    for name, tensor in tensors.items():
        own[name] = tensor.detach().cpu().contiguous()
        if own[name].untyped_storage().data_ptr() in storages:  # safetensors refuses tensors that share memory
            own[name] = own[name].clone()
        storages.add(own[name].untyped_storage().data_ptr())
    content = digest(own)
    with whole_file(path) as temporary:
        safetensors.torch.save_file(own, temporary, header_of(metadata or {}, content))
    return content


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside the wanted one; on success flush it to the disk and rename it.

    Yields where to write it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with whole_file(Path(folder) / "a") as temporary:
        ...         _ = temporary.write_bytes(b"text")
        ...     (Path(folder) / "a").read_bytes()
        b'text'
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors writes files that nobody else may read, whatever the umask
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise AttributionError(
            f"Could not write {path}: {error}. {_space(path)}What was stored before is intact: make room, or choose "
            "another directory, and run again to go on from here."
        ) from error
    finally:
        with suppress(OSError):  # what went wrong before is what matters
            temporary.unlink()


def read_tensors(
    path: Path,
    expected: str | None = None,
    remedy: str = "",
    hashed: bool = True,
    place: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """Read tensors and check them against their digest.

    Returns name -> tensor, on the CPU, mapped from the file where the platform allows.
    """
    try:
        check_regular(path)
        with safe_open(path, framework="pt") as file:
            header = check_header(file.metadata(), place or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no iterator of its own
        found = digest(tensors) if hashed else header["sha256"]
    except FileNotFoundError as error:
        if path.exists():  # what safetensors says of files that may not be read
            raise CorruptedStoreError(f"{path} cannot be opened. See to its permissions. {remedy}".strip()) from error
        raise CorruptedStoreError(f"{path} is missing. {remedy}".strip()) from error
    except PermissionError as error:
        raise CorruptedStoreError(f"{path} may not be read: {error}. See to its permissions.") from error
    except CorruptedStoreError as error:
        raise CorruptedStoreError(f"{path} {error} {remedy}".strip()) from error
    except _UNREADABLE as error:
        raise CorruptedStoreError(f"{path} is truncated or damaged ({error}). {remedy}".strip()) from error
    if found != (expected or header["sha256"]):
        raise CorruptedStoreError(f"{path} is damaged: its content does not match its checksum. {remedy}".strip())
    return tensors


def remains(folder: Path) -> list[Path]:
    """Find what writers that were killed left behind.

    Returns temporary files, our own and those of safetensors.
    """
    return sorted([*folder.rglob(".*.[0-9]*.tmp"), *folder.rglob(".tmp??????")])


def move_aside(path: Path, target: Path) -> None:
    """Move a file or folder, if it is there, to a place that nothing occupies.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_bytes(Path(folder) / "a", b"text")
        ...     write_bytes(Path(folder) / "b", b"other")
        ...     move_aside(Path(folder) / "a", Path(folder) / "b")
        ...     sorted(file.name for file in Path(folder).iterdir())
        ['b', 'b+']
    """
    if path.exists():
        while target.exists():
            target = target.with_name(target.name + "+")
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)


def link_tree(source: Path, target: Path) -> None:
    """Repeat a folder elsewhere; its files are linked where the file system allows, else copied.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_bytes(Path(folder) / "a" / "file", b"text")
        ...     link_tree(Path(folder) / "a", Path(folder) / "b")
        ...     (Path(folder) / "b" / "file").read_bytes()
        b'text'
    """
    shutil.copytree(source, target, copy_function=link_file)


def link_file(source: Path | str, target: Path | str) -> None:
    """Repeat a file elsewhere; it is linked where the file system allows, else copied.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_bytes(Path(folder) / "a", b"text")
        ...     link_file(Path(folder) / "a", Path(folder) / "b")
        ...     (Path(folder) / "b").read_bytes()
        b'text'
    """
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Hash names, dtypes, shapes and content of tensors.

    Returns a SHA-256, in hexadecimal; it does not depend on the order.
    """
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        if tensor.numel():
            total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _space(path: Path) -> str:
    folder = next((parent for parent in path.parents if parent.exists()), None)
    return f"{shutil.disk_usage(folder).free:,} bytes are free there. " if folder is not None else ""


def file_state(path: Path) -> tuple[int, int, int] | None:
    """Tell one written file from another without reading it.

    Returns what changes when it is written anew; None if there is none.

    Example:
        >>> file_state(Path("no such file")) is None
        True
    """
    try:
        info = path.stat()
    except OSError:
        return None
    return info.st_ino, info.st_mtime_ns, info.st_size


def link_files(files: Iterable[Path], root: Path, target: Path) -> None:
    """Link files into another directory, at the same places below it."""
    for file in files:
        place = target / file.relative_to(root)
        place.parent.mkdir(parents=True, exist_ok=True)
        link_file(file, place)
