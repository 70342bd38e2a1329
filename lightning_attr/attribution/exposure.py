"""How often each training sample was trained on, by the journal of the run that is attributed."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import Tensor

from lightning_attr.errors import CorruptedStoreError
from lightning_attr.store.feature_store import FeatureStore
from lightning_attr.store.manifest import Snapshot

log = logging.getLogger(__name__)


def exposure_of(store: FeatureStore, snapshots: Sequence[Snapshot], n_train: int) -> Tensor | None:
    """Count how often each row was trained on up to the last snapshot of the recorded run.

    Returns ``(n_train,)``, int64; None where nobody knows: without a journal, with steps or rows that are missing in
    it, and for snapshots of other runs.
    """
    steps = [snapshot.global_step for snapshot in snapshots if snapshot.pilot is None]
    if not steps:
        return None
    try:
        journal = store.journal()
        if journal is None or journal.unknown is not None or journal.gap(max(steps)) is not None:
            return None
        return journal.exposure(n_train, max(steps))
    except CorruptedStoreError as error:
        log.warning("How often each sample was trained on is not known: %s", error)
        return None
