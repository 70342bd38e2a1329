"""What containers hold, taken note of and put back: dicts, lists, sets, and what is kept by name."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import chain
from operator import is_
from typing import Any

from lightning_attr.user_code.namespaces import Attributes, Namespace, builtin_kind


class Contents:
    """The items of some containers, not what these hold in turn: taken note of, and put back where they have changed.

    Args:
        named: ``(name, container)``, as :class:`lightning_attr.user_code.reachable.Reachable` lists them.

    Example:
        >>> items = [1, 2]
        >>> kept = Contents([("losses", items)])
        >>> before = kept.taken()
        >>> items.append(3)
        >>> kept.put_back(before), items
        (['losses'], [1, 2])
    """

    def __init__(self, named: Sequence[tuple[str, Any]]) -> None:
        plain = [type(_own(container)) is dict for _, container in named]
        self._named = [item for item, is_plain in zip(named, plain, strict=True) if is_plain]
        self._dicts: list[dict[Any, Any]] = [_own(container) for _, container in self._named]
        self._others = [item for item, is_plain in zip(named, plain, strict=True) if not is_plain]

    def taken(self) -> tuple[list[dict[Any, Any]], list[Any]]:
        """Take note of all items."""
        return list(map(dict.copy, self._dicts)), [_items(container) for _, container in self._others]

    def same(self, before: tuple[list[dict[Any, Any]], list[Any]]) -> bool:
        """Say whether all items are what they were.

        Returns True if they are.
        """
        dicts, others = before
        now = (_items(container) for _, container in self._others)
        return _all_same(self._dicts, dicts) and all(map(_same, now, others))

    def put_back(self, before: tuple[list[dict[Any, Any]], list[Any]]) -> list[str]:
        """Put items back where they are others now; items are compared by identity, for they may be tensors.

        Returns the names of attributes that had changed; of any other container, its own.
        """
        dicts, others = before
        changed = []
        if not _all_same(self._dicts, dicts):
            for (name, container), own, held in zip(self._named, self._dicts, dicts, strict=True):
                if not _all_same([own], [held]):
                    changed += _put_back(name, container, own, held)
        for (name, container), held in zip(self._others, others, strict=True):
            now = _items(container)
            if not _same(now, held):
                changed += _put_back(name, container, now, held)
        return changed


def _own(container: Any) -> Any:
    return container.own if isinstance(container, Attributes) else container


def _items(container: Any) -> Any:
    if isinstance(container, Namespace):
        return container.values()
    kind = builtin_kind(container)
    if isinstance(container, dict):
        return dict(kind.items(container))
    return set(kind.__iter__(container)) if kind is set else [*kind.__iter__(container)]


def _all_same(now: list[dict[Any, Any]], before: list[dict[Any, Any]]) -> bool:
    """Whether all of some dicts hold the same keys and values, in one pass over all of them."""
    return (
        list(map(len, now)) == list(map(len, before))
        and all(map(is_, *(chain.from_iterable(map(dict.values, dicts)) for dicts in (now, before))))
        and all(map(is_, chain.from_iterable(now), chain.from_iterable(before)))
    )


def _same(now: Any, before: Any) -> bool:
    return bool(now == before) if isinstance(now, set) else _same_items(now, before)


def _same_items(now: Any, before: Any) -> bool:
    if len(now) != len(before):
        return False
    if isinstance(now, dict):
        return all(map(is_, now.values(), before.values())) and all(map(is_, now, before))
    return all(map(is_, now, before))


def _put_back(name: str, container: Any, now: Any, before: Any) -> list[str]:
    if not isinstance(container, Namespace):
        kind = builtin_kind(container)
        kind.clear(container)
        (kind.extend if kind in {list, deque} else kind.update)(container, before)
        return [name]
    missing = object()
    changed = [key for key in {**before, **now} if now.get(key, missing) is not before.get(key, missing)]
    for key in changed:
        if key in before:
            container.put(key, before[key])
        else:
            container.remove(key)
    return [f"{name}.{key}" if name else str(key) for key in changed]
