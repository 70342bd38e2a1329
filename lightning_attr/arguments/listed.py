"""Checks of arguments that hold several values: lists of words, of pairs, of whole numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from lightning_attr.arguments.checks import check_int
from lightning_attr.arguments.messages import argument_message


def check_words(owner: object, name: str, value: Any, expected: str) -> list[str]:
    """Give the strings of a list; a string alone is no list of its letters."""
    listed = isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, (str, bytes))
    if not listed or not all(isinstance(word, str) for word in value):
        raise TypeError(argument_message(owner, name, expected, value))
    return list(value)


def check_pairs(owner: object, name: str, value: Any, expected: str) -> None:
    """Refuse what is no list of pairs with a string behind, such as images with their captions."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(argument_message(owner, name, expected, value))
    for i, pair in enumerate(value):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not isinstance(pair[1], str):
            raise TypeError(argument_message(owner, f"{name}[{i}]", expected.split(" of ", 1)[1], pair))


def check_ints(
    owner: object, name: str, value: Any, minimum: int | None = None, maximum: int | None = None, expected: str = ""
) -> list[int]:
    """Give the whole numbers of a list, tensor or array; each is checked by itself."""
    if not isinstance(value, (list, tuple, range, Tensor, np.ndarray)) or getattr(value, "ndim", 1) != 1:
        raise TypeError(argument_message(owner, name, expected or "a list of integers", value))
    listed = value.tolist() if isinstance(value, (Tensor, np.ndarray)) else value
    return [check_int(owner, f"{name}[{i}]", entry, minimum, maximum) for i, entry in enumerate(listed)]
