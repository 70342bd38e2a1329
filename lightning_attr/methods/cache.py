"""What methods compute of a snapshot once and use for many targets: a cache whose keys know the type of the value."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class CacheKey(Generic[T]):
    """Name of values of type ``T`` in a :class:`SnapshotCache`.

    Args:
        name: of the values.
        settings: what one of them depends on.

    Example:
        >>> KERNEL: CacheKey[float] = CacheKey("kernel")
        >>> KERNEL.at(0.1) == KERNEL.at(0.1), KERNEL.at(0.1) == KERNEL.at(1.0)
        (True, False)
    """

    name: str
    settings: tuple[Hashable, ...] = ()

    def at(self, *settings: Hashable) -> CacheKey[T]:
        """Give the key of the value at some settings."""
        return replace(self, settings=settings)


class SnapshotCache:
    """What a method keeps of a snapshot: of its training rows alone, a kernel for instance.

    Many targets are scored some at a time, and it is not to be computed again for the next.

    Example:
        >>> KERNEL: CacheKey[float] = CacheKey("kernel")
        >>> cache = SnapshotCache()
        >>> cache.once(KERNEL, lambda: 1.0), cache.once(KERNEL, lambda: 2.0)
        (1.0, 1.0)
    """

    def __init__(self) -> None:
        self._values: dict[CacheKey[Any], Any] = {}

    def find(self, key: CacheKey[T]) -> T | None:
        """Give a value that was kept; None if there is none."""
        return self._values.get(key)

    def keep(self, key: CacheKey[T], value: T) -> T:
        """Keep a value, and give it back."""
        self._values[key] = value
        return value

    def once(self, key: CacheKey[T], compute: Callable[[], T]) -> T:
        """Give a value that was kept, or compute it and keep it."""
        if key not in self._values:
            self.keep(key, compute())
        value: T = self._values[key]
        return value

    def clear(self) -> None:
        """Forget everything."""
        self._values.clear()
