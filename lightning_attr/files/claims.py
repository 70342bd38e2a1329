"""Who works on what: claim files in a directory that processes and machines share.

A claim ``name`` is a file ``name.0``, created whole and only if it is not there. Whoever finds it left by a dead
process creates ``name.1``, and so on: nothing is ever deleted but by its owner, when the work is done, so that two who
find the same dead claim cannot both have it.

By hand: the locks of ``filelock`` are those of one machine, and tell nobody that their owner is dead.
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
from typing import Any

from typing_extensions import Self

from lightning_attr.files.io import write_bytes
from lightning_attr.files.paths import read_regular

STALE_AFTER = 600.0
"""Seconds without a sign of life after which a claim is void; a training step is expected to take less."""
_BEAT = 20.0
"""Seconds between signs of life."""
_TOKEN = uuid.uuid4().hex
"""Tells this process from an earlier one with its id, as restarted containers have."""


def create_once(path: Path, content: bytes) -> bool:
    """Create a file with its content, unless it is there.

    Returns whether this call created it; of several at the same time one does.
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

    @property
    def lost(self) -> bool:
        """Whether another process took it over, or deleted it, for want of signs of life."""
        own, after = (self.folder / f"{self.name}.{self.number + i}" for i in (0, 1))
        return not own.exists() or after.exists()

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
        trusting: whether a process of this machine keeps a claim as long as it runs, with no other sign of life.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     claim = Claims(Path(folder)).take("a")
        ...     claim.release()
        ...     Claims(Path(folder)).take("a").number
        0
    """

    def __init__(self, folder: Path, stale_after: float = STALE_AFTER, trusting: bool = False) -> None:
        self.folder, self.stale_after, self.trusting = folder, stale_after, trusting
        self._seen: dict[Path, tuple[float, float]] = {}  # last sign of life of each, and when it was first seen here
        folder.mkdir(parents=True, exist_ok=True)

    def take(self, name: str) -> Claim | None:
        """Claim a piece of work.

        Returns the claim; None if another has it. Whether the work is not done yet is to be checked after this, not
        before.
        """
        last = self._last(name)
        before = self.folder / f"{name}.{last}"
        if last >= 0 and self._alive(before):
            return None
        me = os.getpid()
        content: dict[str, object] = {
            "host": platform.node(),
            "space": _SPACE,
            "pid": me,
            "started": _started(me),
            "process": _TOKEN,
        }
        content["time"] = time.time()
        if not create_once(self.folder / f"{name}.{last + 1}", json.dumps(content).encode()):
            return None
        claim = Claim(self.folder, name, last + 1)
        if last >= 0 and (not before.exists() or self._alive(before)):
            # The one found dead is gone: others took it over, gave it back and may have begun anew meanwhile.
            (self.folder / f"{name}.{last + 1}").unlink(missing_ok=True)
            return None
        return claim

    def owner(self, name: str) -> str | None:
        """Tell who has a piece of work.

        Returns process and machine, and the age of its last sign of life; None if nobody has it.
        """
        path = self.folder / f"{name}.{self._last(name)}"
        try:
            owner, beat = _read(path), path.stat().st_mtime
        except FileNotFoundError:
            return None
        age = self._now() - beat
        when = f"{age:.0f} s ago" if age >= 0 else f"{-age:.0f} s ahead of the clock here"
        return f"process {owner.get('pid', 'unknown')} on {owner.get('host', 'an unknown machine')} ({when})"

    def last_beat(self, name: str) -> float | None:
        """Tell when the owner of a piece of work gave a sign of life.

        Returns by the clock of the file system, in seconds; None if nobody has it.
        """
        try:
            return (self.folder / f"{name}.{self._last(name)}").stat().st_mtime
        except FileNotFoundError:
            return None

    def elsewhere(self, name: str) -> bool:
        """Whether the owner is of another machine, where only its signs of life tell that it runs.

        Returns False too if nobody has it.
        """
        try:
            return not _is_here(_read(self.folder / f"{name}.{self._last(name)}"))
        except FileNotFoundError:
            return False

    def _last(self, name: str) -> int:
        numbers = [file.suffix[1:] for file in self.folder.glob(f"{name}.*")]
        return max((int(number) for number in numbers if number.isdecimal() and len(number) < 10), default=-1)

    def _alive(self, path: Path) -> bool:
        try:
            owner, beat = _read(path), path.stat().st_mtime
        except FileNotFoundError:
            return False
        if _is_here(owner):
            if not _runs(owner):
                return False
            if self.trusting and owner.get("started") is not None:
                return True
        if self._seen.get(path, (None, 0.0))[0] != beat:
            self._seen[path] = (beat, time.monotonic())
        # Its clock may be ahead: then it is our own watch that says for how long there was no sign of life.
        silence = max(self._now() - beat, time.monotonic() - self._seen[path][1])
        return silence < self.stale_after

    def _now(self) -> float:
        """Tell the time of the file system, whose clock may differ from this machine's."""
        probe = self.folder / f".clock.{os.getpid()}.{uuid.uuid4().hex[:8]}.1.tmp"
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        return now


def _read(path: Path) -> dict[str, Any]:
    """What a claim says of its owner; nothing where it makes no sense."""
    try:
        owner = json.loads(read_regular(path, 10_000))
    except (ValueError, RecursionError, PermissionError):  # without links there is a moment in which it is empty
        return {}
    return owner if isinstance(owner, dict) else {}


def _is_here(owner: dict[str, Any]) -> bool:
    """Whether an owner is of this machine, and of a container whose processes are seen from here."""
    return owner.get("host") == platform.node() and owner.get("space", _SPACE) == _SPACE


def _runs(owner: dict[str, Any]) -> bool:
    """Say whether a process of this machine is there, as far as one can tell."""
    pid = owner.get("pid")
    if not isinstance(pid, int) or not 0 < pid < 2**31:
        return False
    if pid == os.getpid():
        return bool(owner.get("process") == _TOKEN)
    if os.name == "nt":  # where signal 0 is Ctrl+C
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return owner.get("started") is None or owner["started"] == _started(pid)  # numbers of processes are used again


def _started(pid: int) -> int | None:
    """When a process began, in ticks since the machine did; None where that is not told."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def _space() -> str | None:
    """Tell containers of one machine apart, which do not see each other's processes."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return None


_SPACE = _space()
