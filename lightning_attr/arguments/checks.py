"""One way to check an argument: it is named, with its owner, what was expected, what came and what to do.

Numbers and names raise :class:`ValueError`, objects of the wrong class :class:`TypeError`. Numpy's numbers are taken
and given back as Python's, which can be stored; a bool is no number, and NaN and infinity are none either.
"""

from __future__ import annotations

import difflib
import inspect
import math
import numbers
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from lightning_attr.arguments.messages import argument_message

T = TypeVar("T")


def check_int(
    owner: object,
    name: str,
    value: Any,
    minimum: int | None = None,
    maximum: int | None = None,
    also: str = "",
    remedy: str = "",
) -> int:
    """Check a whole number.

    Returns the number as Python's int.
    """
    integral = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if integral and (minimum is None or value >= minimum) and (maximum is None or value <= maximum):
        return int(value)
    expected = "an integer"
    if minimum is not None and maximum is not None:
        expected = f"an integer from {minimum} to {maximum}"
    elif minimum is not None:
        expected = f"an integer >= {minimum}"
    elif maximum is not None:
        expected = f"an integer <= {maximum}"
    raise ValueError(argument_message(owner, name, expected + (f", or {also}" if also else ""), value, remedy))


def check_seed(owner: object, value: Any, name: str = "seed") -> int:
    """Check a seed of random numbers.

    Returns the seed as Python's int.

    Example:
        >>> check_seed("TRAK", 7)
        7
    """
    if isinstance(value, numbers.Integral) and not isinstance(value, bool) and 0 <= int(value) < 2**63:
        return int(value)
    raise ValueError(argument_message(owner, name, "an integer >= 0 (and below 2**63)", value))


def check_float(
    owner: object,
    name: str,
    value: Any,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    also: str = "",
    remedy: str = "",
) -> float:
    """Check a finite number.

    Returns the number as Python's int or float.
    """
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if (
        real
        and math.isfinite(value)
        and (minimum is None or value >= minimum)
        and (maximum is None or value <= maximum)
        and (above is None or value > above)
        and (below is None or value < below)
    ):
        return value if type(value) in {int, float} else float(value)  # as it was written, in messages
    low = f"[{minimum}" if minimum is not None else f"({above}" if above is not None else None
    high = f"{maximum}]" if maximum is not None else f"{below})" if below is not None else None
    if low and high:
        expected = f"a number in {low}, {high}"
    else:
        bounds = {">=": minimum, ">": above, "<=": maximum, "<": below}
        expected = "a finite number" + "".join(f" {sign} {b}" for sign, b in bounds.items() if b is not None)
    raise ValueError(argument_message(owner, name, expected + (f", or {also}" if also else ""), value, remedy))


def check_flag(owner: object, name: str, value: Any) -> bool:
    """Check a switch.

    Returns the value as Python's bool.

    Example:
        >>> check_flag("AttributionCallback", "featurize", "no")
        Traceback (most recent call last):
        ...
        ValueError: Expected argument `featurize` of AttributionCallback to be True or False, but got 'no'.
    """
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise ValueError(argument_message(owner, name, "True or False", value))


def check_choice(
    owner: object, name: str, value: Any, choices: Iterable[str | bool | None], also: str = "", remedy: str = ""
) -> None:
    """Check that a value is one of a few; a misspelt name is told the nearest."""
    allowed = list(choices)
    if any(value is choice or (isinstance(value, str) and value == choice) for choice in allowed):
        return
    listed = [*map(repr, allowed), *([also] if also else [])]
    expected = " or ".join([", ".join(listed[:-1]), listed[-1]] if len(listed) > 1 else listed)
    if isinstance(value, str):
        names = {choice.lower(): choice for choice in allowed if isinstance(choice, str)}
        near = difflib.get_close_matches(value.lower(), names, 1)
        remedy = f"Did you mean {names[near[0]]!r}?" if near else remedy
    raise ValueError(argument_message(owner, name, expected, value, remedy))


def check_instance(
    owner: object,
    name: str,
    value: Any,
    kind: type[Any] | tuple[type[Any], ...],
    expected: str,
    remedy: str = "",
) -> None:
    """Check that a value is an object of some class; the class itself in its place is told so.

    Example:
        >>> check_instance("attribute", "store", dict, dict, "a dict")
        Traceback (most recent call last):
        ...
        TypeError: Expected argument `store` of attribute to be a dict, but got the class dict. Pass an object of it,
        such as `dict()`.
    """
    if isinstance(value, kind):
        return
    if inspect.isclass(value) and issubclass(value, kind):
        remedy = f"Pass an object of it, such as `{value.__name__}()`."
    raise TypeError(argument_message(owner, name, expected, value, remedy))


def check_callable(owner: object, name: str, value: Any, expected: str, remedy: str = "") -> None:
    """Check that a value can be called.

    Example:
        >>> check_callable("hvp", "func", len, "a function")
    """
    if not callable(value):
        raise TypeError(argument_message(owner, name, expected, value, remedy))


def check_path(owner: object, name: str, value: Any, also: str = "") -> Path:
    """Check the path of a file or directory."""
    expected = "a path, as a string or pathlib.Path" + (f", or {also}" if also else "")
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise TypeError(argument_message(owner, name, expected, value))
    if not os.fspath(value):
        raise ValueError(argument_message(owner, name, expected, value))
    return Path(value)


def check_numbers(owner: object, name: str, value: Any, expected: str) -> Tensor:
    """Check that a value holds numbers, and make a tensor of it.

    Example:
        >>> check_numbers("attribute", "noise_mask", [True, False], "a mask")
        tensor([ True, False])
    """
    if isinstance(value, (Tensor, np.ndarray, list, tuple, range, set, frozenset)):
        try:
            return torch.as_tensor(list(value) if isinstance(value, (range, set, frozenset)) else value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(argument_message(owner, name, expected, value, f"torch says: {error}.")) from error
    raise TypeError(argument_message(owner, name, expected, value))


def check_tensor(owner: object, name: str, value: Any, shape: str = "", ndim: Sequence[int] = ()) -> None:
    """Check that a value is a tensor of numbers, and how many dimensions it has.

    Shapes: shape (n, k).
    """
    expected = f"a tensor of shape {shape}" if shape else "a tensor"
    if not isinstance(value, Tensor):
        remedy = "`torch.as_tensor` makes one." if isinstance(value, (list, tuple, np.ndarray, numbers.Number)) else ""
        raise TypeError(argument_message(owner, name, expected, value, remedy))
    if value.is_complex():
        raise TypeError(argument_message(owner, name, f"{expected}, of real numbers", value))
    if ndim and value.ndim not in ndim:
        raise ValueError(argument_message(owner, name, expected, value))
