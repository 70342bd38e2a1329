"""The recorded run behind a store, made ready for a replay; refused by name where it cannot be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from lightning_attr.attribution.restorer import Restorer
from lightning_attr.errors import AttributionError
from lightning_attr.features.transfer import to_device
from lightning_attr.journal import Journal, JournalBatch, JournalStep
from lightning_attr.replay.optimizer_forms import KINDS, Clipping
from lightning_attr.replay.recorded_run import RecordedRun
from lightning_attr.store.feature_store import FeatureStore
from lightning_attr.store.manifest import Snapshot
from lightning_attr.user_code.random_states import put_back

_RECORD = 'Train with `AttributionCallback(snapshots="start+geometric", journal=True)`.'
_OTHERS = "Take a method on stored features instead: TRAK, TracIn, LESS."
_FULL = {"32-true", "64-true", "32", "64"}


def recorded_run(restorer: Restorer, last: Snapshot) -> RecordedRun:
    """Ready the run that led to a snapshot.

    Returns the run up to there.
    """
    store, request, trainer = restorer.store, restorer.request, restorer.trainer
    settings = store.manifest.training or {}
    if not request.module.automatic_optimization:
        raise AttributionError(
            f"{type(request.module).__name__} optimizes by hand (automatic_optimization=False): which losses led to a "
            f"step is not known, and a replay needs that. {_OTHERS}"
        )
    if settings.get("precision", "32-true") not in _FULL:
        raise AttributionError(
            f"The run was trained with precision={settings['precision']!r}: a replay needs all digits, precision 32 or "
            f"64, for rounding and loss scaling have no derivative. {_OTHERS}"
        )
    value, algorithm = settings.get("gradient_clip_val"), settings.get("gradient_clip_algorithm")
    device = trainer.strategy.root_device
    return RecordedRun(
        request.module,
        journal_steps(store, last),
        the_optimizer(settings.get("optimizers")),
        snapshots_on_the_way(store, last),
        store.weights,
        partial(read_again, restorer),
        partial(put_back, device=device),
        len(request.train),
        Clipping(value, algorithm or "norm") if value else None,
        frozenset(settings.get("resting", ())),
        None if restorer.world is None else restorer.world.at,
        restorer.precision,
    )


def read_again(restorer: Restorer, batch: JournalBatch) -> Any:
    """Read the samples of a batch as training did: with the same random numbers, where they are known."""
    request, trainer = restorer.request, restorer.trainer
    source, rows = request.train, batch.rows.tolist()
    if batch.reading_state is None:
        samples = source.read_whole(rows)
    else:
        put_back(batch.reading_state, trainer.strategy.root_device)
        samples = source.read_whole(rows, stream=None)
    converted = trainer.precision_plugin.convert_input(samples)
    return to_device(converted, request.module, request.datamodule, trainer.strategy.root_device, rows, source)


def journal_steps(store: FeatureStore, last: Snapshot) -> list[JournalStep]:
    """Read the steps that led to a snapshot; a journal that lacks some, or what a replay needs of them, is refused."""
    journal = Journal.open(store.path, store.manifest.id)
    if journal is None:
        raise AttributionError(f"{store.path} has no journal of the run, which a replay goes by. {_RECORD}")
    if journal.unknown is not None:
        raise AttributionError(
            f"The journal in {store.path} does not know which samples the steps were taken on: {journal.unknown}. "
            f"{_OTHERS}"
        )
    gap = journal.gap(last.global_step)
    if gap is not None:
        raise AttributionError(
            f"The journal in {store.path} has a gap: {gap}, of the {last.global_step} that led to {last.key!r}. A "
            f"replay needs all of them. {_OTHERS}"
        )
    steps = list(journal.steps(0, last.global_step))
    for step in steps:
        if any(step.ranks):
            raise AttributionError(
                f"The run was trained by several processes (step {step.global_step} has batches of process "
                f"{max(step.ranks)}), whose average of gradients a replay does not compute. {_OTHERS}"
            )
        if step.optimizer != 0:
            raise AttributionError(f"The run has several optimizers, and a replay goes by one. {_OTHERS}")
        if step.loss_scale != 1.0:
            raise AttributionError(
                f"The loss of step {step.global_step} was scaled by {step.loss_scale:g} for half precision, whose "
                f"rounding has no derivative. Train with precision 32 or 64. {_OTHERS}"
            )
    return steps


def the_optimizer(optimizers: Sequence[Mapping[str, Any]] | None) -> Mapping[str, Any]:
    """Choose the optimizer of a run from its settings on record, if it has a form.

    Example:
        >>> the_optimizer([{"kind": "RMSprop", "groups": []}])
        Traceback (most recent call last):
        ...
        lightning_attr.errors.AttributionError: A replay has no form of the optimizer RMSprop. It has those of SGD, ...
    """
    if optimizers is None:
        raise AttributionError(f"The store does not say what optimizer trained the run. {_RECORD}")
    if len(optimizers) != 1:
        raise AttributionError(f"The run has {len(optimizers)} optimizers, and a replay goes by one. {_OTHERS}")
    (optimizer,) = optimizers
    home = str(optimizer.get("module", "torch.optim"))
    own = "" if home.startswith("torch.optim") else f"{home}."
    if own or optimizer["kind"] not in KINDS:
        raise AttributionError(
            f"A replay has no form of the optimizer {own}{optimizer['kind']}. It has those of {', '.join(KINDS)} of "
            f"torch.optim. {_OTHERS}"
        )
    if any(group.get("amsgrad") for group in optimizer["groups"]):
        raise AttributionError(
            f"A replay has no form of {optimizer['kind']} with amsgrad=True, which divides by the largest second "
            f"moment so far. Train without it. {_OTHERS}"
        )
    return optimizer


def snapshots_on_the_way(store: FeatureStore, last: Snapshot) -> dict[int, str]:
    """List the snapshots up to the last: optimizer steps taken -> key."""
    if last.origin is not None or "/" in last.key:
        raise AttributionError(
            f"{store.path} was merged from several runs, and a replay goes by one. Attribute with the store of each."
        )
    own = [s for s in store.manifest.usable if s.pilot is None and s.global_step <= last.global_step]
    if not own or own[0].global_step != 0:
        raise AttributionError(f"{store.path} has no snapshot of the weights that the run started from. {_RECORD}")
    ends = [s.key for s in own if s.global_step == last.global_step]
    if len(ends) > 1:
        raise AttributionError(
            f"The weights of the snapshot {last.key!r} are not those that the last step led to ({ends[0]!r}): "
            "something averaged them or put others in their place, which a replay does not know of. Train without "
            f"weight averaging. {_OTHERS}"
        )
    if any(s.trainable != last.trainable for s in own):
        raise AttributionError(
            "Parameters were frozen or unfrozen while the run went on, which a replay does not know of. " + _OTHERS
        )
    return {s.global_step: s.key for s in own}
