"""Batches that are featurized on a device without waiting for it: what they hold is looked at once it has landed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_attr.features.featurizer import Featurizer
from lightning_attr.features.finite import all_finite
from lightning_attr.store.landing import Settle


def featurize_unsettled(
    featurizer: Featurizer, batch: Any, rows: Sequence[int], out: Tensor | None = None
) -> tuple[dict[str, Tensor], Settle | None]:
    """Featurize a batch; on a device, leave what would make the host wait for later.

    Returns the columns, and what makes sure of them when they are on the host, or computes them again; None on the CPU,
    where nothing is left open.

    Example:
        >>> from torch import nn
        >>> from lightning_attr import AttributionMixin
        >>> from lightning_attr.features.featurizer import plan
        >>> from lightning_attr.parameters.layout import ParameterLayout
        >>> from lightning_attr.projectors import IdentityProjector
        >>> class Classifier(AttributionMixin, nn.Linear): ...
        >>> module, batch = Classifier(2, 3).eval(), (torch.randn(4, 2), torch.tensor([0, 1, 2, 0]))
        >>> projection = IdentityProjector().bind(ParameterLayout.of(module), "final")
        >>> featurizer = Featurizer(module, plan(module, batch, 4), projection)
        >>> featurize_unsettled(featurizer, batch, range(4))[1] is None
        True
    """
    device = next(featurizer.module.parameters()).device
    if device.type == "cpu":
        return featurizer(batch, rows, out), None
    precision = _Precision(device.type)

    def settle(columns: dict[str, Tensor]) -> dict[str, Tensor]:
        if all_finite(columns):
            return columns
        with precision.again():  # now with every check in its place, which names what is wrong
            return {name: values.cpu() for name, values in featurizer(batch, rows).items()}

    return featurizer.late(batch, rows), settle


class _Precision:
    """The precision that a trainer has set, to compute in it again."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.autocast = torch.is_autocast_enabled(device)
        self.autocast_dtype = torch.get_autocast_dtype(device)
        self.dtype = torch.get_default_dtype()

    @contextmanager
    def again(self) -> Iterator[None]:
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with torch.autocast(self.device, self.autocast_dtype, enabled=self.autocast):
                yield
        finally:
            torch.set_default_dtype(before)
