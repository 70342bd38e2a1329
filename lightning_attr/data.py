"""Which training data and which targets an attribution is about: from a datamodule, loaders, or the fit before."""

from __future__ import annotations

from typing import Any

import lightning as L

from lightning_attr.loader import DataSource
from lightning_attr.worlds import overrides

__all__ = ["target_source", "train_source"]

_STAGES = {"predict": "predict", "test": "test", "val": "validate", "train": "fit"}
"""Kind of targets -> stage that a datamodule is set up for."""


def train_source(
    trainer: L.Trainer,
    module: L.LightningModule,
    datamodule: L.LightningDataModule | None,
    loaders: Any = None,
    batch_size: int | None = None,
) -> DataSource:
    """Find the training data.

    Args:
        trainer: the trainer; after ``fit`` its own training loader is used, so that a random split stays what it was.
        module: the module, which may define ``train_dataloader``.
        datamodule: the datamodule, if any.
        loaders: training loader given by the user, which wins.
        batch_size: samples a batch; by default the loader's.

    Returns:
        The data and how it is batched.

    Raises:
        ValueError: if there is no training data.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> loader = DataLoader([1.0, 2.0], shuffle=True)
        >>> len(train_source(L.Trainer(logger=False, barebones=True), L.LightningModule(), None, loader))
        2
    """
    if loaders is None and (datamodule is None or datamodule is getattr(trainer, "datamodule", None)):
        loaders = trainer.train_dataloader
    if loaders is None:
        loaders = _from_hooks("train", trainer, module, datamodule)
    if loaders is None:
        raise ValueError(
            "Expected training data to attribute to, but found none. Pass a datamodule with `train_dataloader`, or "
            "`train_dataloaders`."
        )
    return DataSource.of(loaders, "training", batch_size)


def target_source(
    trainer: L.Trainer,
    module: L.LightningModule,
    datamodule: L.LightningDataModule | None,
    loaders: Any = None,
    targets: str = "auto",
) -> DataSource | None:
    """Find the targets.

    Args:
        trainer: the trainer; after ``fit`` its own validation loader is used.
        module: the module, which may define loaders itself.
        datamodule: the datamodule, if any.
        loaders: loader of the targets given by the user, which wins.
        targets: "predict", "test", "val" or "train"; "auto" takes the first of them that is defined.

    Returns:
        The data and how it is batched; None for the training data itself.

    Raises:
        ValueError: if ``targets`` is unknown, or there are no such targets.

    Example:
        >>> target_source(L.Trainer(logger=False, barebones=True), L.LightningModule(), None, targets="train") is None
        True
    """
    if targets not in ("auto", *_STAGES):
        raise ValueError(f"Expected argument `targets` to be one of {['auto', *_STAGES]}, but got {targets!r}.")
    if loaders is not None:
        return DataSource.of(loaders, "target")
    for kind in _STAGES if targets == "auto" else [targets]:
        if kind == "train":
            return None
        fitted = kind == "val" and datamodule is getattr(trainer, "datamodule", None)
        found = trainer.val_dataloaders if fitted else None
        if found is None:
            found = _from_hooks(kind, trainer, module, datamodule)
        if found is not None:
            return DataSource.of(found, "target")
    raise ValueError(
        f"Expected targets of the kind {targets!r}, but neither datamodule nor module defines `{targets}_dataloader`. "
        "Pass `target_dataloaders`, or another `targets`."
    )


def _from_hooks(
    kind: str, trainer: L.Trainer, module: L.LightningModule, datamodule: L.LightningDataModule | None
) -> Any:
    """Call the hook of the datamodule, or else of the module; None if neither defines it."""
    hook = f"{kind}_dataloader"
    owner = module if datamodule is None else datamodule
    if not overrides(hook, owner):
        return None
    if trainer.is_global_zero or (owner.prepare_data_per_node and trainer.local_rank == 0):
        owner.prepare_data()
    owner.setup(_STAGES[kind])
    return getattr(owner, hook)()
