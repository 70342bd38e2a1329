"""A method whose projector nobody chose reads the features that a store has."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from lightning_attr.methods.base import AttributionMethod
from lightning_attr.methods.choice import ChoosesFeatures
from lightning_attr.projectors import projector_from_config, records_projector
from lightning_attr.projectors.unchosen import UnchosenProjector


def on_store(
    method: AttributionMethod, config: Mapping[str, Any] | None, n_train: int, numel: int
) -> AttributionMethod:
    """Give a method the projector of a store, where it has none that somebody chose.

    A method that would choose what the store has chooses it, with all that hangs on the choice. Returns the method, or
    one that reads the store's features.

    Example:
        >>> from lightning_attr.methods import GradDot
        >>> from lightning_attr.projectors import EigenProjector, KroneckerProjector
        >>> on_store(GradDot(), EigenProjector(256).config, 10, 100).projector.proj_dim
        256
        >>> on_store(GradDot(KroneckerProjector(64)), EigenProjector(256).config, 10, 100).projector.proj_dim
        64
    """
    inner = getattr(method, "method", None)
    if config is None or method.projector is None or not records_projector(config):
        return method
    if isinstance(inner, AttributionMethod):
        own: Any = copy.copy(method)
        own.method = on_store(inner, config, n_train, numel)
        own.projector = own.method.projector
        return own if own.method is not inner else method
    if isinstance(method, ChoosesFeatures):
        return chosen_as(method, config, n_train, numel)
    unchosen, plain = isinstance(method.projector, UnchosenProjector), method.projector.config
    if not unchosen or method.projector_config != plain or plain == config:
        return method
    own = copy.copy(method)
    own.projector = projector_from_config(config)
    return own  # type: ignore[no-any-return]


def chosen_as(method: ChoosesFeatures, config: Mapping[str, Any], n_train: int, numel: int) -> AttributionMethod:
    """Let a method choose, if that gives the projector of a store, or else take that one."""
    chosen = method.settled(n_train, numel)
    return chosen if chosen.projector_config == config else method.given(projector_from_config(config))
