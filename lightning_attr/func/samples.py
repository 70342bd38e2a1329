"""Functions of one sample, run on many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_attr.batches.nested import map_tensors
from lightning_attr.func.hessian import differentiated
from lightning_attr.func.settings import check_in_dims
from lightning_attr.gradients.plain_execution import plain_execution

InDims: TypeAlias = Sequence[int | None]


def sample_dims(x: Sequence[Any], argnums: int, in_dims: InDims | None) -> tuple[int | None, ...]:
    """Say which dimension of each argument runs over the samples.

    Returns one dimension, or None, for each argument.
    """
    differentiated(x, argnums)
    check_in_dims(in_dims)
    dims = tuple(None if i == argnums else 0 for i in range(len(x))) if in_dims is None else tuple(in_dims)
    if len(dims) != len(x) or dims[argnums] is not None or all(dim is None for dim in dims):
        raise ValueError(
            f"Expected argument `in_dims` to have one entry for each of the {len(x)} arguments, None for the one to "
            f"differentiate in (number {argnums}), and a dimension for at least one other, but got {dims}."
        )
    return dims


def sample_gradients(
    func: Callable[..., Tensor], x: Sequence[Any], argnums: int, in_dims: InDims | None
) -> dict[str, Tensor]:
    """Differentiate a function of one sample at every sample.

    Returns name in the parameter dict (empty for a tensor) -> flattened gradients ``(n, size)``, detached.
    """
    dims = sample_dims(x, argnums, in_dims)
    with torch.enable_grad(), plain_execution(), sdpa_kernel(SDPBackend.MATH):
        found = vmap(grad(func, argnums=argnums), in_dims=dims)(*(map_tensors(part, Tensor.detach) for part in x))
    named = {"": found} if isinstance(found, Tensor) else found
    gradients = {
        name: gradient.detach().flatten(1) if gradient.ndim > 1 else gradient.detach()[:, None]
        for name, gradient in named.items()
    }
    wrong = [~gradient.isfinite().all(1) for gradient in gradients.values()]
    if torch.stack(wrong).any():
        raise ValueError(
            "Expected finite gradients, but those of the samples "
            f"{torch.stack(wrong).any(0).nonzero().flatten().tolist()[:8]} hold NaN or infinite values."
        )
    return gradients


def select_samples(x: Sequence[Any], dims: Sequence[int | None], rows: Tensor) -> list[Any]:
    """Take some samples of a function's arguments.

    Returns the arguments for these samples.
    """

    def select(part: Any, dim: int) -> Any:
        return map_tensors(part, lambda tensor: tensor.index_select(dim, rows.to(tensor.device)))

    return [part if dim is None else select(part, dim) for part, dim in zip(x, dims, strict=True)]
