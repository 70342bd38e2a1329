"""Who works on what: claim files in a directory that processes and machines share.

A claim ``name`` is a file ``name.0``, created whole and only if it is not there. Whoever finds it left by a dead
process creates ``name.1``, and so on: nothing is ever deleted but by its owner, when the work is done, so that two who
find the same dead claim cannot both have it.
"""

from __future__ import annotations

import json
import os
import platform
import time
import uuid
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from typing_extensions import Self

from lightning_attr.files import write_bytes

__all__ = ["Claim", "Claims", "create_once"]

STALE_AFTER = 600.0
"""Seconds without a sign of life after which a claim is void; a training step is expected to take less."""
_BEAT = 20.0
"""Seconds between signs of life."""
_TOKEN = uuid.uuid4().hex
"""Tells this process from an earlier one with its id, as restarted containers have."""


def create_once(path: Path, content: bytes) -> bool:
    """Create a file with its content, unless it is there.

    Args:
        path: where.
        content: of the file.

    Returns:
        Whether this call created it; of several at the same time one does.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     create_once(Path(folder) / "a", b"1"), create_once(Path(folder) / "a", b"2")
        (True, False)
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.1.tmp")
    write_bytes(temporary, content)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        try:
            with path.open("xb") as file:
                file.write(content)
        except FileExistsError:
            return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


class Claim:
    """The right to do a piece of work; a context that gives it back.

    Args:
        folder: of all claims.
        name: of the work.
        number: how many owners died before.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with Claims(Path(folder)).take("a") as claim:
        ...         claim.beat()
        ...         Claims(Path(folder)).take("a") is None
        True
    """

    def __init__(self, folder: Path, name: str, number: int) -> None:
        self.folder, self.name, self.number = folder, name, number
        self.last_beat = time.monotonic()

    def beat(self) -> None:
        """Show that the work goes on; to be called often, as it does something only every so many seconds."""
        if time.monotonic() - self.last_beat > _BEAT:
            self.last_beat = time.monotonic()
            with suppress(FileNotFoundError):  # another took it over; both will write the same
                os.utime(self.folder / f"{self.name}.{self.number}")

    def release(self) -> None:
        """Give it back, with those of dead owners before."""
        for number in range(self.number + 1):  # the own one last: until then nobody takes it
            (self.folder / f"{self.name}.{number}").unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


class Claims:
    """All claims in a folder.

    Args:
        folder: where; made if it is not there.
        stale_after: seconds without a sign of life after which a claim is void.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     claim = Claims(Path(folder)).take("a")
        ...     claim.release()
        ...     Claims(Path(folder)).take("a").number
        0
    """

    def __init__(self, folder: Path, stale_after: float = STALE_AFTER) -> None:
        self.folder, self.stale_after = folder, stale_after
        folder.mkdir(parents=True, exist_ok=True)

    def take(self, name: str) -> Claim | None:
        """Claim a piece of work.

        Args:
            name: of the work.

        Returns:
            The claim; None if another has it. Whether the work is not done yet is to be checked after this, not before.
        """
        numbers = [int(file.suffix[1:]) for file in self.folder.glob(f"{name}.*")]
        last = max(numbers, default=-1)
        before = self.folder / f"{name}.{last}"
        if last >= 0 and self._alive(before):
            return None
        content = {"host": platform.node(), "pid": os.getpid(), "process": _TOKEN, "time": time.time()}
        if not create_once(self.folder / f"{name}.{last + 1}", json.dumps(content).encode()):
            return None
        claim = Claim(self.folder, name, last + 1)
        if last >= 0 and (not before.exists() or self._alive(before)):
            # The one found dead is gone: others took it over, gave it back and may have begun anew meanwhile.
            (self.folder / f"{name}.{last + 1}").unlink(missing_ok=True)
            return None
        return claim

    def _alive(self, path: Path) -> bool:
        try:
            owner, beat = json.loads(path.read_bytes()), path.stat().st_mtime
        except FileNotFoundError:
            return False
        except ValueError:  # without links there is a moment between creating and writing it
            owner, beat = {}, path.stat().st_mtime
        if owner.get("host") == platform.node() and not _runs(owner["pid"], owner["process"]):
            return False
        return self._now() - beat < self.stale_after

    def _now(self) -> float:
        """Tell the time of the file system, whose clock may differ from this machine's."""
        probe = self.folder / f".clock.{os.getpid()}.{uuid.uuid4().hex[:8]}.1.tmp"
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        return now


def _runs(pid: int, token: str) -> bool:
    """Say whether a process of this machine is there, as far as one can tell."""
    if pid == os.getpid():
        return token == _TOKEN
    if os.name == "nt":  # where signal 0 is Ctrl+C
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
