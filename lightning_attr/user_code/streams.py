"""Iterators, generators and files: what is taken from them is gone, so that calls get copies, or are told."""

from __future__ import annotations

import copy
import io
import itertools
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lightning_attr.errors import AttributionError
from lightning_attr.user_code.namespaces import Namespace, builtin_kind

# Iterators that a copy of goes on by itself, over the same items.
_COPIED = tuple(map(type, (iter([]), iter(()), iter(""), iter(range(0)), iter(range(2**70)), reversed([]))))


class HeldStream:
    """Stands in for an iterator that training reads, where reading it would take an item away.

    Args:
        name: of the iterator, in the user's terms.
        stream: the iterator.

    Example:
        >>> held = HeldStream("it", (x for x in range(3)))
        >>> next(held)
        Traceback (most recent call last):
        ...
        lightning_attr.errors.AttributionError: Attribution cannot read `it` (generator): an item taken from it is ...
    """

    def __init__(self, name: str, stream: Any) -> None:
        self._name = name
        self._stream = stream
        self._asked: AttributionError | None = None

    def __iter__(self) -> HeldStream:
        return self

    def __next__(self) -> Any:
        self._asked = AttributionError(
            f"Attribution cannot read `{self._name}` ({type(self._stream).__name__}): an item taken from it is gone, "
            "and training would see other items than without attribution. Let the sample or its batch hold what is "
            "needed, or keep a list and an index, which attribution puts back. What only training needs can stay in "
            "`training_step`: the mixin's `attribution_step` says what is attributed without it."
        )
        raise self._asked

    def __getattr__(self, name: str) -> Any:
        if name in {"send", "throw"}:
            return lambda *args: next(self)
        return getattr(self._stream, name)

    def raise_asked(self) -> None:
        """Raise what a reader was told, if it caught that."""
        if self._asked is not None:
            raise self._asked


class Streams:
    """Streams that code reaches, kept from it for some time.

    Args:
        streams: ``(name, stream)``, as :class:`lightning_attr.user_code.reachable.Reachable` lists them.
        containers: ``(name, container)``, likewise: the places where they are.

    Example:
        >>> kept = {"it": iter([1, 2, 3])}
        >>> with Streams([("it", kept["it"])], [("", kept)]).lent():
        ...     next(kept["it"])
        1
        >>> next(kept["it"])
        1
    """

    def __init__(self, streams: Sequence[tuple[str, Any]], containers: Iterable[tuple[str, Any]]) -> None:
        self._files = [stream for _, stream in streams if isinstance(stream, io.IOBase)]
        taken = (io.IOBase, HeldStream)
        named = {id(stream): (name, stream) for name, stream in streams if not isinstance(stream, taken)}
        self._places: list[tuple[Any, Any, str, Any]] = []
        if named:
            for _, container in containers:
                for key, value in _items(container):
                    if id(value) in named:
                        self._places.append((container, key, *named[id(value)]))

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Put copies in the places of what can be copied, and a :class:`HeldStream` in those of all else."""
        if not (self._places or self._files):
            yield
            return
        lent: dict[int, Any] = {}
        for container, key, name, stream in self._places:
            if id(stream) not in lent:
                lent[id(stream)] = _copy(stream) or HeldStream(name, stream)
            _put(container, key, lent[id(stream)])
        positions = [(file, file.tell()) for file in self._files if _has_position(file)]
        try:
            yield
        except Exception:
            _raise_asked(lent.values())
            raise
        finally:
            for container, key, _, stream in self._places:
                if _holds(container, key, lent[id(stream)]):
                    _put(container, key, stream)
            for file, position in positions:
                if not file.closed and file.tell() != position:
                    file.seek(position)
        _raise_asked(lent.values())


def _raise_asked(lent: Iterable[Any]) -> None:
    for held in lent:
        if isinstance(held, HeldStream):
            held.raise_asked()


def _copy(stream: Any) -> Any:
    """Give an iterator that goes on alike, where there is one that takes nothing from this one."""
    if isinstance(stream, _COPIED):
        return copy.copy(stream)
    if isinstance(stream, itertools.count):  # its copies are deprecated; what it shows is all of it
        shown = re.fullmatch(r"count\((-?\d+)(?:, (-?\d+))?\)", repr(stream))
        return None if shown is None else itertools.count(int(shown[1]), int(shown[2] or 1))
    return None


def _has_position(file: Any) -> bool:
    """Whether a file is read, from a place that can be gone back to."""
    if file.closed or not file.readable() or not file.seekable():
        return False
    try:
        file.tell()
    except OSError:  # a text file that is read line by line knows no place
        return False
    return True


def _items(container: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(container, Namespace):
        return container.values().items()
    kind = builtin_kind(container)
    if isinstance(container, dict):
        return list(kind.items(container))
    return enumerate(kind.__iter__(container)) if kind in {list, deque} else ()


def _put(container: Any, key: Any, value: Any) -> None:
    if isinstance(container, Namespace):
        container.put(key, value)
    else:
        builtin_kind(container).__setitem__(container, key, value)


def _holds(container: Any, key: Any, value: Any) -> bool:
    return any(place == key and found is value for place, found in _items(container))
