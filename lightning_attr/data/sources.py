"""Which training data and which targets an attribution is about: from a datamodule, loaders, or the fit before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import (  # type: ignore[attr-defined]  # re-exported with its logger set up
    rank_zero_info,
    rank_zero_warn,
)

from lightning_attr.arguments.checks import check_choice
from lightning_attr.data.descriptions import form, same_form
from lightning_attr.data.loader import DataSource
from lightning_attr.errors import AttributionError
from lightning_attr.user_code.lightning_names import overrides

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

    Returns the data and how it is batched.
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
    train: DataSource | None = None,
) -> DataSource | None:
    """Find the targets.

    Returns the data and how it is batched; None for the training data itself.
    """
    check_choice("attribute", "targets", targets, ("auto", *_STAGES))
    if loaders is not None:
        return DataSource.of(loaders, "target")
    if targets == "train":
        return None
    if targets == "auto":
        return _first_usable(partial(_loaders, trainer, module, datamodule), train)
    found = _loaders(trainer, module, datamodule, targets)
    if found is None:
        raise ValueError(
            f"Expected targets of the kind {targets!r}, but neither datamodule nor module defines "
            f"`{targets}_dataloader`. Pass `target_dataloaders`, or another `targets`."
        )
    return DataSource.of(found, "target")


@contextmanager
def named_targets(train: DataSource, targets: DataSource | None) -> Iterator[None]:
    """Where targets fail that lack what training samples have, such as labels, say that.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> train, targets = (DataSource.of(DataLoader(rows), "any") for rows in ([(1.0, 0)], [(1.0,)]))
        >>> with named_targets(train, targets):
        ...     raise IndexError("list index out of range")
        Traceback (most recent call last):
        ...
        lightning_attr.errors.AttributionError: Expected targets that have what training samples have, ...
    """
    try:
        yield
    except AttributionError:  # which knows its cause
        raise
    except Exception as error:
        difference = None if targets is None else _difference(targets, train)
        if difference is None:
            raise
        raise AttributionError(
            f"Expected targets that have what training samples have, but {difference}. What is attributed of a target "
            "is computed as of a training sample, with its label. Choose labelled data by `targets` or "
            "`target_dataloaders`; `target_function` measures something else of targets without labels."
        ) from error


def _first_usable(loaders: Callable[[str], Any], train: DataSource | None) -> DataSource | None:
    """Take the first kind of targets that look like training samples, else the first there is; say what was passed."""
    passed: dict[str, str] = {}
    unlike: list[DataSource] = []
    unusable: list[Exception] = []
    for kind in ("predict", "test", "val"):
        try:
            found = loaders(kind)
        except Exception as error:  # of the user's own code: a base class's stub, data that are not there
            passed[kind] = f"raised {type(error).__name__}: {error}"
            continue
        if found is None:
            continue
        try:
            source = DataSource.of(found, "target")
        except (TypeError, ValueError) as error:
            passed[kind] = f"gives no targets: {error}"
            unusable.append(error)
            continue
        difference = None if train is None else _difference(source, train)
        if difference is None:
            _tell(rank_zero_info, f"those of `{kind}_dataloader`", passed)
            return source
        passed[kind] = f"gives others than training does: {difference}"
        unlike.append(source)
    if unlike:  # a module's own `attribution_step`, or the user's function of targets, may take them
        return unlike[0]
    if unusable:
        raise unusable[0]
    _tell(rank_zero_warn, "the training samples themselves", passed)
    return None


def _tell(say: Callable[[str], None], which: str, passed: Mapping[str, str]) -> None:
    """Say which targets were chosen, where others were passed over."""
    if passed:
        reasons = "; ".join(f"`{kind}_dataloader` {reason.rstrip('.')}" for kind, reason in passed.items())
        say(f"Attribution targets are {which}, because {reasons}. Choose others by `targets`.")


def _difference(targets: DataSource, train: DataSource) -> str | None:
    """Say what training samples have and targets lack, by the first of each; None where that is nothing."""
    batch, model = targets.wrapped_as(train).example(), train.example()
    if same_form(batch, model):
        return None
    return f"a batch of targets is {form(batch)} and one of training samples {form(model)}"


def _loaders(trainer: L.Trainer, module: L.LightningModule, datamodule: L.LightningDataModule | None, kind: str) -> Any:
    """Find the loaders of a kind of targets: those of the fit before, or what the hook gives; None without one."""
    fitted = kind == "val" and datamodule is getattr(trainer, "datamodule", None)
    found = trainer.val_dataloaders if fitted else None
    return _from_hooks(kind, trainer, module, datamodule) if found is None else found


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
