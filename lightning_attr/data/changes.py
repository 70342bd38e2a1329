"""Training data that are others than at the start: reloaded loaders, curricula, data sets that grow."""

from __future__ import annotations

from typing import Any

from lightning_attr.data.loader import DataSource
from lightning_attr.data.loader_forms import single_loader


def changed_data(source: DataSource, digest: str | None, loaders: Any) -> str | None:
    """Say how the data that are trained on now differ from those whose rows are attributed.

    Returns a sentence for the user; None if nothing differs.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> source = DataSource.of(DataLoader([1.0, 2.0]), "training")
        >>> changed_data(source, source.digest(), DataLoader([1.0, 2.0]))
        >>> print(changed_data(source, source.digest(), DataLoader([1.0, 3.0])))
        The training data are others than when training began: ... Scores have the rows of the first data set...
    """
    if loaders is None:
        return None
    dataset: Any = single_loader(loaders, source.role)[0].dataset
    given: Any = source.loader.dataset
    if dataset is given and given is not source.dataset:
        return None  # a stream, of which a pass is kept
    name, before = type(dataset).__name__, len(source)
    now = len(dataset) if hasattr(dataset, "__len__") else before
    if now != before:
        found = f"{name} has {now} samples, and had {before}"
    elif dataset is not given and given is not source.dataset:
        found = f"another {name} is read"
    elif (
        digest is not None
        and DataSource(dataset, 1, source.loader, source.role, reading=source.reading).digest() != digest
    ):
        found = f"{name} gives other samples for the same indices"
    else:
        return None
    return (
        f"The training data are others than when training began: {found} (reload_dataloaders_every_n_epochs, a "
        "curriculum). Scores have the rows of the first data set, whatever was trained on later. To attribute to all, "
        "train on one data set that holds them all, with a sampler that chooses what each epoch sees."
    )


def _digest(dataset: Any, source: DataSource) -> str | None:
    return DataSource(dataset, 1, source.loader, source.role, reading=source.reading).digest()
