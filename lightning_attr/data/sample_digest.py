"""Hashes of samples, to tell whether two readings or two data sets are the same."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from lightning_attr.batches.nested import dense_parts


def sample_digest(samples: Iterable[Any]) -> str:
    """Hash the content of samples.

    Example:
        >>> sample_digest([torch.zeros(2)]) == sample_digest([torch.zeros(4)[::2]])
        True
    """
    digest = hashlib.sha256()
    for sample in samples:
        _update(digest.update, sample)
    return digest.hexdigest()[:16]


def _update(update: Callable[[bytes], None], sample: Any) -> None:
    """Feed the content of a sample to a hash: bytes of arrays, pickles of anything else, where it has one."""
    if isinstance(sample, torch.Tensor) and sample.layout != torch.strided:
        _update(update, dense_parts(sample.detach()))
    elif isinstance(sample, torch.Tensor):
        sample = sample.detach().cpu()
        update(str((sample.dtype, tuple(sample.shape))).encode())
        # One value sliced from a column keeps the stride of its row, although it is contiguous.
        flat = torch.empty(sample.numel(), dtype=sample.dtype).copy_(sample.reshape(-1))
        update(flat.view(torch.uint8).numpy().tobytes() if sample.numel() else b"")
    elif isinstance(sample, dict):
        for key, value in sample.items():
            update(str(key).encode())
            _update(update, value)
    elif isinstance(sample, (list, tuple)):
        for value in sample:
            _update(update, value)
    elif isinstance(sample, (np.ndarray, np.generic)) and not sample.dtype.hasobject:
        update(str((sample.dtype.str, sample.shape)).encode())
        update(sample.tobytes())
    else:
        try:
            update(pickle.dumps(sample, protocol=4))
        except Exception:  # whatever its own hooks raise; samples need not be picklable
            update(type(sample).__qualname__.encode())
