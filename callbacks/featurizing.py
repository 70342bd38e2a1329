"""Between two epochs: the training set goes through the module at a snapshot, and what the store then tells of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]  # re-exported
from torch import Tensor

from lightning_attr.attribution.scoring import score_self_influence
from lightning_attr.callbacks.progress import progress
from lightning_attr.data.loader import DataSource, OrderedLoader
from lightning_attr.features.featurizer import AttributionPlan, Featurizer
from lightning_attr.features.learned_projection import learn_projection
from lightning_attr.features.second_direction import directions_of
from lightning_attr.features.transfer import placed, samples_on_device
from lightning_attr.features.unsettled import featurize_unsettled
from lightning_attr.methods import AttributionMethod, SnapshotFeatures
from lightning_attr.methods.choice import choice_of, settled
from lightning_attr.projectors import Projection
from lightning_attr.store.feature_store import FeatureStore
from lightning_attr.store.manifest import Snapshot
from lightning_attr.store.shard_writer import ShardWriter
from lightning_attr.verification.feature_check import check_features

_OF_TARGETS = ("features", "output", "loss", "out_to_loss", "newton_weight", "label")


def learn(
    trainer: L.Trainer,
    pl_module: L.LightningModule,
    source: DataSource,
    projection: Projection,
    plan: AttributionPlan,
    store: FeatureStore,
    key: str,
) -> None:
    """Learn the projection of a snapshot, in the process that writes the store."""
    samples = samples_on_device(trainer, pl_module, getattr(trainer, "datamodule", None), source)
    learn_projection(projection, store, key, pl_module, plan, samples, trainer.precision_plugin.forward_context)


def settle(
    method: AttributionMethod, featurize: bool | None, n_train: int, numel: int, read: bool
) -> tuple[AttributionMethod, bool]:
    """Choose what was left open before a training, and say so.

    Returns the method, with nothing left to choose, and whether features are computed while training.

    Example:
        >>> from lightning_attr.methods import TRAK
        >>> [settle(TRAK(), None, 1437, 10_090, read)[1] for read in (False, True)]
        [False, True]
    """
    method = settled(method, n_train, numel)
    choice = choice_of(method)
    if choice is not None:
        rank_zero_info(f"{type(method).__name__} takes {choice.reason}.")
    now = featurize if featurize is not None else read or choice is None or not choice.late
    return method, now and method.projector is not None


def featurize(
    trainer: L.Trainer,
    pl_module: L.LightningModule,
    source: DataSource,
    batches: Sequence[Sequence[int]],
    featurizer: Featurizer,
    writer: ShardWriter,
) -> None:
    """Featurize batches of the training set into a store."""
    epoch, datamodule = writer.store.snapshot(writer.key).epoch, getattr(trainer, "datamodule", None)
    title = f"Featurizing epoch {epoch}" if epoch >= 0 else "Featurizing the start"
    first = True
    with writer, progress(trainer, title, len(batches)) as advance:
        for rows, batch in OrderedLoader(source, batches):
            batch = trainer.precision_plugin.convert_input(batch)
            on_device = placed(batch, rows, pl_module, datamodule, trainer.strategy.root_device, source)
            with trainer.precision_plugin.forward_context():
                out = writer.output_buffer(rows, featurizer.projection.dim, featurizer.dtype)
                columns, settle = featurize_unsettled(featurizer, on_device, rows, out)
                if first:
                    check_features(featurizer, on_device, rows, columns["features"])
                    first = False
            writer.add(rows, columns, settle)
            advance()


def self_influence_at(
    store: FeatureStore, snapshot: Snapshot, method: AttributionMethod, layers: Mapping[str, slice] | None
) -> Tensor:
    """Score every training sample for its own model output at one snapshot.

    Returns self-influence ``(n_train,)``, float32.
    """
    return score_self_influence(method, _features(store, snapshot, layers, []), store.fingerprint.length)


def scores_at(
    store: FeatureStore,
    snapshot: Snapshot,
    method: AttributionMethod,
    layers: Mapping[str, slice] | None,
    targets: Sequence[int],
) -> Tensor:
    """Score every training sample for some training samples at one snapshot, ``(n_train, targets)``, float32."""
    scores = torch.zeros(store.fingerprint.length, len(targets))
    for block in method.score([_features(store, snapshot, layers, targets)]):
        scores[block.rows.start : block.rows.stop] = block.scores
    return scores


def _features(
    store: FeatureStore, snapshot: Snapshot, layers: Mapping[str, slice] | None, targets: Sequence[int]
) -> SnapshotFeatures:
    """What a method sees of a snapshot, with training samples as targets."""
    first = store.shard(snapshot.key, 0)
    names = [name for name in first if name in _OF_TARGETS] if len(targets) else []
    columns = {name: store.column(snapshot.key, name)[targets] for name in names}
    return SnapshotFeatures(
        lambda: store.blocks(snapshot.key),
        columns or {"features": torch.zeros(0, first["features"].shape[1])},
        snapshot.learning_rate,
        target_rows=range(len(targets)),
        layers=layers,
        n_train=store.fingerprint.length,
        key=snapshot.key,
        rates=snapshot.rates,
        **directions_of(store, snapshot.key),
    )
