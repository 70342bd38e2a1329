"""Lightning under both its names: ``lightning`` and ``pytorch_lightning`` hold the same classes, and either will do.

``pytorch_lightning`` is looked up, never imported: what a user hands over has been imported by her.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any, TypeVar

import lightning as L
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

_Kind = TypeVar("_Kind")
_Module = TypeVar("_Module", bound=nn.Module)

_HERE, _OTHER = "lightning", "pytorch_lightning"


def both(*kinds: type[_Kind]) -> tuple[type[_Kind], ...]:
    """List classes under both names, for ``isinstance``.

    Returns they, and those of the same names in ``pytorch_lightning`` if that is imported.
    """
    others = [_other(kind) for kind in kinds]
    return (*kinds, *(kind for kind in others if kind is not None))


def own(kind: type[_Kind], owner: object) -> type[_Kind]:
    """Find the class that an object knows by this name.

    Returns ``kind`` itself, or that of ``pytorch_lightning``.
    """
    other = _other(kind) if _world(owner) == _OTHER else None
    return other or kind


def overrides(hook: str, owner: object) -> bool:
    """Say whether a module or datamodule defines a hook itself."""
    bases = both(L.LightningModule, L.LightningDataModule)
    base = next(base for base in bases if isinstance(owner, base))
    return bool(is_overridden(hook, owner, base))


def as_lightning_module(kind: type[_Module], trainer: L.Trainer) -> type[_Module]:
    """Make a class of modules one that a Trainer takes.

    Returns a subclass of ``kind`` and of the ``LightningModule`` of that name; its objects can be pickled.
    """
    bases: tuple[Any, Any] = kind, own(L.LightningModule, trainer)
    found: type[_Module] = _joined(*bases)
    return found


def check_one_world(trainer: L.Trainer, *parts: object) -> None:
    """Refuse what Lightning refuses to run together: a Trainer of one name with a module or datamodule of the other.

    Example:
        >>> check_one_world(L.Trainer(barebones=True), L.LightningModule())
    """
    theirs = _world(trainer)
    for part in parts:
        world = _world(part)
        if isinstance(part, both(L.LightningModule, L.LightningDataModule)) and world != theirs:
            raise TypeError(
                f"Expected Trainer and {type(part).__name__} to come from one package, but the Trainer "
                f"({type(trainer).__name__}) is one of `{theirs}` and {type(part).__name__} is made of classes of "
                f"`{world}`: Lightning keeps the two apart. Write "
                f"`trainer = {world}.Trainer(..., callbacks=[AttributionCallback()])`, which has `trainer.attribute` "
                "as well, or without the callback `lightning_attr.attribute(trainer, ...)`; or import both from "
                f"`{theirs}`."
            )


class AnyCallback(L.Callback):
    """A callback that is one under both names, to whatever asks: a Trainer, or a LightningCLI that reads class paths.

    Example:
        >>> isinstance(AnyCallback(), both(L.Callback))
        True
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _join_callbacks()

    def __new__(cls, *args: Any, **kwargs: Any) -> AnyCallback:
        """Know the other name also where it was imported after this class was made."""
        _join_callbacks()
        return super().__new__(cls)


def _join_callbacks() -> None:
    missing = [kind for kind in both(L.Callback) if not issubclass(AnyCallback, kind)]
    if missing:
        AnyCallback.__bases__ = (*AnyCallback.__bases__, *missing)


def _other(kind: type[_Kind]) -> type[_Kind] | None:
    """Find the class of the same name in the other package; None where that has not been imported."""
    module = sys.modules.get(kind.__module__.replace(f"{_HERE}.pytorch", _OTHER, 1))
    return getattr(module, kind.__name__, None)


def _world(found: object) -> str:
    """Name the package whose classes an object is made of."""
    packages = [base.__module__.partition(".")[0] for base in type(found).__mro__]
    return next((package for package in packages if package in {_HERE, _OTHER}), _HERE)


@cache
def _joined(kind: Any, base: Any) -> Any:
    return type(kind.__name__, (kind, base), {"__module__": kind.__module__, "__reduce__": _reduce})


def _reduce(module: Any) -> tuple[Any, ...]:
    """Pickle by the two classes that the joined one is made of: it has no name of its own to be found by."""
    kind, base = type(module).__bases__
    return _blank, (kind, base), module.__getstate__()


def _blank(kind: Any, base: Any) -> Any:
    joined = _joined(kind, base)
    return joined.__new__(joined)
