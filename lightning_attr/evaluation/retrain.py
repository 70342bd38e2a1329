"""Ground truth by retraining: on random subsets, without single samples, without sets of samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
from torch import Tensor

from lightning_attr.arguments.checks import check_flag, check_int, check_path
from lightning_attr.evaluation.ground_truth import GroundTruth, Records
from lightning_attr.evaluation.queue import Train, fill, fill_in_processes
from lightning_attr.evaluation.subsets import RetrainingPlan, check_plan, leave_one_out, random_subsets, removals
from lightning_attr.evaluation.train_one import LightningRetraining
from lightning_attr.evaluation.vectorised.retraining import VectorisedRetraining, check_vectorise

_Module = Callable[[], L.LightningModule]
_Trainer = Callable[[], L.Trainer]
_Data = Callable[[], L.LightningDataModule] | L.LightningDataModule | None
_Vectorise = bool | int | Literal["auto"]


def retrain_lds(
    module: _Module,
    trainer: _Trainer,
    datamodule: _Data = None,
    *,
    dirpath: str | Path,
    num_subsets: int = 100,
    alpha: float = 0.5,
    seeds: int = 3,
    seed: int = 0,
    targets: str = "auto",
    num_workers: int = 1,
    vectorise: _Vectorise = False,
    keep_checkpoints: bool = False,
    progress: bool = True,
    verbose: bool = False,
) -> GroundTruth:
    """Retrain on random subsets of the training data: the ground truth of the linear datamodeling score.

    Each retraining has a module and a Trainer of its own, from your functions, and your datamodule, whose training data
    set is replaced by a subset of it: same batch size, shuffling, collation and workers. Its seed depends on ``seed``,
    subset and repeat alone, so that results do not depend on the order, on the number of processes, or on restarts.

    Each finished model's outputs are written at once. A call that was killed goes on when it is repeated, and calls in
    several processes or on several machines share a directory: each takes retrainings that no other has, and all return
    when everything is finished.

    Give Trainers ``logger=False, enable_checkpointing=False``: what loggers and checkpoint callbacks write is not
    looked after here. Progress bar and model summary are left out unless ``verbose``.

    With a LightningCLI, the functions build from its config; its own seed has to be switched off::

        def cli():
            arguments = ["--config=config.yaml", "--seed_everything=false"]
            return LightningCLI(Model, Data, run=False, args=arguments, save_config_callback=None)

        retrain_lds(lambda: cli().model, lambda: cli().trainer, lambda: cli().datamodule, dirpath="truth")

    Args:
        module: makes a module, new in each call: a class, or any function.
        trainer: makes a Trainer with the configuration of the real run, for one device, new in each call with all its
            callbacks.
        datamodule: makes a datamodule; or a datamodule, if ``setup`` may be called on it again and again; or None, if
            the module has the loaders. A random split needs a fixed seed.
        dirpath: directory of the ground truth.
        num_subsets: how many subsets.
        alpha: share of the training samples in each, in (0, 1).
        seeds: how often to train on each subset.
        seed: what subsets and all seeds depend on.
        targets: "predict", "test", "val" or "train"; "auto" takes the first of them that the datamodule defines.
        num_workers: how many to train at a time, each in a process with as many threads as this one has. The functions
            have to be importable then (no lambda), and a script needs ``if __name__ == "__main__":``. To use several
            machines, or functions that are not importable, start the same script several times instead.
        vectorise: whether each process trains many small models at once, with stacked parameters under
            ``torch.func.vmap``. "auto" does so where it gives what the Trainer gives, up to rounding, and says in the
            log why not where it does not; True or a number of models to train at once raises an error there instead.
            The Trainer trains one model for each size of subset, whose steps, learning rates and order of samples all
            others follow, and with which the first of them is compared. That needs one SGD, Adam or AdamW optimizer
            (any schedule), tensors as samples that are the same in each epoch, precision "32-true" or "64-true", no
            validation during training (``limit_val_batches=0``), and no dropout, gradient clipping, gradient
            accumulation, training hooks or callbacks that act on training. Loggers and checkpoint callbacks see only
            the Trainer's own models. Sizes that fewer than four subsets have are trained one at a time. Which models
            are at once shows in the last digits of results.
        keep_checkpoints: whether to keep each model (its weights), as ``checkpoints/subset=<k>-repeat=<r>.ckpt``.
        progress: whether to show a progress bar with the time left.
        verbose: whether the Trainers may show their own.

    Returns:
        The ground truth; ``masks`` and ``outputs`` are what
        :func:`lightning_attr.metrics.linear_datamodeling_score` takes.

    Raises:
        AttributionError: if a factory returns the same object twice or sets the seed itself, the Trainer never ends, a
            retraining took 0 steps or diverged, or ``vectorise`` demands what is not possible.
        StoreMismatchError: if the directory holds ground truth of other data or arguments; it is not changed.
        TypeError: if a factory makes something else, the module cannot be attributed, or the training data have no
            indices.
        ValueError: if an argument is out of its range, or data are missing.

    Example:
        >>> import lightning as L, tempfile, torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from lightning_attr import AttributionMixin
        >>> class Classifier(AttributionMixin, L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(2, 2)
        ...     def forward(self, x):
        ...         return self.layer(x)
        ...     def training_step(self, batch):
        ...         return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> class Data(L.LightningDataModule):
        ...     def train_dataloader(self):
        ...         x, y = torch.eye(2).repeat(4, 1), torch.tensor([0, 1]).repeat(4)
        ...         return DataLoader(TensorDataset(x, y), batch_size=2, shuffle=True)
        >>> def trainer():
        ...     return L.Trainer(max_epochs=1, logger=False, enable_checkpointing=False, accelerator="cpu")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     truth = retrain_lds(
        ...         Classifier, trainer, Data, dirpath=folder, num_subsets=3, seeds=2, targets="train", progress=False
        ...     )
        >>> truth.masks.shape, truth.outputs.shape
        (torch.Size([3, 8]), torch.Size([2, 3, 8]))
    """
    plan = partial(random_subsets, num_subsets=num_subsets, alpha=alpha, repeats=seeds, seed=seed)
    make = partial(LightningRetraining, module, trainer, datamodule, targets, verbose)
    return _retrain(plan, make, dirpath, num_workers, vectorise, keep_checkpoints, progress)


def retrain_loo(
    module: _Module,
    trainer: _Trainer,
    datamodule: _Data = None,
    *,
    dirpath: str | Path,
    indices: Sequence[int] | Tensor,
    seeds: int = 3,
    seed: int = 0,
    targets: str = "auto",
    num_workers: int = 1,
    vectorise: _Vectorise = False,
    keep_checkpoints: bool = False,
    progress: bool = True,
    verbose: bool = False,
) -> GroundTruth:
    """Retrain without each of some training samples, and on the full set.

    With the same seed, all sets start from the same weights and see what they have in common in the same order; else as
    :func:`retrain_lds`.

    Args:
        module: makes a module, as for :func:`retrain_lds`.
        trainer: makes a Trainer, likewise.
        datamodule: makes a datamodule, likewise.
        dirpath: directory of the ground truth.
        indices: the samples to leave out, one at a time.
        seeds: how often to train on each set.
        seed: what all seeds depend on.
        targets: as for :func:`retrain_lds`.
        num_workers: as for :func:`retrain_lds`.
        vectorise: as for :func:`retrain_lds`.
        keep_checkpoints: as for :func:`retrain_lds`.
        progress: as for :func:`retrain_lds`.
        verbose: as for :func:`retrain_lds`.

    Returns:
        The ground truth: subset 0 is the full set, subset ``1 + i`` lacks ``indices[i]``. Its ``effects`` ``(seeds,
        len(indices), n_target)`` are positive where the sample helps the target.

    Raises:
        ValueError: if there are no indices, or one is out of range or given twice; else as :func:`retrain_lds`.

    Example:
        >>> import tempfile, torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> class Mean(L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.mean = torch.nn.Parameter(torch.zeros(()))
        ...     def training_step(self, batch):
        ...         return (self.mean - batch[0]).square().mean()
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.5)
        ...     def train_dataloader(self):
        ...         return DataLoader(TensorDataset(torch.tensor([1.0, 2.0, 6.0])), batch_size=3)
        >>> def trainer():
        ...     return L.Trainer(max_epochs=1, logger=False, enable_checkpointing=False, accelerator="cpu")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     truth = retrain_loo(Mean, trainer, dirpath=folder, indices=[2], seeds=1, progress=False)
        >>> truth.effects  # the third sample helps itself and harms the others
        tensor([[[-3.7500, -0.7500, 11.2500]]])
    """
    plan = partial(leave_one_out, indices=indices, repeats=seeds, seed=seed)
    make = partial(LightningRetraining, module, trainer, datamodule, targets, verbose)
    return _retrain(plan, make, dirpath, num_workers, vectorise, keep_checkpoints, progress)


def retrain_without(
    module: _Module,
    trainer: _Trainer,
    datamodule: _Data = None,
    *,
    dirpath: str | Path,
    index_sets: Sequence[Sequence[int] | Tensor],
    seeds: int = 3,
    seed: int = 0,
    targets: str = "auto",
    num_workers: int = 1,
    vectorise: _Vectorise = False,
    keep_checkpoints: bool = False,
    progress: bool = True,
    verbose: bool = False,
) -> GroundTruth:
    """Retrain without each of some sets of training samples, and on the full set.

    That is counterfactual removal, brittleness and data selection; else as :func:`retrain_loo`.

    Args:
        module: makes a module, as for :func:`retrain_lds`.
        trainer: makes a Trainer, likewise.
        datamodule: makes a datamodule, likewise.
        dirpath: directory of the ground truth.
        index_sets: the samples to remove, one set at a time.
        seeds: how often to train on each set.
        seed: what all seeds depend on.
        targets: as for :func:`retrain_lds`.
        num_workers: as for :func:`retrain_lds`.
        vectorise: as for :func:`retrain_lds`.
        keep_checkpoints: as for :func:`retrain_lds`.
        progress: as for :func:`retrain_lds`.
        verbose: as for :func:`retrain_lds`.

    Returns:
        The ground truth: subset 0 is the full set, subset ``1 + i`` lacks ``index_sets[i]``.

    Raises:
        ValueError: if there are no sets, one is empty or everything, or an index is out of range or given twice; else
            as :func:`retrain_lds`.

    Example:
        >>> import tempfile, torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> class Mean(L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.mean = torch.nn.Parameter(torch.zeros(()))
        ...     def training_step(self, batch):
        ...         return (self.mean - batch[0]).square().mean()
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.5)
        ...     def train_dataloader(self):
        ...         return DataLoader(TensorDataset(torch.tensor([1.0, 2.0, 6.0])), batch_size=3)
        >>> def trainer():
        ...     return L.Trainer(max_epochs=1, logger=False, enable_checkpointing=False, accelerator="cpu")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sets = [[0, 1], [2]]
        ...     truth = retrain_without(Mean, trainer, dirpath=folder, index_sets=sets, seeds=1, progress=False)
        >>> truth.removed, truth.outputs.shape
        ([[0, 1], [2]], torch.Size([1, 3, 3]))
    """
    plan = partial(removals, index_sets=index_sets, repeats=seeds, seed=seed)
    make = partial(LightningRetraining, module, trainer, datamodule, targets, verbose)
    return _retrain(plan, make, dirpath, num_workers, vectorise, keep_checkpoints, progress)


def _retrain(
    make_plan: partial[RetrainingPlan],
    make_train: Callable[..., LightningRetraining],
    dirpath: str | Path,
    num_workers: int,
    vectorise: _Vectorise,
    keep_checkpoints: bool,
    progress: bool,
) -> GroundTruth:
    folder = check_path("retrain_*", "dirpath", dirpath).absolute()  # the functions may change the working directory
    num_workers = check_int("retrain_*", "num_workers", num_workers, minimum=1)
    check_flag("retrain_*", "keep_checkpoints", keep_checkpoints)
    check_flag("retrain_*", "progress", progress)
    check_vectorise(vectorise)
    check_plan(**make_plan.keywords)
    recipe = make_train().recipe()
    records = Records.prepare(folder, make_plan(recipe["n_train"]), recipe)
    make = partial(_train, make_train, recipe, vectorise)
    if num_workers == 1 or not records.unfinished():
        fill(records, make(), keep_checkpoints, progress)
    else:
        fill_in_processes(records, make, num_workers, keep_checkpoints, progress)
    return GroundTruth.open(folder)


def _train(make_train: Callable[..., LightningRetraining], recipe: Mapping[str, Any], vectorise: _Vectorise) -> Train:
    one = make_train(recipe=recipe)
    return one if vectorise is False else VectorisedRetraining(one, vectorise)
