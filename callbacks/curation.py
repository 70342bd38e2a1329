"""Acts on attribution while a run trains: suspicious samples are drawn no more, or less often."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import (  # type: ignore[attr-defined]  # re-exported with its logger set up
    rank_zero_info,
    rank_zero_warn,
)
from torch import Tensor
from typing_extensions import override

from lightning_attr.arguments.checks import check_choice, check_float, check_int
from lightning_attr.callbacks.attribution import AttributionCallback
from lightning_attr.callbacks.guard import Guard, describe
from lightning_attr.callbacks.listening import recorder_of
from lightning_attr.callbacks.schedule import epoch_limit
from lightning_attr.data.curated_sampler import CuratedSampler, curable
from lightning_attr.errors import AttributionError
from lightning_attr.store.manifest import Snapshot
from lightning_attr.user_code.lightning_names import AnyCallback


class DataCuration(AnyCallback):
    """Changes the training: from an epoch on, the most suspicious samples are drawn no more, or less often.

    Suspicion is what :class:`AttributionCallback` knew at its last snapshot; each later snapshot revises the choice, so
    that a sample can come back. The place of a sample that is left out goes to another one of the same epoch: epochs
    keep their length, under ``ddp`` in each process. The choice is logged, part of checkpoints, and gone after ``fit``.
    Suspicious samples are not always wrong: rare and difficult ones are among them. Look at them first
    (``result.report``), and compare with a run that leaves none out.

    Args:
        epoch: from which epoch on, counted from 0; a snapshot has to come before it.
        fraction: share of the training set that is left out, in (0, 1).
        by: "self_influence", or "loss", the training loss at the snapshot.
        weight: how often a suspicious sample is still drawn, from 0, never, to below 1.

    Raises:
        ValueError: if an argument is out of range; in ``fit`` before the first step, if there is no
            :class:`AttributionCallback` that featurizes, no snapshot in time, or a loader whose samples no sampler
            chooses.

    Attributes:
        left_out: rows that are left out now, ``(k,)``, int64, ascending.
        history: the same by the epoch from which on they were.

    Example:
        >>> callbacks = [AttributionCallback("attribution"), DataCuration(epoch=5, fraction=0.1)]
    """

    reads_features = True
    """So that :meth:`AttributionCallback.check` knows that features are wanted while training."""

    def __init__(self, epoch: int, fraction: float = 0.1, by: str = "self_influence", weight: float = 0.0) -> None:
        self.epoch = check_int(self, "epoch", epoch, minimum=1)
        self.fraction = check_float(self, "fraction", fraction, above=0, below=1)
        check_choice(self, "by", by, ("self_influence", "loss"))
        self.by = by
        self.weight = check_float(self, "weight", weight, minimum=0, below=1)
        self.left_out = torch.tensor([], dtype=torch.int64)
        self.history: dict[int, Tensor] = {}
        self.stopped: str | None = None
        self._recorder: AttributionCallback | None = None
        self._news: Tensor | None = None  # rows, known to the main process, until they are acted on
        self._sampler: CuratedSampler | None = None
        self._group: Any = None  # the batch sampler that draws through it
        self._first = False  # epoch of a fit that goes on: Lightning has made its batches before any hook
        self._guard = Guard("warn")

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the callback that knows what is suspicious."""
        if stage != "fit":
            return
        recorder = recorder_of(trainer, "DataCuration acts on", f"DataCuration(epoch={self.epoch})")
        self._recorder, self._news = recorder, None
        if self._hear not in recorder.listeners:
            recorder.listeners.append(self._hear)

    def _hear(
        self, trainer: L.Trainer, pl_module: L.LightningModule, snapshot: Snapshot, self_influence: Tensor
    ) -> None:
        assert self._recorder is not None  # whose listener this is
        values = self_influence if self.by == "self_influence" else self._recorder.store.column(snapshot.key, "loss")
        self._news = values.topk(round(self.fraction * len(values))).indices.sort().values

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse what this cannot act on, and say what it does."""
        assert self._recorder is not None  # set before any training
        self._check_loader(trainer)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by Lightning's connectors
            return  # which has no snapshots
        last = epoch_limit(trainer)
        if last and self.epoch >= last:
            raise ValueError(
                f"Expected argument `epoch` of DataCuration to be below {last}, the epochs of this run, but got "
                f"{self.epoch}: it would never act."
            )
        if not any(self._recorder.schedule.due(epoch) for epoch in range(-1, self.epoch)):
            raise ValueError(
                f"Expected a snapshot before epoch {self.epoch}, from which on DataCuration acts, but there is none in "
                "the `snapshots` of AttributionCallback. Let it begin later, or take snapshots earlier."
            )
        if trainer.global_step == 0:
            self.left_out, self.history = self.left_out[:0], {}  # a run of its own
        self.stopped, self._first = None, trainer.current_epoch > 0
        share = "drawn no more" if self.weight == 0 else f"drawn {self.weight:g} times as often"
        rank_zero_info(
            f"DataCuration changes this training: from epoch {self.epoch} on, the {self.fraction:.1%} of the samples "
            f"with the highest {self.by.replace('_', '-')} are {share}, and others of the epoch in their place."
        )

    @override
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Act on the last snapshot."""
        if self.stopped is None and trainer.current_epoch >= self.epoch:
            with self._guard.training(self._stand_down):
                self._act(trainer)

    def _act(self, trainer: L.Trainer) -> None:
        loader = self._guard.together(partial(self._draw_through, trainer))
        rows: Tensor | None = trainer.strategy.broadcast(self._news)
        self._news = None
        changed = rows is not None
        if rows is not None:
            self.left_out = rows
            self.history[trainer.current_epoch] = rows
        assert self._sampler is not None  # just made
        self._sampler.left_out, self._sampler.weight = frozenset(self.left_out.tolist()), self.weight
        if self._first and len(self.left_out) and loader.num_workers:
            iter(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]  # of a resumed run: workers have begun
        self._first = False
        if changed and trainer.is_global_zero:
            with self._guard.training(_logging_failed):
                self._log(trainer)

    def _check_loader(self, trainer: L.Trainer) -> Any:
        loader = trainer.train_dataloader
        problem = curable(loader)
        if problem is not None:
            raise AttributionError(
                "Expected a DataLoader over a map-style data set whose sampler chooses the samples, because that is "
                f"where DataCuration leaves some out, but {problem}. Do without DataCuration, or select samples before "
                "training: `result.select(0.9)` and `torch.utils.data.Subset`."
            )
        return loader

    def _draw_through(self, trainer: L.Trainer) -> Any:
        """Put the sampler into the loader, which may be another one in each epoch."""
        loader = self._check_loader(trainer)
        group: Any = loader.batch_sampler
        if group is self._group:
            return loader
        self._let_go()
        self._sampler = CuratedSampler(group.sampler, trainer.global_rank)
        self._sampler.set_epoch(trainer.current_epoch)
        group.sampler, self._group = self._sampler, group
        return loader

    def _log(self, trainer: L.Trainer) -> None:
        metrics = {"curation/left_out": float(len(self.left_out))}
        earlier = [rows for epoch, rows in self.history.items() if epoch < trainer.current_epoch]
        if earlier:
            metrics["curation/changed"] = float((~torch.isin(self.left_out, earlier[-1])).sum())
        noise = None if self._recorder is None else self._recorder.noise_mask
        if noise is not None and len(self.left_out):
            metrics["curation/noise_share"] = float(noise[self.left_out].double().mean())
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """See that the sampler drew rows."""
        if self.stopped is None and trainer.current_epoch >= self.epoch:
            with self._guard.training(self._stand_down):
                self._guard.together(self._check_rows)

    def _check_rows(self) -> None:
        if self._sampler is not None and self._sampler.stranger is not None:
            raise AttributionError(f"The sampler draws {self._sampler.stranger!r}, which is no row of the data set.")

    def _stand_down(self, error: Exception) -> None:
        self.stopped = describe(error)
        self._let_go()
        rank_zero_warn(f"DataCuration: {self.stopped} Training goes on, with all samples.")

    def _let_go(self) -> None:
        """Give the loader its own sampler back."""
        if self._group is not None and self._sampler is not None:
            self._group.sampler = self._sampler.sampler
        self._group = self._sampler = None

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the loader as it was."""
        self._let_go()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the loader as it was."""
        self._let_go()

    @override
    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the rows left out, since when, and what the last snapshot says."""
        return {"left_out": self.left_out, "history": dict(self.history), "news": self._news}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the rows of the checkpoint, until a snapshot revises them."""
        self.left_out, self.history = state_dict["left_out"], dict(state_dict["history"])
        self._news = state_dict["news"]


def _logging_failed(error: Exception) -> None:
    rank_zero_warn(f"DataCuration: the choice could not be logged, and holds all the same: {describe(error)}")
