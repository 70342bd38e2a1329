"""Weights and buffers of a module as safetensors, and back; a tied parameter is kept once, a sparse buffer by parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from lightning_attr.errors import StoreMismatchError


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """List parameters and buffers, those outside ``state_dict`` as well.

    Returns name -> tensor, not copied; a tied parameter under its first name only. A sparse tensor is there as its
    indices and values, under names of their own.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in chain(module.named_parameters(), module.named_buffers()):
        found.update(_parts(name, tensor.detach()))
    return found


def _parts(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A dense tensor itself; of a sparse one what it is made of."""
    if tensor.layout is torch.sparse_coo:
        return {f"{name}.indices": tensor._indices(), f"{name}.values": tensor._values()}
    if tensor.layout is torch.strided:
        return {name: tensor}
    by_row = tensor.layout in {torch.sparse_csr, torch.sparse_bsr}
    outer, inner = ("crow_indices", "col_indices") if by_row else ("ccol_indices", "row_indices")
    return {f"{name}.{part}": getattr(tensor, part)() for part in (outer, inner, "values")}


def load_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into a module, in place."""
    check_fits(module, weights)
    with torch.no_grad():
        for name, tensor in weights_of(module).items():
            _write(tensor, weights[name])


def check_fits(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Check that weights are those of a module of this layout.

    Example:
        >>> check_fits(nn.Linear(1, 1, bias=False), {"weight": torch.ones(1, 1)})
    """
    own = weights_of(module)
    different = sorted(
        name
        for name in own.keys() | weights.keys()
        if name not in own or name not in weights or own[name].shape != weights[name].shape
    )
    if different:
        raise StoreMismatchError(
            f"The snapshot does not fit {type(module).__name__}: {', '.join(different[:4])}"
            f"{' and more' if len(different) > 4 else ''} differ in presence or shape. Pass the model that was trained."
        )


def _write(tensor: Tensor, values: Tensor) -> None:
    with torch.inference_mode(tensor.is_inference()):
        if 0 not in tensor.stride() or tensor.numel() < 2:
            tensor.copy_(values)
        elif not torch.equal(tensor, values.to(tensor)):  # its elements share their memory: nobody can write to it
            tensor.data = values.to(tensor)


@contextmanager
def loaded(module: nn.Module) -> Iterator[None]:
    """Put the module's own weights back in the end."""
    before = {name: tensor.clone() for name, tensor in weights_of(module).items()}
    try:
        yield
    finally:
        load_weights(module, before)
