"""Now and then a batch is read once more, to see that it holds the samples that its sampler drew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from lightning_attr.data.loader import DataSource
from lightning_attr.data.loader_forms import single_loader
from lightning_attr.data.sample_digest import sample_digest
from lightning_attr.features.transfer import own_hooks
from lightning_attr.user_code.reading_state import unchanged_data

_SEEDS = (1, 2)
"""Two readings that differ tell nothing: samples are augmented, or collated at random."""


class SpotCheck:
    """Compares batches 1, 2, 4, 8, ... of a run, and the first of every new data set, with the samples of their rows.

    Args:
        source: the training data.
        digest: of their samples; None where each reading gives others, so that nothing can be compared.
    """

    def __init__(self, source: DataSource, digest: str | None) -> None:
        self._dataset: Any = source.loader.dataset
        self._repeats = digest is not None
        self._seen = 0
        self._due = 1

    def due_now(self, dataset: object) -> None:
        """Check the next batch if its data set is another than before."""
        if dataset is not self._dataset:
            self._dataset, self._due = dataset, self._seen + 1

    def __call__(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, rows: Sequence[int]) -> str | None:
        """Say how a batch differs from its samples; None if it does not, or was not looked at."""
        self._seen += 1
        if self._seen < self._due:
            return None
        self._due = 2 * self._seen
        loader, _ = single_loader(trainer.train_dataloader, "training")
        if not self._repeats or loader.batch_sampler is None:
            return None
        if own_hooks(module, getattr(trainer, "datamodule", None)):
            return None  # what they make of a batch may depend on anything
        seen = _content(batch)
        first, second = (_content(_read(trainer, loader, rows, seed)) for seed in _SEEDS)
        if seen is None or first is None or first != second or seen == first:
            return None
        return (
            f"batch {self._seen} does not hold the samples that its sampler drew: the loader takes others, or "
            "something changes its batches before they are trained on"
        )


def _read(trainer: L.Trainer, loader: Any, rows: Sequence[int], seed: int) -> Any:
    """Read samples as the loader does, and leave no trace."""
    dataset = loader.dataset
    with unchanged_data(dataset, loader.collate_fn):
        torch.manual_seed(seed)
        samples = dataset.__getitems__(list(rows)) if hasattr(dataset, "__getitems__") else [dataset[i] for i in rows]
        return trainer.precision_plugin.convert_input(loader.collate_fn(samples))


def _content(batch: Any) -> str | None:
    """Hash the leaves of a batch; None where some are neither tensors nor plain values."""
    leaves, _ = tree_flatten(batch)
    plain = all(isinstance(leaf, (Tensor, str, int, float, bool, bytes, type(None))) for leaf in leaves)
    return sample_digest(leaves) if plain and any(isinstance(leaf, Tensor) for leaf in leaves) else None
