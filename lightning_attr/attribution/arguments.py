"""The arguments of ``attribute``: what each has to be, and what is told to who passes something else."""

from __future__ import annotations

import inspect
from typing import Any

import lightning as L
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from lightning_attr.arguments.checks import check_callable, check_instance, check_numbers
from lightning_attr.arguments.messages import argument_message
from lightning_attr.data.memory import check_memory_budget
from lightning_attr.methods.base import check_method
from lightning_attr.user_code.lightning_names import both

MASK = "a mask with one True or False a training sample"
"""What a noise mask is, in messages."""


def by_position(first: Any, model: Any, datamodule: Any) -> tuple[Any, Any]:
    """Tell whether a model or a datamodule was passed by position.

    Returns both, model first.

    Example:
        >>> by_position(None, "model", "datamodule")
        ('model', 'datamodule')
    """
    if first is None:
        return model, datamodule
    is_model = isinstance(first, nn.Module) or (inspect.isclass(first) and issubclass(first, nn.Module))
    name, named = ("model", model) if is_model else ("datamodule", datamodule)
    if named is not None:
        raise TypeError(
            f"Expected argument `{name}` of attribute once, but got {type(first).__name__} by position and "
            f"{type(named).__name__} by name. Leave one of them out."
        )
    return (first, datamodule) if is_model else (model, first)


def check_attribute_arguments(
    owner: str,
    trainer: Any,
    datamodule: Any,
    model: Any,
    train_dataloaders: Any,
    target_dataloaders: Any,
    method: Any,
    memory_budget: Any,
    target_function: Any,
) -> None:
    """Check what can be told before anything is looked up.

    Example:
        >>> check_attribute_arguments("attribute", L.Trainer(barebones=True), None, None, None, None, None, 2**30, None)
    """
    check_instance(owner, "trainer", trainer, both(L.Trainer), "a Trainer")
    check_datamodule(owner, datamodule)
    if model is not None:
        check_instance(owner, "model", model, nn.Module, "a LightningModule")
    if method is not None:
        check_method(owner, method)
    for name, loaders in (("train_dataloaders", train_dataloaders), ("target_dataloaders", target_dataloaders)):
        check_loaders(owner, name, loaders)
    if memory_budget is not None:
        check_memory_budget(owner, memory_budget)
    if target_function is not None:
        check_callable(owner, "target_function", target_function, "a function (module, batch) -> (b,)")


def check_loaders(owner: object, name: str, loaders: Any) -> None:
    """Refuse what is no DataLoader, nor a collection of some; how many there may be is seen later."""
    found = tree_leaves(getattr(loaders, "iterables", loaders))
    if loaders is not None and not (found and all(isinstance(loader, DataLoader) for loader in found)):
        remedy = "Scores have one row for each dataset[i]: pass one DataLoader over one map-style data set."
        raise TypeError(argument_message(owner, name, "one torch DataLoader", loaders, remedy))


def check_datamodule(owner: object, datamodule: Any) -> None:
    """Check that what stands in the datamodule's place is one.

    Example:
        >>> check_datamodule("attribute", [1, 2])
        Traceback (most recent call last):
        ...
        TypeError: Expected argument `datamodule` of attribute to be a LightningDataModule, but got [1, 2]. Pass data
        by name instead: `train_dataloaders=DataLoader(dataset, batch_size=...)`, and `target_dataloaders=`.
    """
    kinds = both(L.LightningDataModule)
    if datamodule is None or isinstance(datamodule, kinds):
        return
    if inspect.isclass(datamodule) and issubclass(datamodule, kinds):
        remedy = f"Pass an object of it, such as `{datamodule.__name__}()`."
    elif isinstance(datamodule, DataLoader):
        remedy = "Pass loaders by name instead: `train_dataloaders=`, and `target_dataloaders=` for the targets."
    elif isinstance(datamodule, nn.Module):
        remedy = "Pass a module by name: `model=`."
    else:
        by_name = "`train_dataloaders=DataLoader(dataset, batch_size=...)`, and `target_dataloaders=`"
        remedy = f"Pass data by name instead: {by_name}."
    raise TypeError(argument_message(owner, "datamodule", "a LightningDataModule", datamodule, remedy))


def check_noise_mask(noise_mask: Any, num_rows: int, owner: object) -> Tensor | None:
    """Check that a noise mask fits the training data.

    Returns bool ``(num_rows,)``, or None.
    """
    if noise_mask is None:
        return None
    mask = check_numbers(owner, "noise_mask", noise_mask, MASK)
    if mask.shape != (num_rows,):
        raise ValueError(
            f"Expected argument `noise_mask` to have one entry a training sample, of shape ({num_rows},), but got "
            f"{tuple(mask.shape)}."
        )
    return given_mask(mask, owner).bool().cpu()


def given_mask(noise_mask: Any, owner: object) -> Tensor:
    """Check what can be told of a noise mask before there are data: it is a vector of True and False, or 0 and 1."""
    mask = check_numbers(owner, "noise_mask", noise_mask, MASK)
    if mask.ndim != 1:
        raise ValueError(argument_message(owner, "noise_mask", MASK, noise_mask))
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError(
            "Expected argument `noise_mask` to hold only True and False (or 0 and 1), but got other values."
        )
    return mask
