"""What a device cannot do, said by the name of the method that asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lightning_attr.batches.float64 import has_float64
from lightning_attr.errors import AttributionError
from lightning_attr.methods import AttributionMethod


@contextmanager
def named_float64(method: AttributionMethod, device: torch.device) -> Iterator[None]:
    """Name the method where it computes in float64 and the device has none, as Apple's.

    Example:
        >>> from lightning_attr.methods import TRAK
        >>> with named_float64(TRAK(), torch.device("cpu")):
        ...     pass
    """
    try:
        yield
    except TypeError as error:
        if "float64" not in str(error) or has_float64(device):
            raise
        name = type(method).__name__
        raise AttributionError(
            f'{name} runs the module and computes in float64, which devices of type "{device.type}" do not have. '
            'Attribute with a Trainer of accelerator="cpu" (it reads the stores of every device), or with a method on '
            "stored features, such as TRAK(), TracIn() or LoGra()."
        ) from error
