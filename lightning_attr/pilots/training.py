"""Trains the pilots that a store misses, one after the other; what is finished is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]  # re-exported
from torch.utils._pytree import tree_unflatten
from tqdm.auto import tqdm  # type: ignore[import-untyped]  # comes with lightning, and ships no types

from lightning_attr.data.loader import DataSource
from lightning_attr.errors import AttributionError, StoreMismatchError
from lightning_attr.evaluation.factories import Factories
from lightning_attr.evaluation.subsets import Retraining
from lightning_attr.evaluation.train_one import isolated, seed_training
from lightning_attr.files.writer_lock import WriterLock
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.parameters.optimizer_state import OptimizerState
from lightning_attr.parameters.trainable import trainable_names
from lightning_attr.pilots.again import module_again, trainer_again
from lightning_attr.pilots.decay import DecayToZero
from lightning_attr.pilots.request import Pilots, pilot_epochs
from lightning_attr.pilots.run import RecordedRun, weights_on_cpu
from lightning_attr.randomness.streams import hashed_seed
from lightning_attr.store.feature_store import FeatureStore
from lightning_attr.user_code.step_world import silent_loggers


def train_pilots(
    path: Path | None,
    wanted: Pilots,
    trainer: L.Trainer,
    module: L.LightningModule,
    datamodule: L.LightningDataModule | None,
    train: DataSource,
    optimizer_state: bool = False,
) -> None:
    """Train what is missing of the pilots of a store; nothing where they are all there.

    Each begins from a seed of its own, which depends on the run and its number alone, and is kept as a snapshot when it
    has ended. One that is killed leaves nothing behind.

    Args:
        path: of the store; None where nothing is kept.
        wanted: how many, and how they are made.
        trainer: the user's, for its settings.
        module: the user's, of the recorded run.
        datamodule: the user's, if any.
        train: the training data, with the loader that pilots train by.
        optimizer_state: whether a method needs what the optimizer knew at the end.

    Raises:
        AttributionError: if there is no recorded run, module or Trainer cannot be made again, or a pilot failed.
        StoreMismatchError: if pilots are of another length, or the module made again is another one.

    See :func:`lightning_attr.attribution.trainer.attribute` for its use.
    """
    if path is None or not FeatureStore.exists(path):
        where = "and nothing is kept here" if path is None else f"but {path} holds none yet"
        raise AttributionError(
            f"Pilots are kept in the store of a recorded run, {where}. Fit with AttributionCallback(dirpath=...), or "
            "name its `store`."
        )
    run = RecordedRun(FeatureStore.open(path, writer=trainer.is_global_zero), trainer, module, datamodule, train)
    there = _there(run.store, wanted)
    missing = wanted.count - len(there)
    if missing <= 0:
        return
    epochs = wanted.epochs or (pilot_epochs(run.epochs, run.last.global_step, module) if run.epochs else 0)
    if not epochs:
        raise AttributionError(
            f"Pilots train for a share of the epochs of the recorded run, but {path} does not tell how many it had. "
            f"Say how long: `pilots=Pilots({wanted.count}, epochs=...)`."
        )
    make_module = wanted.module or module_again(module, wanted.count)
    make_trainer = wanted.trainer or trainer_again(trainer, max(run.epochs, epochs), wanted.count)
    factories = Factories(make_module, lambda: _checked(make_trainer(epochs), epochs), None)
    _announce(run, missing, epochs)
    with WriterLock(path) as lock, _bar(trainer, missing) as count:
        for number in range(max(there, default=-1) + 1, max(there, default=-1) + 1 + missing):
            _train(run, factories, number, optimizer_state, [lock.beat, count])


def _there(store: FeatureStore, wanted: Pilots) -> list[int]:
    """List the numbers of the pilots that a store has; refuse them if they are of another length than asked for."""
    found = [(snapshot, snapshot.pilot) for snapshot in store.snapshots if snapshot.pilot is not None]
    others = [snapshot for snapshot, _ in found if wanted.epochs not in {None, snapshot.epoch + 1}]
    if others:
        keys = [snapshot.key for snapshot in others]
        raise StoreMismatchError(
            f"{store.path} has pilots of {others[0].epoch + 1} epoch(s), but here `epochs` is {wanted.epochs}. Leave "
            f"`epochs` out to use them, or call `FeatureStore.open({str(store.path)!r}).set_aside({keys})` before."
        )
    return [number for _, number in found]


def _checked(trainer: L.Trainer, epochs: int) -> L.Trainer:
    if getattr(trainer, "max_epochs", epochs) != epochs:
        raise AttributionError(
            f"Expected the function `trainer` of Pilots to make a Trainer with max_epochs={epochs}, the epochs that it "
            f"is called with, but its max_epochs is {trainer.max_epochs}."
        )
    return trainer


def _announce(run: RecordedRun, missing: int, epochs: int) -> None:
    """Say what it will cost, before it starts."""
    what = f"Training {missing} pilot(s), fresh modules of {type(run.module).__name__}, for {epochs} epoch(s) each"
    cost = f" of the run's {run.epochs}: {missing * run.steps_of(epochs):,} optimizer steps together"
    cost += f", {missing * epochs / max(1, run.epochs):.2f} of what the run took"
    rank_zero_info(f"{what}{cost if run.epochs else ''}. They are kept in {run.store.path}.")


@contextmanager
def _bar(trainer: L.Trainer, missing: int) -> Iterator[Callable[[int], None]]:
    """Show progress where the user's Trainer does."""
    with tqdm(desc="Pilots", unit="batch", disable=trainer.progress_bar_callback is None) as bar:

        def count(batches: int) -> None:
            if bar.total is None:
                bar.reset(total=missing * batches)
            bar.update()

        yield count


