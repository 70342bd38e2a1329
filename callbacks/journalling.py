"""Keeps the journal of a run: which samples each step was taken on, told by the loader's own sampler."""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]  # re-exported
from torch import Tensor
from torch.optim import Optimizer

from lightning_attr.callbacks.guard import Guard, describe
from lightning_attr.callbacks.replay_settings import replay_settings
from lightning_attr.callbacks.spot_check import SpotCheck
from lightning_attr.data.drawn_rows import Draw, DrawnRows, unknown_order
from lightning_attr.data.loader import DataSource
from lightning_attr.data.loader_forms import single_loader
from lightning_attr.journal.folder import JournalRecord
from lightning_attr.journal.steps import GroupStep
from lightning_attr.journal.writer import JournalWriter, begin_anew
from lightning_attr.store.feature_store import FeatureStore
from lightning_attr.user_code.lightning_names import overrides
from lightning_attr.user_code.random_states import MovingStates


class RunJournal:
    """Listens to a training and writes its journal.

    Args:
        guard: keeps errors away from the training.
    """

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._states = MovingStates()
        self._drawn = DrawnRows(self._states.now)
        self._writer: JournalWriter | None = None
        self._check: SpotCheck | None = None
        self._pass: deque[Draw] | None = None
        self._next_idx: int | None = None  # of the pass at hand; None before its first batch
        self._batch: tuple[Draw, int, int] | None = None  # that is trained on now, with epoch and index
        self._before: Any = None
        self._cause: str | None = None
        self._unhook: Any = None

    def listen(self, trainer: L.Trainer) -> None:
        """Hear of the training loader before its iterator is made: workers begin to draw at once."""
        self._cause, strategy = None, trainer.strategy
        inner = strategy.process_dataloader

        def process(loader: object) -> Any:
            found = inner(loader)
            if trainer.training:
                with self._guard.training(self._lose):
                    self._watch(found)
            return found

        self.let_go()
        vars(strategy)["process_dataloader"] = process  # of this object, until training starts
        self._unhook = partial(vars(strategy).pop, "process_dataloader", None)

    def let_go(self) -> None:
        """Leave the strategy as it was."""
        unhook, self._unhook = self._unhook, None
        if unhook is not None:
            unhook()

    def _watch(self, loader: Any) -> None:
        cause = unknown_order(loader)
        if cause is not None:
            self._unknown(cause)
        else:
            self._drawn.watch(loader)

    def make_room(self, trainer: L.Trainer, store: FeatureStore) -> None:
        """Drop the journal of an earlier run from the start, in one process and before any of them writes."""
        if trainer.is_global_zero and trainer.global_step == 0:
            begin_anew(store.path)

    def begin(self, trainer: L.Trainer, module: L.LightningModule, store: FeatureStore, source: DataSource) -> None:
        """Open the journal, in the store."""
        self.let_go()
        settings = replay_settings(trainer, module, source.loader)
        record = JournalRecord(store.manifest.id, trainer.global_rank, len(source), self._cause, settings)
        self._writer = JournalWriter(store.path, record, trainer.global_step, trainer.world_size)
        self._states.device = trainer.strategy.root_device
        self._check = SpotCheck(source, store.fingerprint.data)
        self._pass = self._next_idx = self._batch = None

    def epoch_start(self, trainer: L.Trainer) -> None:
        """Listen to the iterator of this epoch, which is made after this."""
        self._next_idx = self._batch = None
        if self._writer is not None and self._cause is None:
            with self._guard.training(self._lose):
                self._watch(single_loader(trainer.train_dataloader, "training")[0])

    def batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Find what was drawn for a batch."""
        self._batch = None
        if self._writer is None:
            return
        with self._guard.training(self._lose):
            if self._next_idx is None:
                self._begin_pass(trainer, batch_idx)
            draw = self._draw(batch_idx)
            if self._cause is None and self._check is not None and draw.rows is not None:
                wrong = self._check(trainer, module, batch, draw.rows)
                if wrong is not None:
                    self._unknown(wrong)
            self._before = self._states.now()
            self._batch = draw, trainer.current_epoch, batch_idx

    def _begin_pass(self, trainer: L.Trainer, batch_idx: int) -> None:
        """The first batch of an epoch: it is the first that the latest iterator has drawn."""
        self._next_idx = batch_idx
        if self._cause is not None:
            return
        loader, _ = single_loader(trainer.train_dataloader, "training")
        self._drawn.release(loader)
        self._pass = self._drawn.latest()
        if self._check is not None:
            self._check.due_now(loader.dataset)
        if self._pass is None:
            self._unknown(
                f"the iterator of {type(loader).__name__} was made before anybody could listen to its sampler"
            )

    def _draw(self, batch_idx: int) -> Draw:
        """Take what was drawn for a batch; batches that Lightning skipped, as they were None, have draws, too."""
        if self._cause is not None or self._pass is None or self._next_idx is None:
            return Draw([], None)
        skipped, self._next_idx = batch_idx - self._next_idx, batch_idx + 1
        for _ in range(skipped):
            self._pass.popleft()
        if not self._pass:
            self._unknown("training has seen more batches than its sampler gave")
            return Draw([], None)
        draw = self._pass.popleft()
        if draw.rows is None:
            self._unknown("the sampler of the training loader gives something else than indices")
            return Draw([], None)
        return draw

    @property
    def batch_rows(self) -> list[int] | None:
        """Rows of the batch at hand, until it is noted; None where they are not known."""
        return None if self._batch is None or self._cause is not None else self._batch[0].rows

    def trained(self) -> None:
        """Note the batch at hand: a gradient comes of it."""
        if self._writer is None or self._batch is None:
            return
        (draw, epoch, batch_idx), self._batch = self._batch, None
        with self._guard.training(self._lose):
            known = {"before": self._before, "reading": draw.reading}
            self._writer.batch(draw.rows or [], epoch=epoch, batch_idx=batch_idx, **known)

    def step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Optimizer) -> None:
        """Note a step that is about to be taken."""
        if self._writer is None:
            return
        by_itself = not module.automatic_optimization
        if by_itself:
            self.trained()  # perhaps by a backward pass that nobody heard of
        with self._guard.training(self._lose):
            inner = getattr(optimizer, "optimizer", optimizer)
            index = next((i for i, own in enumerate(trainer.optimizers) if own is inner or own is optimizer), 0)
            groups = [
                GroupStep(float(group.get("lr") or 0.0), float(group.get("weight_decay") or 0.0))
                for group in optimizer.param_groups
            ]
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            scale = 1.0 if scaler is None else float(scaler.get_scale())
            factor = _clip_factor(trainer, module, optimizer)
            self._writer.step(trainer.global_step, trainer.current_epoch, index, groups, factor, scale, again=by_itself)

    def batch_end(self, module: L.LightningModule) -> None:
        """Note what a module that steps by itself has trained on; write what is due."""
        if self._writer is None:
            return
        if not module.automatic_optimization:
            self.trained()  # perhaps by a backward pass that nobody heard of
        with self._guard.training(self._lose):
            self._writer.flush_when_due()

    def flush(self) -> None:
        """Write what is known so far: a checkpoint is written, or the run ends."""
        if self._writer is not None:
            with self._guard.training(self._lose):
                self._writer.flush()

    def end(self) -> None:
        """The fit is over."""
        self.let_go()
        self._writer = self._pass = self._batch = None

    def _unknown(self, cause: str) -> None:
        self._cause = self._cause or cause
        if self._writer is not None:
            self._writer.unknown(cause)

    def _lose(self, error: Exception) -> None:
        """The journal ends; training and its snapshots go on."""
        writer, self._writer = self._writer, None
        self._cause = f"the journal ended: {describe(error)}"
        if writer is not None:
            with self._guard.training(lambda _: None):
                writer.unknown(self._cause)
        rank_zero_warn(
            f"AttributionCallback keeps no journal from here on, so that it is not known which samples each step was "
            f"taken on; training and its snapshots go on. The cause: {describe(error)}"
        )


def _clip_factor(trainer: L.Trainer, module: L.LightningModule, optimizer: Optimizer) -> Tensor | float:
    """What Lightning's clipping is about to multiply the gradient with; NaN where that is not one number, or unknown.

    By norm: min(1, limit / (norm + 1e-6)).
    """
    limit, algorithm = trainer.gradient_clip_val, trainer.gradient_clip_algorithm
    if overrides("configure_gradient_clipping", module):
        return float("nan")
    if not module.automatic_optimization or not limit:
        return 1.0 if module.automatic_optimization else float("nan")
    if algorithm is not None and algorithm.value != "norm":
        return float("nan")
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not gradients:
        return 1.0
    if any(type(gradient) is not Tensor for gradient in gradients):
        return float("nan")  # parts of a gradient that processes share
    norms = [torch.linalg.vector_norm(gradient) for gradient in gradients]
    norm = torch.linalg.vector_norm(torch.stack([one.to(norms[0].device) for one in norms]))
    factor: Tensor = (limit / (norm + 1e-6)).clamp(max=1.0)
    return factor
