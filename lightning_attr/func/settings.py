"""The settings of the low-level functions: each is checked where it is given, before any is computed."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from lightning_attr.arguments.checks import check_callable, check_float, check_int, check_seed
from lightning_attr.arguments.messages import argument_message


def check_settings(owner: str, func: Any, argnums: Any, optional: Collection[str] = (), **settings: Any) -> None:
    """Check what a function was given.

    Example:
        >>> check_settings("ihvp_cg", len, 0, damping=0.0, max_iterations=2.5)
        Traceback (most recent call last):
        ...
        ValueError: Expected argument `max_iterations` of ihvp_cg to be an integer >= 1, but got 2.5.
    """
    check_callable(owner, "func", func, "a function of tensors that returns one value")
    check_int(owner, "argnums", argnums, minimum=0)
    for name, value in settings.items():
        if value is not None or name not in optional:
            _CHECKS[name](owner, name, value)


_COUNT = partial(check_int, minimum=1)
_SIZE = partial(check_float, minimum=0)
_CHECKS: dict[str, Callable[[str, str, Any], Any]] = {
    "batch_size": _COUNT,
    "damping": _SIZE,
    "iterations": _COUNT,
    "max_iterations": _COUNT,
    "order": _COUNT,
    "repeats": _COUNT,
    "scale": partial(check_float, above=0),
    "seed": lambda owner, name, value: check_seed(owner, value, name),
    "tolerance": _SIZE,
    "top_k": _COUNT,
}


def check_in_dims(in_dims: Any) -> None:
    """Refuse what is no list of dimensions; whether there are as many as arguments is seen at the call."""
    whole = isinstance(in_dims, (list, tuple)) and all(dim is None or type(dim) is int for dim in in_dims)
    if in_dims is not None and not whole:
        raise TypeError(
            argument_message(None, "in_dims", "a list of dimensions, None for an argument that all share", in_dims)
        )
