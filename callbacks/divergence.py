"""A model that diverged has no attribution: it is refused, with the sample that may explain it."""

from __future__ import annotations

from collections.abc import Iterator

import lightning as L

from lightning_attr.batches.nested import batched_tensors
from lightning_attr.data.loader import DataSource, OrderedLoader
from lightning_attr.errors import NonFiniteGradientError


def check_weights(pl_module: L.LightningModule, source: DataSource, epoch: int) -> None:
    """Refuse weights that are not finite, before they get into the store.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> check_weights(L.LightningModule(), DataSource.of(DataLoader([1.0]), "training"), epoch=0)
    """
    bad = [name for name, p in pl_module.named_parameters() if p.requires_grad and not p.isfinite().all()]
    if not bad:
        return
    sample = next(_nonfinite_samples(OrderedLoader(source, source.batches(range(len(source))))), None)
    cause = (
        f"Training sample {sample} holds NaN or Inf: look at dataset[{sample}]."
        if sample is not None
        else "No training sample holds NaN or Inf: look at the learning rate and at the loss."
    )
    when = f"after epoch {epoch}" if epoch >= 0 else "before training"
    raise NonFiniteGradientError(
        f"The weights are NaN or Inf {when} (`{bad[0]}`{' and others' if bad[1:] else ''}): a diverged model has no "
        f"attribution. {cause} The snapshots before are intact."
    )


def _nonfinite_samples(loader: OrderedLoader) -> Iterator[int]:
    for rows, batch in loader:
        for tensor in batched_tensors(batch, len(rows)):
            finite = tensor.isfinite().reshape(len(rows), -1).all(1)
            yield from (rows[i] for i in (~finite).nonzero().flatten().tolist())