class _Watch(L.Callback):
    """Looks at Trainer and loader before the first step, and shows that the work goes on."""

    def __init__(self, run: RecordedRun, optimizer_state: bool, beats: list[Any]) -> None:
        self.run, self.optimizer_state = run, optimizer_state
        self.beat, self.count = beats
        self.state: OptimizerState | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.run.check_trainer(trainer)
        self.run.check_beginning(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        self.beat()
        self.count(_batches(self.run, trainer))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.state = OptimizerState.of(trainer.optimizers, pl_module) if self.optimizer_state else None


def _train(run: RecordedRun, factories: Factories, number: int, optimizer_state: bool, beats: list[Any]) -> None:
    """Train one pilot, and keep its end."""
    seed = hashed_seed("pilot", run.store.manifest.run or run.store.manifest.id, number) % 2**32
    watch, decay = _Watch(run, optimizer_state, beats), DecayToZero(lambda trainer: _batches(run, trainer))
    with isolated(verbose=False):
        L.seed_everything(seed, verbose=False)
        module, trainer = factories.module(), factories.trainer()
        run.check_module(module)
        trainer.callbacks.extend([watch, decay])  # type: ignore[attr-defined]  # set by its connector
        restores = seed_training(run.train.loader, Retraining(0, number, seed))
        try:
            with silent_loggers(trainer), _data(run) as data:
                trainer.fit(module, **data)
        finally:
            for restore in reversed(restores):
                restore()
    run.check_trained(number, module, trainer)
    mean, rates = decay.rates.of(ParameterLayout.of(module))
    run.store.add_snapshot(
        f"pilot={number:04d}",
        weights_on_cpu(module),
        epoch=max(0, trainer.current_epoch - 1),
        global_step=trainer.global_step,
        learning_rate=mean,
        optimizer=None if watch.state is None else watch.state.tensors(),
        trainable=trainable_names(module),
        rates=rates,
        pilot=number,
    )


def _batches(run: RecordedRun, trainer: L.Trainer) -> int:
    """Count the batches of a pilot; a stream's by its samples."""
    batches = trainer.num_training_batches
    if math.isinf(batches):
        batches = math.ceil(len(run.train) / run.train.batch_size)
    whole = int(batches) * (trainer.max_epochs or 1)
    return whole if trainer.max_steps == -1 else min(whole, trainer.max_steps * trainer.accumulate_grad_batches)


@contextmanager
def _data(run: RecordedRun) -> Iterator[dict[str, Any]]:
    """Give a fit the loader of the run: by itself, or through the datamodule, whose other hooks it needs."""
    loader, datamodule = tree_unflatten([run.train.loader], run.train.structure), run.datamodule
    if datamodule is None:
        yield {"train_dataloaders": loader}
        return
    before, trainer = vars(datamodule).get("train_dataloader"), datamodule.trainer
    datamodule.train_dataloader = lambda: loader  # type: ignore[method-assign]  # for this fit
    try:
        yield {"datamodule": datamodule}
    finally:
        del datamodule.train_dataloader
        if before is not None:
            datamodule.train_dataloader = before  # type: ignore[method-assign]
        datamodule.trainer = trainer
