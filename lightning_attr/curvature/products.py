"""Products of vectors with the Hessian or the generalised Gauss-Newton matrix of a function, without the matrix.

Both are reverse-over-reverse with a graph that is kept: the function and its gradient are computed once, and a product
is one backward pass more. Forward-over-reverse computes them anew each time and, over several vectors, holds more.
One vector goes through plain autograd, several through ``torch.func.vjp`` under ``vmap``, and, where a function does
not run there (an ``autograd.Function`` of the old kind, ``.item()``), one after the other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.func import grad, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_attr.curvature.parameter_vectors import Point, Product, RowSpace
from lightning_attr.gradients.plain_execution import plain_execution

log = logging.getLogger(__name__)

_CHUNK = 128  # rows of the unit matrix at once: enough to keep the processor busy
_Rows: TypeAlias = Callable[[Tensor], Tensor]


def hessian_product(function: Callable[[Any], Tensor], point: Point) -> Product:
    r"""Prepare :math:`V \mapsto V \nabla^2 f(\theta)`.

    Returns a function from rows ``(r, p)`` to rows ``(r, p)``, detached. It holds the graph of the gradient.
    """
    space = RowSpace(point)

    def value(structure: Any) -> Tensor:
        return _one_value(function(structure))

    def make_one() -> _Rows:
        leaves = _leaves(space)
        gradients = _gradients([value(_structured(space, leaves))], leaves, None, create_graph=True)
        return lambda row: _joined(_gradients(gradients, leaves, _parts(space, row)), 1)

    def make_many() -> _Rows:
        _, pull = _pullback(grad(value), _detached(space))
        return lambda rows: _flat(space, vmap(lambda v: pull(v)[0])(_cast(space, rows)), len(rows))

    return _row_product(space, make_one, make_many)


def ggn_product(outputs: Callable[[Any], Tensor], loss: Callable[[Tensor], Tensor], point: Point) -> Product:
    r"""Prepare :math:`V \mapsto V J^\top (\nabla_z^2 \ell) J` (Schraudolph, 2002).

    For a softmax cross entropy, or a squared error, this is the true Fisher matrix of the loss.

    Returns a function from rows ``(r, p)`` to rows ``(r, p)``, detached. It holds the graph of the outputs.
    """
    space = RowSpace(point)

    def value(z: Tensor) -> Tensor:
        return _one_value(loss(z))

    def make_one() -> _Rows:
        leaves = _leaves(space)
        z = outputs(_structured(space, leaves))
        cotangent = torch.zeros_like(z, requires_grad=True)
        pulled = _gradients([z], leaves, [cotangent], create_graph=True)  # linear in the cotangent: its pullback is J
        place = z.detach().requires_grad_()
        slope = _gradients([value(place)], [place], None, create_graph=True)

        def one(row: Tensor) -> Tensor:
            pushed = _gradients(pulled, [cotangent], _parts(space, row))
            return _joined(_gradients([z], leaves, _gradients(slope, [place], pushed)), 1)

        return one

    def make_many() -> _Rows:
        z, pull = _pullback(outputs, _detached(space))
        _, push = _pullback(lambda u: pull(u)[0], torch.zeros_like(z))
        _, bend = _pullback(grad(value), z)
        return lambda rows: _flat(space, vmap(lambda v: pull(bend(push(v)[0])[0])[0])(_cast(space, rows)), len(rows))

    return _row_product(space, make_one, make_many)


def dense(product: Product, size: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Write a product out as a matrix.

    Returns ``(p, p)``, in that dtype.
    """
    matrix = torch.empty(size, size, dtype=dtype, device=device)
    for start in range(0, size, _CHUNK):
        stop = min(start + _CHUNK, size)
        unit = torch.zeros(stop - start, size, dtype=dtype, device=device)
        unit[:, start:stop].fill_diagonal_(1)
        matrix[start:stop] = product(unit)
    return matrix


def _row_product(space: RowSpace, make_one: Callable[[], _Rows], make_many: Callable[[], _Rows]) -> Product:
    """Choose how rows are multiplied, making each way when it is first needed."""
    ways: dict[str, _Rows] = {}
    makers = {"one": make_one, "many": make_many}

    def run(way: str, rows: Tensor) -> Tensor:
        if way not in ways:
            with _twice_differentiable():
                ways[way] = makers[way]()
        with torch.no_grad():  # or else each product would leave a graph of its own
            return ways[way](rows).to(rows.dtype)

    def product(rows: Tensor) -> Tensor:
        if len(rows) > 1 and "many" in makers:
            try:
                return run("many", rows)
            except RuntimeError as error:  # also what vmap raises; an error of the function itself comes again below
                log.debug("Products with the curvature are taken one by one: %s", error)
                del makers["many"]
                ways.pop("many", None)
        if len(rows) == 1 and "many" in ways:  # the graph that is there already
            return run("many", rows)
        if len(rows) == 1:
            return run("one", rows)
        return torch.cat([run("one", row[None]) for row in rows]) if len(rows) else rows

    return product


@contextmanager
def _twice_differentiable() -> Iterator[None]:
    # Of the kernels for attention, only the plain one has a second derivative.
    with torch.enable_grad(), plain_execution(), sdpa_kernel(SDPBackend.MATH):
        yield


def _pullback(function: Callable[[Any], Any], point: Any) -> tuple[Any, Callable[[Any], Any]]:
    value, pull = vjp(function, point)[:2]
    return value, pull


def _gradients(
    outputs: list[Tensor], inputs: list[Tensor], weights: list[Tensor] | None, create_graph: bool = False
) -> list[Tensor]:
    """Pull back to the inputs; zero where nothing depends on them. The graph is kept."""
    weights = weights or [torch.ones_like(output) for output in outputs]
    pairs = [(o, w.to(o.dtype)) for o, w in zip(outputs, weights, strict=True) if o.requires_grad]
    if not pairs:
        return [torch.zeros_like(x) for x in inputs]
    given, along = zip(*pairs, strict=True)
    return list(
        torch.autograd.grad(given, inputs, along, retain_graph=True, create_graph=create_graph, materialize_grads=True)
    )


def _one_value(value: Tensor) -> Tensor:
    if value.numel() != 1:
        raise ValueError(
            f"Expected the function to return one value, such as a mean loss, but got shape {tuple(value.shape)}."
        )
    return value.reshape(())


def _leaves(space: RowSpace) -> list[Tensor]:
    return [tensor.detach().requires_grad_() for tensor in space.tensors.values()]


def _structured(space: RowSpace, tensors: list[Tensor]) -> Any:
    return tensors[0] if space.is_tensor else dict(zip(space.tensors, tensors, strict=True))


def _detached(space: RowSpace) -> Any:
    return _structured(space, [tensor.detach() for tensor in space.tensors.values()])


def _parts(space: RowSpace, row: Tensor) -> list[Tensor]:
    parts = [row[0]] if space.is_tensor else row[0].split(space.sizes)
    return [part.reshape(like.shape).to(like.dtype) for part, like in zip(parts, space.tensors.values(), strict=True)]


def _cast(space: RowSpace, rows: Tensor) -> Any:
    structure = space.structure(rows)
    if isinstance(structure, Tensor):
        return structure.to(space.tensors[""].dtype)
    return {name: tensor.to(space.tensors[name].dtype) for name, tensor in structure.items()}


def _joined(tensors: list[Tensor], count: int) -> Tensor:
    return torch.cat([tensor.reshape(count, -1) for tensor in tensors], 1)


def _flat(space: RowSpace, structure: Any, count: int) -> Tensor:
    return _joined([structure] if space.is_tensor else [structure[name] for name in space.tensors], count)
