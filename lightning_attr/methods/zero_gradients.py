"""What is said of snapshots without gradients."""

from __future__ import annotations

import logging

from lightning_attr.methods.base import SnapshotFeatures
from lightning_attr.methods.cache import CacheKey

log = logging.getLogger(__name__)

_TOLD: CacheKey[bool] = CacheKey("told zero")


def tell_zero(snapshot: SnapshotFeatures) -> None:
    """Say once that gradients are zero at a snapshot, which has scores of zero then.

    Example:
        >>> import torch
        >>> features = {"features": torch.zeros(1, 1)}
        >>> snapshot = SnapshotFeatures.of(features, features)
        >>> tell_zero(snapshot)
        >>> snapshot.cache.find(_TOLD)
        True
    """
    if not snapshot.cache.find(_TOLD):
        snapshot.cache.keep(_TOLD, True)
        log.warning(
            "At snapshot %s the gradients of all training samples are zero (of a layer, or of all): every loss is at "
            "its least there, as hinge losses are. The scores of this part are zero.",
            snapshot.key,
        )
