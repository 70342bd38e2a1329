"""The projector of a method that was given none."""

from __future__ import annotations

from lightning_attr.projectors.kronecker import KroneckerProjector


class UnchosenProjector(KroneckerProjector):
    """A :class:`KroneckerProjector` that nobody chose, so that it gives way to the one that a store was written with.

    Example:
        >>> UnchosenProjector().config == KroneckerProjector().config
        True
    """
