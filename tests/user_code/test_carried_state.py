"""Losses that depend on what the step keeps from the batch before: attributed, and told of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cases import PlainClassifier, blobs, loader_of, quiet_trainer
from lightning_attr.callbacks import AttributionCallback


class Recurrent(PlainClassifier):
    """Adds to its logits a share of the last ones, where batches have the same size."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: Tensor | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.layer(batch[0])
        if self.hidden is not None and self.hidden.shape == logits.shape:
            logits = logits + 0.5 * self.hidden
        self.hidden = logits.detach()
        return F.cross_entropy(logits, batch[1])


class Keeps(PlainClassifier):
    """Keeps its logits for a log."""

    last: Tensor | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.last = self.layer(batch[0]).detach()
        return super().training_step(batch, batch_idx)


def said(module: Any, tmp_path: Any, caplog: pytest.LogCaptureFixture) -> bool:
    torch.manual_seed(0)
    trainer = quiet_trainer(max_epochs=1, callbacks=[AttributionCallback(tmp_path)])
    trainer.fit(module, loader_of(blobs(16)))
    return "depends on what it keeps from the batch before, in `hidden`: the same samples have the loss" in caplog.text


def test_a_loss_that_reads_the_state_of_the_batch_before_is_told(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert said(Recurrent(), tmp_path, caplog)


def test_state_that_no_loss_reads_is_not(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert not said(Keeps(), tmp_path, caplog)
    assert "the batch before" not in caplog.text
