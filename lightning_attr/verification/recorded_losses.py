"""Losses that were recorded with the features of a snapshot, beside what the module gives there now."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from lightning_attr.batches.form import BatchForm
from lightning_attr.errors import StoreMismatchError
from lightning_attr.features.featurizer import AttributionPlan, Featurizer
from lightning_attr.projectors import NoProjection
from lightning_attr.randomness.draws import Samples
from lightning_attr.store.feature_store import FeatureStore
from lightning_attr.user_code.calls import known_changes
from lightning_attr.user_code.step_world import StepWorld

log = logging.getLogger(__name__)

_SAMPLES = 4


def check_recorded_losses(
    featurizer: Featurizer,
    store: FeatureStore,
    key: str,
    samples: Samples,
    precision: Callable[[], AbstractContextManager[Any]],
    form: BatchForm,
    world: StepWorld | None = None,
) -> None:
    """Compare the losses of the first samples with those on record: targets are seen as training samples were.

    A step may use what only its fit had, such as the Trainer's ``max_epochs``. Where features are on record and targets
    come later, a difference would go unseen. It costs a forward pass of four samples. Where no features are on record
    and only the losses are, samples and targets are seen alike, and a difference is told.
    """
    name, asked = type(featurizer.module).__name__, world.asked if world is not None else set()
    snapshot, rows = store.snapshot(key), store.rows(0)[:_SAMPLES]
    kept = 0 in snapshot.shards
    if not kept and asked:
        log.warning("The training step of %s asks for %s. %s", name, _calls(asked), _OF_THE_END)
    if form.random or (not kept and snapshot.losses is None):
        return
    recorded = store.shard(key, 0)["loss"][: len(rows)].double() if kept else torch.tensor(snapshot.losses).double()
    now = first_losses(featurizer.module, featurizer.plan, featurizer.snapshot, samples, rows, precision)
    on_cpu = next(featurizer.module.parameters()).device.type == "cpu"
    low = torch.is_autocast_enabled("cpu") or any(p.dtype.itemsize < 4 for p in featurizer.module.parameters())
    share = 0.2 if low else 2e-3 if on_cpu else 0.02
    apart = ((now - recorded).abs() > share * (0.1 + recorded.abs())).nonzero().flatten().tolist()
    if not apart:
        return
    named = ", ".join(f"dataset[{rows[i]}]: {recorded[i].item():.6g}, now {now[i].item():.6g}" for i in apart)
    told = (
        f"The losses at snapshot {key!r} in {store.path} are not those on record ({named}), although the weights "
        f"are. {_cause(featurizer.module, form, asked)}"
    )
    if kept:
        raise StoreMismatchError(told)
    log.warning("%s Scores are of the losses as they are now.", told)


def first_losses(
    module: Any,
    plan: AttributionPlan,
    stream: str,
    samples: Samples,
    rows: Sequence[int],
    precision: Callable[[], AbstractContextManager[Any]],
) -> Tensor:
    """Compute the losses of the first training samples, ``(rows,)``, float64, on the CPU; a forward pass of four."""
    values, rows = Featurizer(module, plan, NoProjection(), None, stream), rows[:_SAMPLES]
    found = []
    for numbers, batch in samples.batches(rows):
        with precision():
            found.append(values(batch, numbers)["loss"].detach())
    return torch.cat(found).cpu().double()


def _cause(module: Any, form: BatchForm, asked: Collection[str]) -> str:
    """Say what the losses may depend on, as far as that is known."""
    name, changes = type(module).__name__, known_changes(module)
    if form.drifting:
        return (
            f"Reading the training data changes {_some(form.drifting)}, and the samples with it: they are no longer "
            "what they were then. Let a sample depend on its index and on random numbers alone."
        )
    if changes:
        return (
            f"The training step of {name} changes {_some(changes)}, and training has gone on with that: the loss is no "
            "longer what it was then. State that a loss depends on can be kept in a buffer (`register_buffer`), which "
            "every snapshot has, or follow from `self.current_epoch` or `self.global_step`, which are put back."
        )
    if asked:
        return (
            f"The training step of {name} asks for {_calls(asked)}. {_OF_THE_END} A loss that depends on a learning "
            "rate can take it from a buffer (`register_buffer`), which every snapshot has, or from "
            "`self.current_epoch`."
        )
    return (
        f"What {name} computes depends on something else, such as the Trainer's `max_epochs`, or an attribute that "
        "training has changed. Attribute with the trainer and module that fitted, or with a Trainer of the same "
        "settings; keep state that a loss depends on in a buffer (`register_buffer`), which every snapshot has."
    )


_OF_THE_END = "Learning rates, and the state of optimizers and schedulers, are those of the end of training here."


def _calls(asked: Collection[str]) -> str:
    return ", ".join(f"`self.{name}()`" for name in sorted(asked))


def _some(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names[:4])
