"""Products with the Hessian of a function of tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from lightning_attr.arguments.checks import check_instance, check_int
from lightning_attr.arguments.messages import argument_message
from lightning_attr.curvature.parameter_vectors import Point, Product, RowSpace, applied
from lightning_attr.curvature.products import hessian_product
from lightning_attr.func.settings import check_in_dims, check_settings

AtX: TypeAlias = Callable[[Point], Point]
OfX: TypeAlias = Callable[[Sequence[Any], Point], Point]


def hvp(func: Callable[..., Tensor], argnums: int = 0, *, damping: float = 0.0) -> OfX:
    r"""Make a function that multiplies vectors with the Hessian of ``func``.

    Underneath: reverse-over-reverse; ``torch.autograd`` for one vector, ``torch.func.vjp`` under ``vmap`` for several.

    Args:
        func: returns one value; where it is a mean over samples, so is the Hessian.
        argnums: which positional argument to differentiate in: a tensor, or a dict of tensors. The others, of any
            type, are constant.
        damping: :math:`\lambda`: :math:`(H + \lambda I) v` is returned. Absolute, as everywhere in this package's
            low-level functions: in the units of the Hessian.

    Returns:
        A function ``(x, v) -> Hv``. ``x`` are the arguments of ``func``. ``v`` has the structure and shapes of
        ``x[argnums]``, or one more dimension ``r`` in front of each: the product is taken for all r at once, and the
        result has the structure of ``v``.

    Raises:
        TypeError: (when called) if ``v`` is a tensor and the point a dict, or the other way round.
        ValueError: if a name or shape does not fit, ``func`` returns several values, or the product is not finite.

    Example:
        >>> import torch
        >>> loss = lambda theta, scale: scale * (theta**3).sum()
        >>> hvp(loss)((torch.tensor([1.0, 2.0]), 2.0), torch.eye(2))
        tensor([[12.,  0.],
                [ 0., 24.]])
        >>> hvp(lambda p: p["a"] @ p["b"])(({"a": torch.ones(2), "b": torch.ones(2)},), {
        ...     "a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.0, 0.0])})
        {'a': tensor([0., 0.]), 'b': tensor([1., 0.])}
    """
    check_settings("hvp", func, argnums, damping=damping)
    return lambda x, v: hvp_at_x(func, x, argnums, damping=damping)(v)


def hvp_at_x(func: Callable[..., Tensor], x: Sequence[Any], argnums: int = 0, *, damping: float = 0.0) -> AtX:
    r"""Make a function that multiplies vectors with the Hessian at one place; the gradient there is computed once.

    Args:
        func: as in :func:`hvp`.
        x: its arguments.
        argnums: as in :func:`hvp`.
        damping: as in :func:`hvp`.

    Returns:
        A function ``v -> Hv``; see :func:`hvp`. It holds the graph of the gradient.

    Raises:
        ValueError: if ``argnums`` is none of the arguments, or that argument is not floating point.

    Example:
        >>> import torch
        >>> product = hvp_at_x(lambda theta: (theta**3).sum(), (torch.tensor([1.0, 2.0]),))
        >>> product(torch.tensor([1.0, 1.0]))
        tensor([ 6., 12.])
    """
    check_settings("hvp_at_x", func, argnums, damping=damping)
    space, product = curvature_at(func, x, argnums)

    def damped(rows: Tensor) -> Tensor:
        result = applied(product, rows)
        return result.add_(rows, alpha=damping) if damping else result

    return structured(space, damped)


def curvature_at(func: Callable[..., Tensor], x: Sequence[Any], argnums: int) -> tuple[RowSpace, Product]:
    """Prepare the Hessian's products on rows.

    Returns how the point is flattened, and the product.
    """
    point = differentiated(x, argnums)
    return RowSpace(point), hessian_product(lambda p: func(*x[:argnums], p, *x[argnums + 1 :]), point)


def differentiated(x: Sequence[Any], argnums: int) -> Any:
    """Find the argument to differentiate in."""
    check_instance(None, "x", x, Sequence, "a tuple of the function's arguments")
    check_int(None, "argnums", argnums, 0, len(x) - 1, remedy="It is the position of one argument in `x`.")
    parts = x[argnums].values() if isinstance(x[argnums], Mapping) else [x[argnums]]
    if not all(isinstance(part, Tensor) for part in parts):
        raise TypeError(argument_message(None, f"x[{argnums}]", "a tensor, or a dict of tensors", x[argnums]))
    return x[argnums]


def structured(space: RowSpace, product: Product) -> AtX:
    """Let a function of rows take and return vectors that are structured like the point.

    Shapes: product (r, p). Returns a function of one or several vectors.
    """

    def call(v: Point) -> Point:
        rows, many = space.rows(v)
        return space.structure(product(rows), many)

    return call


def of_x(at_x: Callable[..., AtX], func: Callable[..., Tensor], argnums: int, **settings: Any) -> OfX:
    """Prepare anew at the place that each call names.

    Shapes: at_x (func, *x, argnums=..., **settings). Returns a function of a place and one or several vectors.
    """
    defaults = inspect.signature(at_x).parameters
    check_in_dims(settings.get("in_dims"))
    checked = {name: value for name, value in settings.items() if name != "in_dims"}
    optional = [name for name in checked if defaults[name].default is None]
    check_settings(at_x.__name__.replace("_at_x", ""), func, argnums, optional, **checked)

    def call(x: Sequence[Any], v: Point) -> Point:
        differentiated(x, argnums)
        return at_x(func, *x, argnums=argnums, **settings)(v)

    return call
