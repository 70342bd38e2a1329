"""Which rows a run can draw: its loader, as the Trainer uses it, and the Trainer's limits."""

from __future__ import annotations

import math

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]  # re-exported

from lightning_attr.data.exposure import drawable_rows, from_bitmap, to_bitmap
from lightning_attr.data.loader import DataSource
from lightning_attr.store.feature_store import FeatureStore


def note_drawable_rows(
    trainer: L.Trainer, pl_module: L.LightningModule, source: DataSource, store: FeatureStore
) -> None:
    """Note in the store which rows training can draw, if some are left out."""
    batches = trainer.num_training_batches
    if trainer.max_steps != -1 and pl_module.automatic_optimization:
        batches = min(batches, trainer.max_steps * trainer.accumulate_grad_batches)
    reloads = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]  # set by Lightning's connectors
    mask = None if reloads else drawable_rows(source.loader, batches, trainer.world_size)
    before = store.manifest.trained_on
    if mask is not None and trainer.global_step > 0:  # an earlier fit may have drawn others
        mask = None if before is None else mask | from_bitmap(before, len(source))
    if mask is None or len(mask) != len(source) or mask.all() or not mask.any():
        store.mark_trained_on(None)
        return
    store.mark_trained_on(to_bitmap(mask))
    kind = type(source.loader.sampler).__name__
    limit = "" if math.isinf(batches) else f" and {batches} batches an epoch"
    rank_zero_info(
        f"Training draws {int(mask.sum()):,} of the {len(mask):,} samples of its data set ({kind}{limit}). The others "
        "get scores of zero, and are marked in `result.trained_on`."
    )
