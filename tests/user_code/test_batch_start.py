"""Steps that need what hooks and callbacks make before them."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cases import PlainClassifier, blobs, loader_of, quiet_trainer
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.errors import BatchDependenceError
from lightning_attr.methods import GradDot


class SetsScale(L.Callback):
    def __init__(self) -> None:
        self.calls = 0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.calls += 1
        pl_module.scale = 2.0 + trainer.current_epoch


def test_a_step_may_need_what_callbacks_set_when_an_epoch_starts() -> None:
    class Scaled(PlainClassifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * self.scale

    sets = SetsScale()
    trainer = quiet_trainer(max_epochs=2, callbacks=[sets, AttributionCallback("run")])
    trainer.fit(Scaled(), loader_of(blobs(16)))
    assert sets.calls == 2
    module, batch = trainer.lightning_module, blobs(16)[:]
    losses = trainer.attribute(targets="train", method=GradDot(exact=True)).loss
    expected = 3 * F.cross_entropy(module.layer(batch[0]), batch[1], reduction="none")
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-4, atol=1e-5)


class Weighted(PlainClassifier):
    """Loses the form of a plain step: the hook weighs the batch that comes."""

    weights: Any = 1.0

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.weights = 1.0 + batch[1]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = F.cross_entropy(self.layer(batch[0]), batch[1], reduction="none")
        return (losses * self.weights).mean()


def test_a_step_may_need_what_its_hook_makes_of_the_batch() -> None:
    trainer = quiet_trainer(max_epochs=1, callbacks=[AttributionCallback("run")])
    trainer.fit(Weighted(), loader_of(blobs(16)))
    module, (x, y) = trainer.lightning_module, blobs(16)[:]
    found = trainer.attribute(targets="train", method=GradDot(exact=True)).loss
    expected = F.cross_entropy(module.layer(x), y, reduction="none") * (1 + y)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-5)


def test_what_a_hook_makes_of_a_whole_batch_is_no_sample_alone() -> None:
    class Scaled(Weighted):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.weights = batch[0].abs().mean()

    trainer = quiet_trainer(max_epochs=1, callbacks=[AttributionCallback()])
    with pytest.raises(BatchDependenceError, match="neither the mean nor the sum"):
        trainer.fit(Scaled(), loader_of(blobs(16)))


def test_a_hook_that_the_loss_does_not_need_is_not_called() -> None:
    class Counts(PlainClassifier):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            seen.append(batch_idx)

    seen: list[int] = []
    trainer = quiet_trainer(max_epochs=1, callbacks=[AttributionCallback("run")])
    trainer.fit(Counts(), loader_of(blobs(16)))
    trainer.attribute(targets="train", method=GradDot(exact=True))
    assert seen == list(range(trainer.num_training_batches))


class Observed(PlainClassifier):
    """Scales a batch by what it has seen of the largest input, itself included."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("largest", torch.tensor(0.1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.largest.lerp_(batch[0].abs().max(), 0.1)
        return super().training_step((batch[0] / self.largest, batch[1]), batch_idx)


def test_a_loss_that_reads_state_which_the_step_writes_is_told_of(tmp_path: Any) -> None:
    trainer = quiet_trainer(max_epochs=1, callbacks=[AttributionCallback(tmp_path)])
    told = r"The step also changes `largest`, and its loss depends on that \(.* after another batch\)"
    with pytest.raises(BatchDependenceError, match=told):
        trainer.fit(Observed(), loader_of(blobs(16)))


def test_a_counter_is_not_blamed_for_a_loss_that_compares_samples(tmp_path: Any) -> None:
    class Compares(PlainClassifier):
        calls = 0

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.calls += 1
            return F.cross_entropy(self.layer(batch[0]), batch[1], weight=torch.tensor([1.0, 2.0, 9.0]))

    trainer = quiet_trainer(max_epochs=1, callbacks=[AttributionCallback(tmp_path)])
    with pytest.raises(BatchDependenceError, match="neither the mean nor the sum") as caught:
        trainer.fit(Compares(), loader_of(blobs(16)))
    assert "The step also changes" not in str(caught.value)
