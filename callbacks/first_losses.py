"""Losses of a few samples at a snapshot without features: what a later attribution sees is compared with them."""

from __future__ import annotations

import lightning as L

from lightning_attr.data.loader import DataSource
from lightning_attr.features.featurizer import AttributionPlan
from lightning_attr.features.transfer import samples_on_device
from lightning_attr.objectives.objective import needs_setup
from lightning_attr.store.feature_store import FeatureStore
from lightning_attr.verification.recorded_losses import first_losses


def note_first_losses(
    trainer: L.Trainer,
    pl_module: L.LightningModule,
    source: DataSource,
    plan: AttributionPlan | None,
    store: FeatureStore,
    key: str,
) -> None:
    """Note the losses of the first samples, beside training; in the process that writes the store."""
    if plan is None or source.form.random or needs_setup(pl_module):
        return
    samples = samples_on_device(trainer, pl_module, getattr(trainer, "datamodule", None), source)
    stream, precision = store.snapshot(key).projection, trainer.precision_plugin.forward_context
    store.note_losses(key, first_losses(pl_module, plan, stream, samples, store.rows(0), precision).tolist())
