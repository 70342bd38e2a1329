"""Learning rates that differ between the parameters of a snapshot, as weights of their gradients' products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_attr.errors import AttributionError
from lightning_attr.methods.base import SnapshotFeatures


def relative_rates(snapshot: SnapshotFeatures) -> Mapping[str, float] | None:
    """Give the learning rate of each parameter as a multiple of the snapshot's own.

    Returns parameter name -> multiple; None where all are one, or nothing was trained.

    Example:
        >>> features = {"features": torch.ones(1, 1)}
        >>> relative_rates(SnapshotFeatures.of(features, features))
    """
    if snapshot.rates is None or snapshot.learning_rate == 0:
        return None
    return {name: rate / snapshot.learning_rate for name, rate in snapshot.rates.items()}


def column_scales(snapshot: SnapshotFeatures, method: str) -> Tensor | None:
    """Scale features so that their products are those of gradients, each parameter's weighed by its learning rate.

    Returns ``(k,)``: the root of the relative learning rate of each column's layer; None where all are one.

    Example:
        >>> from dataclasses import replace
        >>> features = {"features": torch.ones(1, 3)}
        >>> snapshot = SnapshotFeatures.of(features, features)
        >>> layers = {"body": slice(0, 2), "head": slice(2, 3)}
        >>> column_scales(replace(snapshot, rates={"body.weight": 0.0, "head.weight": 4.0}, layers=layers), "TracIn")
        tensor([0., 0., 2.])
    """
    relative = relative_rates(snapshot)
    if relative is None:
        return None
    names = {rate: name for name, rate in relative.items()}
    if snapshot.layers is None:
        raise AttributionError(_mixed(snapshot, method, "every feature mixes all layers", list(names.values())))
    scales = torch.ones(snapshot.targets["features"].shape[1])
    for layer, columns in snapshot.layers.items():
        own = {rate: name for name, rate in relative.items() if name.rpartition(".")[0] == layer}
        if len(own) > 1:
            how = f"the features of `{layer}` mix its parameters"
            raise AttributionError(_mixed(snapshot, method, how, list(own.values())))
        scales[columns] = next(iter(own), 1.0) ** 0.5
    return scales


def _mixed(snapshot: SnapshotFeatures, method: str, how: str, names: Sequence[str]) -> str:
    rates = snapshot.rates or {}
    one, other = names[:2]
    return (
        f"{method} weighs the gradient of each parameter by its learning rate, and those of snapshot {snapshot.key!r} "
        f"differ: they sum up to {rates[one]:g} for `{one}` and {rates[other]:g} for `{other}`; but {how}. Take "
        f"{method}(exact=True), which keeps parameters apart, a projector that keeps layers apart (KroneckerProjector, "
        'the default, or IdentityProjector), or weights="uniform", which needs no learning rates.'
    )
