"""The gradient paths of a module's parameters, checked once for each set of them that is trained."""

from __future__ import annotations

from typing import Any

import lightning as L

from lightning_attr.data.loader import DataSource
from lightning_attr.features.featurizer import AttributionPlan
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.user_code.start_hooks import after_start_hooks
from lightning_attr.verification.probe import probe


class Plans:
    """Checks a module where its parameters were frozen or unfrozen since the last time, and remembers what it found.

    Args:
        trainer: the trainer.
        module: the user's module.
        datamodule: the user's datamodule, if any.
        source: the training data.
        mode: that the module is attributed in, "eval" or "train"; by default as
            :func:`lightning_attr.features.featurizer.plan` chooses, once for all.

    Example:
        >>> from torch import nn
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> import torch
        >>> class Line(L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = nn.Linear(2, 1)
        ...     def training_step(self, batch, batch_idx):
        ...         return self.layer(batch[0]).square().mean()
        >>> source = DataSource.of(DataLoader(TensorDataset(torch.randn(4, 2))), "training")
        >>> trainer = L.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu")
        >>> line = Line().eval()
        >>> plans = Plans(trainer, line, None, source)
        >>> _ = line.layer.bias.requires_grad_(False)
        >>> plans.current()[1].hooked
        ('layer.weight',)
    """

    def __init__(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        datamodule: L.LightningDataModule | None,
        source: DataSource,
        mode: str | None = None,
    ) -> None:
        self.mode = mode
        self._data = trainer, module, datamodule, source
        self._known: dict[str, AttributionPlan] = {}

    def probe(self) -> tuple[AttributionPlan, Any, list[int]]:
        """Check the module as it is.

        Returns the plan, and the few samples that it was checked on, with their rows.
        """
        layout = ParameterLayout.of(self._data[1])
        plan, batch, rows = after_start_hooks(self._data[1], lambda: probe(*self._data, self.mode))
        self.mode = plan.mode
        self._known[layout.digest] = plan
        return plan, batch, rows

    def current(self) -> tuple[ParameterLayout, AttributionPlan]:
        """Give the parameters that are trained now, and their gradient paths.

        Returns layout and plan; the module is checked if this layout is new.
        """
        layout = ParameterLayout.of(self._data[1])
        if layout.digest not in self._known:
            self.probe()
        return layout, self._known[layout.digest]

    def known(self) -> AttributionPlan | None:
        """Give the gradient paths of the parameters that are trained now; None if nobody has looked at them yet."""
        return self._known.get(ParameterLayout.of(self._data[1]).digest)
