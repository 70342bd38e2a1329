"""What a message says of an argument: its name and owner, what was expected, what came, and what to do."""

from __future__ import annotations

import inspect
import numbers
import os
import reprlib

import numpy as np
from torch import Tensor

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


def argument_message(owner: object, name: str, expected: str, value: object, remedy: str = "") -> str:
    """Say what is wrong with an argument.

    Example:
        >>> argument_message("retrain_lds", "alpha", "a number in (0, 1)", 1.5)
        'Expected argument `alpha` of retrain_lds to be a number in (0, 1), but got 1.5.'
    """
    of = "" if owner is None else f" of {owner if isinstance(owner, str) else type(owner).__name__}"
    more = f" {remedy}" if remedy else ""
    return f"Expected argument `{name}`{of} to be {expected}, but got {shown(value)}.{more}"


def shown(value: object) -> str:
    """Describe a value in a few words.

    Returns what it is: plain values as Python writes them, tensors by dtype and shape, other objects by their class.
    """
    if inspect.isclass(value):
        return f"the class {value.__name__}"
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')} and shape {tuple(value.shape)}"
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} and shape {value.shape}"
    if value is None or isinstance(value, (bool, numbers.Number, np.generic, str, bytes, os.PathLike)):
        return _SHORT.repr(value)
    if isinstance(value, (list, tuple, set, frozenset, dict, range)):
        return _SHORT.repr(value)
    if inspect.isroutine(value):
        return f"the function {getattr(value, '__name__', type(value).__name__)}"
    return f"an object of class {type(value).__name__}"
