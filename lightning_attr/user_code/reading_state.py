"""Whatever reads data leaves them as they were: data sets, collate functions and loaders that count, cache or draw."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

from lightning_attr.user_code.generators import preserved_rng
from lightning_attr.user_code.kept_state import KeptState

_kept: list[int] = []
"""The objects that are looked after now, by identity: once is enough."""


@contextmanager
def unchanged_data(*data: object) -> Iterator[None]:
    """Put back all random streams, and the state of what data are read with."""
    new = [item for item in data if item is not None and id(item) not in _kept]
    _kept.extend(map(id, new))
    state = KeptState(_named(new), set(), reading=True) if new else None
    try:
        with preserved_rng(), nullcontext() if state is None else state.kept(by_value=True):
            yield
    finally:
        del _kept[len(_kept) - len(new) :]


def _named(data: Sequence[object]) -> dict[str, object]:
    """Name objects by their classes, functions by their own names."""
    roots: dict[str, object] = {}
    for item in data:
        name = getattr(item, "__name__", type(item).__name__)
        roots[name if name not in roots else f"{name} ({len(roots) + 1})"] = item
    return roots
