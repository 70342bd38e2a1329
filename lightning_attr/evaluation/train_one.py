"""How one model is trained: a fresh module and a fresh Trainer, on a subset of the datamodule's training data."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_attr.arguments.checks import check_choice, check_flag
from lightning_attr.data.loader import DataSource
from lightning_attr.data.sources import named_targets, target_source, train_source
from lightning_attr.errors import AttributionError, NonFiniteGradientError, StoreMismatchError
from lightning_attr.evaluation.factories import Factories
from lightning_attr.evaluation.loaders import subset_loader
from lightning_attr.evaluation.subsets import Retraining
from lightning_attr.evaluation.targets import digest_of_all, target_outputs
from lightning_attr.files.io import digest, whole_file
from lightning_attr.objectives.objective import check_module
from lightning_attr.randomness.streams import hashed_seed
from lightning_attr.user_code.generators import find_generators, reseed_generator, restore_generator
from lightning_attr.user_code.isolation import preserved_rng

_LIGHTNING_LOGS = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")


class LightningRetraining:
    """Trains a module from scratch on some of the training samples, and computes its output for every target.

    Args:
        module: makes a module.
        trainer: makes a Trainer.
        datamodule: makes a datamodule, or is one; None if the module has the loaders.
        targets: "predict", "test", "val" or "train"; "auto" takes the first of them that is defined.
        verbose: whether the Trainer may print.
        recipe: as :meth:`recipe` gave it; data that differ from it are refused.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> class Line(L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.slope = torch.nn.Parameter(torch.zeros(()))
        ...     def training_step(self, batch):
        ...         return (self.slope - batch[0]).square().mean()
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.5)
        ...     def train_dataloader(self):
        ...         return DataLoader(TensorDataset(torch.tensor([1.0, 2.0, 6.0])), batch_size=3)
        >>> def trainer():
        ...     return L.Trainer(max_epochs=1, logger=False, enable_checkpointing=False, accelerator="cpu")
        >>> train = LightningRetraining(Line, trainer, None, "train")
        >>> outputs, _ = train(Retraining(0, 0, 0), torch.tensor([True, True, False]))
        >>> outputs  # the mean of 1 and 2, and minus its squared distances
        tensor([ -0.2500,  -0.2500, -20.2500])
    """

    def __init__(
        self,
        module: Callable[[], L.LightningModule],
        trainer: Callable[[], L.Trainer],
        datamodule: Callable[[], L.LightningDataModule] | L.LightningDataModule | None,
        targets: str = "auto",
        verbose: bool = False,
        recipe: Mapping[str, Any] | None = None,
    ) -> None:
        check_choice("retrain_*", "targets", targets, ("auto", "predict", "test", "val", "train"))
        check_flag("retrain_*", "verbose", verbose)
        self.factories = Factories(module, trainer, datamodule, verbose)
        self.targets, self.verbose, self.expected = targets, verbose, recipe

    # Before the first training ------------------------------------------------------------------------------------

    def recipe(self) -> dict[str, Any]:
        """Make everything once without training, check it, and describe it.

        Returns name -> JSON value: what must not change between two retrainings.
        """
        with isolated(self.verbose):
            module, trainer, datamodule = self.factories.check()
            check_module(module)
            module.trainer = trainer
            if datamodule is not None:
                datamodule.trainer = trainer
            train = train_source(trainer, module, datamodule)
            subset_loader(train.loader, torch.ones(len(train), dtype=torch.bool))
            targets = target_source(trainer, module, datamodule, targets=self.targets, train=train) or train
            target_probe = targets.digest()
            return {
                "module": type(module).__name__,
                "parameters": digest({
                    f"{name} {tuple(p.shape)}": torch.empty(0) for name, p in module.named_parameters()
                }),
                "hyperparameters": {name: value for name, value in module.hparams.items() if _is_plain(value)},
                "max_epochs": trainer.max_epochs,
                "max_steps": trainer.max_steps,
                "accumulate_grad_batches": trainer.accumulate_grad_batches,
                "gradient_clip_val": trainer.gradient_clip_val,
                "precision": str(trainer.precision),
                "batch_size": train.batch_size,
                "n_train": len(train),
                "train_data": train.digest(),
                "targets": self.targets,
                "n_target": len(targets),
                "target_probe": target_probe,
                "target_data": digest_of_all(targets) if target_probe is not None else None,
            }

    # One training ---------------------------------------------------------------------------------------------------

    def __call__(
        self,
        retraining: Retraining,
        kept: Tensor,
        beat: Callable[[], None] = lambda: None,
        checkpoint: Path | None = None,
    ) -> tuple[Tensor, dict[str, object]]:
        """Train one model; see :class:`lightning_attr.evaluation.queue.Train`."""
        with isolated(self.verbose):
            fitted = self.fit(retraining, kept, beat)
            if checkpoint is not None:
                save_checkpoint(fitted.trainer, checkpoint)
            return self.outputs(retraining, fitted, beat), {"global_step": fitted.trainer.global_step}

    def fit(
        self,
        retraining: Retraining,
        kept: Tensor,
        beat: Callable[[], None] = lambda: None,
        callbacks: Sequence[L.Callback] = (),
    ) -> Fitted:
        """Train one model, and keep what trained it; to be called in :func:`isolated`.

        Returns the model, and all that was made with it.
        """
        L.seed_everything(retraining.seed, verbose=False)
        module, trainer = self.factories.module(), self.factories.trainer()
        trainer.callbacks.extend([Beat(beat), *callbacks])  # type: ignore[attr-defined]  # set by its connector
        datamodule = self.factories.datamodule()
        hook = _SubsetHook(retraining, kept, self.expected)
        with hook.installed(datamodule if datamodule is not None else module):
            trainer.fit(module, datamodule=datamodule)
        _check_trained(retraining, trainer, module)
        assert hook.source is not None  # the hook was called, or there were no steps
        targets = target_source(trainer, module, datamodule, targets=self.targets, train=hook.source) or hook.source
        _check_data(retraining, targets, self.expected, "target")
        return Fitted(module, trainer, datamodule, hook.source, targets)

    def outputs(self, retraining: Retraining, fitted: Fitted, beat: Callable[[], None] = lambda: None) -> Tensor:
        """Compute the outputs of a model; to be called in :func:`isolated`.

        Returns ``(n_target,)``, on the CPU.
        """
        train, targets = fitted.train, fitted.targets
        try:
            with named_targets(train, targets):
                return target_outputs(fitted.trainer, fitted.module, fitted.datamodule, targets, beat, train)
        except NonFiniteGradientError as error:
            raise AttributionError(diverged(retraining, str(error))) from error


@dataclass(frozen=True)
class Fitted:
    """A trained model, and all that was made with it.

    Args:
        module: the model.
        trainer: its Trainer.
        datamodule: the datamodule, if any.
        train: all training data, with the user's own loader.
        targets: the targets.
    """

    module: L.LightningModule
    trainer: L.Trainer
    datamodule: L.LightningDataModule | None
    train: DataSource
    targets: DataSource


class _SubsetHook:
    """Stands in for ``train_dataloader`` during one fit."""

    def __init__(self, retraining: Retraining, kept: Tensor, expected: Mapping[str, Any] | None) -> None:
        self.retraining, self.kept, self.expected = retraining, kept, expected
        self.source: DataSource | None = None
        self.calls = 0
        self.restore: list[Callable[[], object]] = []

    @contextmanager
    def installed(self, owner: Any) -> Iterator[None]:
        """Put it into the object that has the loader, for a while."""
        original = owner.train_dataloader
        own = vars(owner).get("train_dataloader")

        def train_dataloader() -> Any:
            return self.loaders(original())

        owner.train_dataloader = train_dataloader
        try:
            yield
        finally:
            for restore in reversed(self.restore):  # a shared datamodule keeps its generators as they were
                restore()
            del owner.train_dataloader
            if own is not None:
                owner.train_dataloader = own

    def loaders(self, given: Any) -> Any:
        """Give the subset's loader, in a list or dict if the user's is in one."""
        self.source = DataSource.of(given, "training")
        _check_data(self.retraining, self.source, self.expected, "train")
        loader = subset_loader(self.source.loader, self.kept)
        if len(loader) == 0:
            raise AttributionError(
                f"The retraining of {self.retraining} would take 0 optimizer steps: its {int(self.kept.sum())} samples "
                f"do not fill a batch of {self.source.batch_size} (drop_last=True). Use a smaller batch size, or "
                "larger subsets. The results of other retrainings were not changed."
            )
        # What a datamodule drew before, which depends on what it has cached, must not matter.
        self.restore += seed_training(loader, self.retraining, self.calls)
        self.calls += 1
        if isinstance(given, DataLoader):
            return loader
        return dict.fromkeys(given, loader) if isinstance(given, dict) else [loader]


def seed_training(loader: DataLoader[Any], retraining: Retraining, number: int = 0) -> list[Callable[[], object]]:
    """Seed all that is random in a training.

    Returns functions that put the generators of the loader back.
    """
    seed = hashed_seed("training", retraining.seed, number)
    L.seed_everything(seed % 2**32, verbose=False)
    generators = find_generators(loader)
    restores = [restore_generator(generator) for generator in generators]
    for generator in generators:
        reseed_generator(generator, seed)
    return restores


class Beat(L.Callback):
    """Shows other processes that this training is alive.

    Args:
        beat: what shows it, called after each batch.
    """

    def __init__(self, beat: Callable[[], None]) -> None:
        self.beat = beat

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Beat."""
        self.beat()

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Beat."""
        self.beat()


def _check_data(retraining: Retraining, source: DataSource, expected: Mapping[str, Any] | None, role: str) -> None:
    """Refuse other data than the ground truth is about."""
    if expected is None:
        return
    length, probe = expected[f"n_{role}"], expected["train_data" if role == "train" else "target_probe"]
    if len(source) != length or (probe is not None and source.digest() != probe):
        raise StoreMismatchError(
            f"The {source.role} data of {retraining} are not those of the retrainings before: {length} samples were "
            f"expected, and {len(source)} found{'' if len(source) != length else ', which differ'}. Subsets name "
            "samples by index: a random split needs a fixed seed (generator=torch.Generator().manual_seed(...)). The "
            "results of other retrainings were not changed."
        )


def _check_trained(retraining: Retraining, trainer: L.Trainer, module: L.LightningModule) -> None:
    if not trainer.state.finished:
        raise AttributionError(f"The retraining of {retraining} was interrupted; run again to go on.")
    if trainer.global_step == 0:
        raise AttributionError(
            f"The retraining of {retraining} took 0 optimizer steps. Look at the Trainer's limits (max_epochs, "
            "max_steps, limit_train_batches). The results of other retrainings were not changed."
        )
    for name, weight in module.named_parameters():
        if not weight.isfinite().all():
            raise AttributionError(diverged(retraining, f"its parameter `{name}` holds NaN or Inf."))


def diverged(retraining: Retraining, why: str) -> str:
    """Say that a retraining failed."""
    return (
        f"The retraining of {retraining} diverged: {why} Lower the learning rate, or clip gradients, in another "
        "directory. The results of other retrainings were not changed."
    )


def save_checkpoint(trainer: L.Trainer, path: Path) -> None:
    """Keep the weights of a Trainer's module, whole or not at all."""
    with whole_file(path) as temporary:
        trainer.save_checkpoint(temporary, weights_only=True)


@contextmanager
def isolated(verbose: bool) -> Iterator[None]:
    """Put random streams and Lightning's environment variables back, and keep Lightning quiet meanwhile."""
    names = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    loggers = [logging.getLogger(name) for name in _LIGHTNING_LOGS]
    levels = [logger.level for logger in loggers]
    try:
        with preserved_rng():
            if not verbose:
                for logger in loggers:
                    logger.setLevel(max(logger.level, logging.WARNING))
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(before)


def _is_plain(value: object) -> bool:
    return isinstance(value, (str, int, float, bool, type(None)))
