"""One writer at a time: the right to write a directory, of one process, and of all that it does there."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from typing_extensions import Self

from lightning_attr.errors import AttributionError, StoreInUseError
from lightning_attr.files.claims import Claim, Claims
from lightning_attr.files.paths import inside

_NAME = "writer"
log = logging.getLogger(__name__)

_PAUSE = 1.0
_STALE_AFTER = 180.0
"""Seconds without a sign of life after which a writer on another machine is taken for dead."""


@dataclass
class _Held:
    claim: Claim
    pid: int
    users: int


_HELD: dict[str, _Held] = {}
_GUARD = threading.Lock()


class WriterLock:
    """The right to write a directory; a context that gives it back.

    It is a file in ``claims/`` that names machine and process. Within a process it can be taken again and again; the
    last one who gives it back frees it. A process of this machine that is dead loses it at once, so that a run that was
    killed goes on when it is started again. Of another machine only signs of life are seen (:meth:`beat`): without one
    for three minutes it is taken over.

    Args:
        path: the directory; made if it is not there.
        patience: whether to wait for signs of life of a writer on another machine, or to refuse at once.

    Raises:
        StoreInUseError: if another process has it.
        AttributionError: if the directory cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with WriterLock(Path(folder)), WriterLock(Path(folder)) as lock:
        ...         lock.beat()
        ...     list(Path(folder, "claims").iterdir())
        []
    """

    def __init__(self, path: Path, patience: bool = True) -> None:
        self.path, self._key = path, os.path.realpath(path)
        with _GUARD:
            held = _HELD.get(self._key)
            if held is None or held.pid != os.getpid() or held.claim.lost:
                held = _Held(self._claimed(patience), os.getpid(), 0)
                _HELD[self._key] = held
            held.users += 1
            self._held: _Held | None = held

    def _claimed(self, patience: bool) -> Claim:
        try:
            claims = Claims(inside(self.path, "claims"), _STALE_AFTER, trusting=True)
            claim = claims.take(_NAME)
            owner, first = claims.owner(_NAME), claims.last_beat(_NAME)
            if claim is None and patience and claims.elsewhere(_NAME):
                log.warning(
                    "Waiting up to %d s for a sign of life of %s, which writes %s.", _STALE_AFTER, owner, self.path
                )
                while claim is None and claims.last_beat(_NAME) in {first, None}:
                    time.sleep(_PAUSE)
                    claim = claims.take(_NAME)
        except OSError as error:
            raise AttributionError(
                f"{self.path} cannot be written ({error}). What is complete there can be attributed; to add to it, "
                "copy it to where you may write."
            ) from error
        if claim is None:
            raise StoreInUseError(
                f"{self.path} is being written by another process: {claims.owner(_NAME) or owner}. A store has one "
                "writer at a time: wait until it has ended, or choose another directory. If that process is gone, "
                f"delete the files {_NAME}.* in {claims.folder}."
            )
        return claim

    def beat(self) -> None:
        """Show that the writing goes on; to be called often, as it does something only every so many seconds."""
        if self._held is not None:
            self._held.claim.beat()

    def release(self) -> None:
        """Give it back; more than once does nothing more."""
        held, self._held = self._held, None
        if held is None or held.pid != os.getpid():
            return
        with _GUARD:
            held.users -= 1
            if held.users == 0:
                _HELD.pop(self._key, None) if _HELD.get(self._key) is held else None
                if not held.claim.lost:
                    held.claim.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


def beat(path: Path) -> None:
    """Show that this process goes on writing a directory, if it does; see :meth:`WriterLock.beat`."""
    held = _HELD.get(os.path.realpath(path))
    if held is not None:
        held.claim.beat()


class _Store(Protocol):
    path: Path
    writer: bool

    def check_there(self) -> None: ...
    def refresh(self) -> None: ...


P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound=_Store)


def one_writer(change: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Let a method change a store while no other process does, and begin with what the store is by now.

    Returns the method, under the store's :class:`WriterLock`.
    """

    @wraps(change)
    def changed(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if not self.writer:
            return change(self, *args, **kwargs)
        self.check_there()
        with WriterLock(self.path):
            self.refresh()
            return change(self, *args, **kwargs)

    return changed
