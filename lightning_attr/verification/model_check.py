"""Whether a module is as one of a store's snapshots has it: scores are by the snapshots, whatever it holds now."""

from __future__ import annotations

import logging

from torch import nn

from lightning_attr.files.io import digest
from lightning_attr.parameters.weights import check_fits, weights_of
from lightning_attr.store.feature_store import FeatureStore

log = logging.getLogger(__name__)


def check_model(store: FeatureStore, module: nn.Module, first: bool = True) -> None:
    """Refuse a module that the snapshots do not fit, and say where its weights are those of none of them."""
    usable = [snapshot for snapshot in store.manifest.usable if snapshot.pilot is None] or store.manifest.usable
    weights = weights_of(module)
    content = digest(weights)
    if any(snapshot.weights == content for snapshot in usable):
        return
    check_fits(module, store.weights(usable[-1].key))
    if not first:
        return
    keys = [snapshot.key for snapshot in usable]
    named = keys[0] if len(keys) == 1 else f"{keys[0]} to {keys[-1]}"
    log.warning(
        "The weights that %s has now are those of no snapshot in %s, and are not used: scores are by its snapshots "
        "(%s). That is right for a module fresh from its constructor. Of one that was trained elsewhere, or further, "
        "attribute without a `store`, or fit it with the AttributionCallback.",
        type(module).__name__,
        store.path,
        named,
    )
