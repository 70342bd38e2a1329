"""The labels that a data set has at hand, all at once: which sample is the first that has none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset, TensorDataset

_NAMES = ("targets", "labels", "y")
_MOST_VALUES = 2**24


def without_label(dataset: Any) -> list[int]:
    """Find the first sample whose label is missing: negative, or with NaN.

    Returns its row, in a list; no row where all have labels, or where the data set has none at hand.
    """
    rows: Any = None
    while type(dataset) is Subset:
        chosen = np.asarray(dataset.indices)
        rows = chosen if rows is None else chosen[rows]
        dataset = dataset.dataset
    found = []
    for values in _labels(dataset):
        flat = values.reshape(len(values), -1)
        missing = (flat < 0).all(1) if values.dtype.kind == "i" else np.isnan(flat).any(1)
        found += np.flatnonzero(missing if rows is None else missing[rows])[:1].tolist()
    return [min(found)] if found else []


def _labels(dataset: Any) -> Iterator[Any]:
    """The arrays of integers and of floating point numbers that may be labels, one row per sample."""
    known = dataset.tensors if type(dataset) is TensorDataset else [getattr(dataset, name, None) for name in _NAMES]
    values: Any
    for values in known:
        if isinstance(values, torch.Tensor):
            dense = values.layout is torch.strided and values.device.type == "cpu" and not values.is_quantized
            values = values.detach().numpy() if dense and values.dtype is not torch.bfloat16 else None
        if isinstance(values, list) and len(values) <= _MOST_VALUES and all(type(value) is int for value in values):
            values = np.asarray(values)
        usable = isinstance(values, np.ndarray) and 0 < values.size <= _MOST_VALUES and values.dtype.kind in "if"
        if usable and len(values) == len(dataset):
            yield values
