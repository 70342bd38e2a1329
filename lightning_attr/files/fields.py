"""Checks of the fields of a record that was read from a file: whatever comes, a ValueError says what was expected."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

Check = Callable[[Any], Any]
"""Gives the value of a field, in the type that the program uses, or raises ValueError."""

Record = TypeVar("Record")

_HASH = re.compile(r"[0-9a-f]{1,64}")
_LARGEST = 2**53


def read_fields(
    kind: type[Record],
    found: object,
    checks: Mapping[str, Check],
    ignored: tuple[str, ...] = (),
    whole: bool = False,
) -> Record:
    """Make a dataclass of a record, field by field.

    Returns an object of it.

    Example:
        >>> @dataclasses.dataclass
        ... class Step:
        ...     number: int
        >>> read_fields(Step, {"number": 3}, {"number": integer(0)})
        Step(number=3)
        >>> read_fields(Step, {"number": "3"}, {"number": integer(0)})
        Traceback (most recent call last):
        ...
        ValueError: `number` is '3', where an integer from 0 to ... is expected
    """
    if not isinstance(found, dict):
        raise ValueError(f"{_shown(found)} is there, where the fields of a {kind.__name__} are expected")
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}  # type: ignore[arg-type]
    unknown = [name for name in found if name not in fields and name not in ignored]
    if unknown:
        raise ValueError(f"{_shown(unknown[0])} is no field of a {kind.__name__}")
    values = {}
    for name, field in fields.items():
        if name in found:
            values[name] = checked(name, found[name], checks[name])
        elif whole or (field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING):
            raise ValueError(f"`{name}` of a {kind.__name__} is missing")
    return kind(**values)


def checked(name: str, value: object, check: Check) -> Any:
    """Apply a check, and name the field where it fails.

    Returns the value that the check gives.
    """
    try:
        return check(value)
    except ValueError as error:
        raise ValueError(f"`{name}`{'' if str(error).startswith('is ') else ':'} {error}") from error


def integer(least: int, most: int = _LARGEST) -> Check:
    """Expect an integer within bounds."""

    def check(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ValueError(_wrong(value, f"an integer from {least} to {most}"))
        return value

    return check


def real(least: float = -math.inf, most: float = math.inf) -> Check:
    """Expect a finite number within bounds.

    Returns the check, which gives a float.
    """

    def check(value: object) -> float:
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
        if not good or not least <= value <= most:  # type: ignore[operator]
            raise ValueError(_wrong(value, f"a finite number from {least} to {most}"))
        return float(value)  # type: ignore[arg-type]

    return check


def text(longest: int = 10_000) -> Check:
    """Expect a string."""

    def check(value: object) -> str:
        if not isinstance(value, str) or len(value) > longest:
            raise ValueError(_wrong(value, f"a text of at most {longest} characters"))
        return value

    return check


def one_of(*allowed: str) -> Check:
    """Expect one of some texts.

    Example:
        >>> one_of("lds", "loo")("lds")
        'lds'
    """

    def check(value: object) -> object:
        if not isinstance(value, str) or value not in allowed:
            raise ValueError(_wrong(value, f"one of {', '.join(allowed)}"))
        return value

    return check


def sha256(value: object) -> str:
    """Expect a hash, in hexadecimal."""
    if not isinstance(value, str) or not _HASH.fullmatch(value):
        raise ValueError(_wrong(value, "a hash in hexadecimal"))
    return value


def optional(check: Check) -> Check:
    """Allow None."""
    return lambda value: None if value is None else check(value)


def pairs(key: Check, value: Check, most: int = 1_000_000) -> Check:
    """Expect a mapping.

    Returns the check, which gives a dict in the order of the file.
    """

    def check(found: object) -> dict[Any, Any]:
        if not isinstance(found, dict) or len(found) > most:
            raise ValueError(_wrong(found, f"a mapping of at most {most} entries"))
        return {key(name): checked(str(name)[:100], entry, value) for name, entry in found.items()}

    return check


def items(one: Check, most: int = 1_000_000) -> Check:
    """Expect a list.

    Returns the check, which gives a tuple.
    """

    def check(found: object) -> tuple[Any, ...]:
        if not isinstance(found, list) or len(found) > most:
            raise ValueError(_wrong(found, f"a list of at most {most} items"))
        return tuple(one(item) for item in found)

    return check


def plain(value: object, depth: int = 8) -> Any:
    """Expect texts, finite numbers, booleans and None, in lists and mappings."""
    if depth and isinstance(value, dict):
        return {name: plain(entry, depth - 1) for name, entry in value.items()}
    if depth and isinstance(value, list):
        return [plain(item, depth - 1) for item in value]
    if (
        value is not None
        and not isinstance(value, (str, bool, int))
        and not (isinstance(value, float) and math.isfinite(value))
    ):
        raise ValueError(_wrong(value, "a plain value, in lists and mappings that are not deep,"))
    return value


def _wrong(value: object, expected: str) -> str:
    return f"is {_shown(value)}, where {expected} is expected"


def _shown(value: object) -> str:
    found = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "a huge number"
    return found if len(found) <= 80 else f"{found[:80]}..."
