"""Losses that were recorded with the features of a snapshot, beside what the module gives there now."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from lightning_attr.draws import Samples
from lightning_attr.errors import StoreMismatchError
from lightning_attr.featurizer import Featurizer
from lightning_attr.projectors import NoProjection
from lightning_attr.store import FeatureStore

__all__ = ["check_recorded_losses"]

_SAMPLES = 4


def check_recorded_losses(
    featurizer: Featurizer,
    store: FeatureStore,
    key: str,
    samples: Samples,
    precision: Callable[[], AbstractContextManager[Any]],
) -> None:
    """Compare the losses of the first samples with those on record: targets are seen as training samples were.

    A step may use what only its fit had, such as the Trainer's ``max_epochs``. Where features are on record and targets
    come later, a difference would go unseen. It costs a forward pass of four samples.

    Args:
        featurizer: of the training samples, with the snapshot's weights in its module.
        store: of the run.
        key: the snapshot.
        samples: the training samples, on the module's device.
        precision: the context that forward passes run in.

    Raises:
        StoreMismatchError: if they differ by more than rounding.
    """
    if 0 not in store.snapshot(key).shards:
        return
    rows = store.rows(0)[:_SAMPLES]
    recorded = store.shard(key, 0)["loss"][: len(rows)].double()
    values = Featurizer(featurizer.module, featurizer.plan, NoProjection(), None, featurizer.snapshot)
    found = []
    for numbers, batch in samples.batches(rows):
        with precision():
            found.append(values(batch, numbers)["loss"].detach().cpu().double())
    now = torch.cat(found)
    low = torch.is_autocast_enabled("cpu") or any(p.dtype.itemsize < 4 for p in featurizer.module.parameters())
    apart = ((now - recorded).abs() > (0.2 if low else 0.02) * (1 + recorded.abs())).nonzero().flatten().tolist()
    if apart:
        named = ", ".join(f"dataset[{rows[i]}]: {recorded[i].item():.6g}, now {now[i].item():.6g}" for i in apart)
        raise StoreMismatchError(
            f"The losses at snapshot {key!r} in {store.path} are not those on record ({named}), although weights and "
            f"data are: what {type(featurizer.module).__name__} computes depends on something else, such as the "
            "Trainer's `max_epochs` or an attribute that training changed. Attribute with the trainer and module that "
            "fitted, or with a Trainer of the same settings."
        )
