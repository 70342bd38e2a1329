"""Learns the projection of a snapshot from a few training samples there, and keeps it beside the weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from lightning_attr.batches.nested import select_rows
from lightning_attr.errors import CorruptedStoreError, IncompleteFeaturesError
from lightning_attr.features.featurizer import AttributionPlan, Featurizer
from lightning_attr.projectors import LearnedProjection, Projection
from lightning_attr.randomness.draws import Samples
from lightning_attr.store.feature_store import FeatureStore
from lightning_attr.store.snapshot_reader import BASIS

_ENTRIES = 2**24
"""Numbers that what learns may hold of the samples that go through it at once: 64 MiB."""
_FEWEST = 128
"""Samples that are not made fewer."""


def learn_from(
    projection: LearnedProjection,
    module: Any,
    plan: AttributionPlan,
    samples: Samples,
    snapshot: str,
    precision: Callable[[], AbstractContextManager[Any]],
) -> None:
    """Learn a projection from gradients of training samples."""
    rows = projection.learning_rows(len(samples))

    def run(learner: Projection, every: int = 1, entries: int = 1) -> None:
        # Without a memory budget: it rehearses, and what is rehearsed would be learned twice.
        featurizer = Featurizer(module, plan, learner, None, snapshot)
        step, size = max(1, min(every, len(rows) // _FEWEST)), max(1, _ENTRIES // entries)
        for numbers, batch in samples.batches(rows[::step]):
            for start in range(0, len(numbers), size):
                part = range(start, min(start + size, len(numbers)))
                own = batch if len(part) == len(numbers) else select_rows(batch, len(numbers), part)
                with precision():
                    featurizer(own, [numbers[i] for i in part])

    projection.learn(run)


def learn_projection(
    projection: Projection,
    store: FeatureStore,
    key: str,
    module: Any,
    plan: AttributionPlan,
    samples: Samples,
    precision: Callable[[], AbstractContextManager[Any]],
) -> None:
    """Learn what a snapshot's projection has to know, once; the process that writes the store calls it."""
    if isinstance(projection, LearnedProjection) and store.snapshot(key).basis is None:
        learn_from(projection, module, plan, samples, store.snapshot(key).projection, precision)
        store.add_basis(key, projection.basis)


def settle_projection(
    projection: Projection,
    store: FeatureStore,
    key: str,
    learn: Callable[[], None],
    together: Callable[[], AbstractContextManager[Any]],
) -> None:
    """Give a projection what it has to know of its snapshot; all processes call it together."""
    if not isinstance(projection, LearnedProjection):
        return
    if store.snapshot(key).basis is None:
        with together():
            if store.writer:
                learn()
        store.reload()
    load_projection(projection, store, key)


def load_projection(projection: Projection, store: FeatureStore, key: str) -> None:
    """Give a projection what was learned for its snapshot: all processes read the same."""
    if isinstance(projection, LearnedProjection):
        basis = store.basis(key)
        if basis is None:
            raise IncompleteFeaturesError(
                f"Expected the snapshot {key!r} in {store.path} to have the basis of its projection, but none was "
                "learned. `trainer.attribute` learns it."
            )
        try:
            projection.load(basis)
            if not all(tensor.isfinite().all() for tensor in basis.values()):
                raise ValueError("it holds NaN or Inf.")
        except (ValueError, LookupError, TypeError, RuntimeError) as error:
            raise CorruptedStoreError(
                f"{store.path / store.snapshot(key).folder / BASIS} is no basis of this projection: {error} "
                f"`FeatureStore.open({str(store.path)!r}).set_aside([{key!r}])` goes on without this snapshot."
            ) from error
