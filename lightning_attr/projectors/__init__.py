"""Projections of per-sample gradients."""

from collections.abc import Mapping
from typing import Any

from lightning_attr.errors import CorruptedStoreError
from lightning_attr.projectors.base import (
    IdentityProjector,
    MatrixProjection,
    NoProjection,
    Projection,
    Projector,
)
from lightning_attr.projectors.dense import GaussianProjector, RademacherProjector
from lightning_attr.projectors.eigen import EigenProjector
from lightning_attr.projectors.factored_sjlt import FactoredSJLTProjector
from lightning_attr.projectors.factors import GradientFactors
from lightning_attr.projectors.fast_jl import FastJLProjector
from lightning_attr.projectors.grass import FactGraSSProjector, GraSSProjector
from lightning_attr.projectors.kronecker import KroneckerProjector
from lightning_attr.projectors.layer_subset import LayerSubset
from lightning_attr.projectors.learned import LearnedProjection, check_not_learned
from lightning_attr.projectors.preconditioned import AdamDirection, ScaledProjection
from lightning_attr.projectors.sjlt import SJLTProjector

__all__ = [
    "AdamDirection",
    "EigenProjector",
    "FactGraSSProjector",
    "FactoredSJLTProjector",
    "FastJLProjector",
    "GaussianProjector",
    "GraSSProjector",
    "GradientFactors",
    "IdentityProjector",
    "KroneckerProjector",
    "LayerSubset",
    "LearnedProjection",
    "MatrixProjection",
    "NoProjection",
    "Projection",
    "Projector",
    "RademacherProjector",
    "SJLTProjector",
    "ScaledProjection",
    "check_not_learned",
    "projector_from_config",
]

_KINDS: dict[str, type[Projector]] = {
    cls.kind: cls
    for cls in (
        EigenProjector,
        FactGraSSProjector,
        FactoredSJLTProjector,
        FastJLProjector,
        GaussianProjector,
        GraSSProjector,
        IdentityProjector,
        KroneckerProjector,
        RademacherProjector,
        SJLTProjector,
    )
}


def records_projector(config: Mapping[str, Any]) -> bool:
    """Say whether :func:`projector_from_config` can make what a store records."""
    kind, inner = config.get("kind"), config.get("projector")
    if kind == LayerSubset.kind:
        return isinstance(inner, Mapping) and records_projector(inner)
    return isinstance(kind, str) and kind in _KINDS


def projector_from_config(config: Mapping[str, Any]) -> Projector:
    """Make the projector that a store records.

    Args:
        config: a projector's ``config``.

    Returns:
        An equal projector.

    Raises:
        ValueError: if it is none of this package's.
        CorruptedStoreError: if its settings make no sense.

    Example:
        >>> projector_from_config(KroneckerProjector(64, seed=3).config).seed
        3
    """
    if not records_projector(config):
        raise ValueError(
            f"Expected a projector among {sorted(_KINDS)}, but the store was written with {config.get('kind')!r}. Pass "
            "`method` with that projector."
        )
    arguments = {name: value for name, value in config.items() if name != "kind"}
    try:
        if config["kind"] == LayerSubset.kind:
            return LayerSubset(projector_from_config(config["projector"]), config["layers"])
        return _KINDS[config["kind"]](**arguments)
    except (TypeError, ValueError, LookupError) as error:
        raise CorruptedStoreError(
            f"The store says that its features are those of {str(dict(config))[:200]}, which is no projector: {error}"
        ) from error
