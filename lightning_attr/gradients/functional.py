"""Per-sample gradients of parameters that no rule covers: ``vmap(grad)``, and a loop over samples at last."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_attr.batches.nested import batched_tensors, map_tensors, replace_tensors, select_rows
from lightning_attr.gradients.plain_execution import plain_execution

FunctionalOutput: TypeAlias = Callable[[Mapping[str, Tensor], Any], Tensor]


def call_with(module: nn.Module, tensors: Mapping[str, Tensor], function: Callable[[Any], Any], batch: Any) -> Any:
    """Call a function of a module while other tensors are in the places of its parameters and buffers.

    Returns what the function returns.

    Example:
        >>> import torch
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> call_with(layer, {"weight": torch.tensor([[3.0]])}, layer, torch.ones(1, 1))
        tensor([[3.]])
    """
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    if all(own[name] is tensor for name, tensor in tensors.items()):
        return function(batch)  # also where nothing can be put into a place, as in scripted modules
    given = {id(own[name]): tensor for name, tensor in tensors.items()}
    # `functional_call` would swap a layer of two names twice and leave the second tensor in it for good: each place is
    # named once, and so it must not look for ties itself.
    places = {
        f"module.{prefix}.{local}".replace("..", "."): given[id(tensor)]
        for prefix, layer in module.named_modules()
        for local, tensor in (*layer._parameters.items(), *layer._buffers.items())
        if id(tensor) in given
    }
    return functional_call(_Call(module, function), places, (batch,), tie_weights=False)


class _Call(nn.Module):
    """``functional_call`` reaches a module through a ``forward``."""

    def __init__(self, module: nn.Module, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.module = module
        self.functions = (function,)  # not registered where it is the module itself

    def forward(self, batch: Any) -> Any:
        return self.functions[0](batch)


def vmap_gradients(
    functional_output: FunctionalOutput,
    params: Mapping[str, Tensor],
    batch: Any,
    batch_size: int,
    chunk_size: int | None = None,
) -> dict[str, Tensor]:
    """Differentiate the model output of every sample at once.

    Args:
        functional_output: ``(params, batch) -> (b,)``; what is not in ``params`` is constant.
        params: parameter name -> tensor.
        batch: any batch; tensors whose first dimension is not the batch are shared by the samples.
        batch_size: number of samples in it, ``b``.
        chunk_size: samples differentiated together; None for all.

    Returns:
        Parameter name -> gradients ``(b, *shape)``.

    Example:
        >>> import torch
        >>> f = lambda params, x: (x * params["w"]).sum(1) ** 2
        >>> vmap_gradients(f, {"w": torch.ones(2)}, torch.tensor([[1.0, 2.0], [0.0, 1.0]]), 2)
        {'w': tensor([[ 6., 12.],
                [ 0.,  2.]])}
    """

    def output_of_one(params: Mapping[str, Tensor], *sample: Tensor) -> Tensor:
        one = replace_tensors(batch, batch_size, [tensor.unsqueeze(0) for tensor in sample])
        return functional_output(params, one).squeeze(0)

    tensors = batched_tensors(batch, batch_size)
    in_dims = (None, *([0] * len(tensors)))
    # Of the kernels for attention, vmap runs only the plain one at once.
    with torch.enable_grad(), plain_execution(), sdpa_kernel(SDPBackend.MATH):
        gradients: dict[str, Tensor] = vmap(grad(output_of_one), in_dims=in_dims, chunk_size=chunk_size)(
            dict(params), *tensors
        )
    return {name: gradient.detach() for name, gradient in gradients.items()}


def loop_gradients(
    functional_output: FunctionalOutput, params: Mapping[str, Tensor], batch: Any, batch_size: int
) -> dict[str, Tensor]:
    """Differentiate the model output of one sample after the other: slow, and right for every model.

    Args:
        functional_output: as in :func:`vmap_gradients`.
        params: as in :func:`vmap_gradients`.
        batch: as in :func:`vmap_gradients`.
        batch_size: as in :func:`vmap_gradients`.

    Returns:
        Parameter name -> gradients ``(b, *shape)``.

    Example:
        >>> import torch
        >>> f = lambda params, x: (x * params["w"]).sum(1) ** 2
        >>> loop_gradients(f, {"w": torch.ones(2)}, torch.tensor([[1.0, 2.0], [0.0, 1.0]]), 2)
        {'w': tensor([[ 6., 12.],
                [ 0.,  2.]])}
    """
    # A module's own parameters stay in their places: that works for scripted modules, too.
    leaves = {name: p if p.is_leaf and p.requires_grad else p.detach().requires_grad_() for name, p in params.items()}
    rows = []
    with torch.enable_grad(), plain_execution():
        for i in range(batch_size):
            sample = map_tensors(select_rows(batch, batch_size, [i]), Tensor.detach)
            output = functional_output(leaves, sample).sum()
            if output.requires_grad:
                found = torch.autograd.grad(output, list(leaves.values()), allow_unused=True)
                pairs = zip(leaves.values(), found, strict=True)
                rows.append(tuple(torch.zeros_like(leaf) if row is None else densely(row) for leaf, row in pairs))
            else:
                rows.append(tuple(torch.zeros_like(leaf) for leaf in leaves.values()))
    return {name: torch.stack(gradients) for name, gradients in zip(leaves, zip(*rows, strict=True), strict=True)}


def densely(gradient: Tensor) -> Tensor:
    """Give a gradient as a dense tensor; embeddings with ``sparse=True`` have others.

    Example:
        >>> densely(torch.eye(2).to_sparse())
        tensor([[1., 0.],
                [0., 1.]])
    """
    return gradient if gradient.layout == torch.strided else gradient.to_dense()
