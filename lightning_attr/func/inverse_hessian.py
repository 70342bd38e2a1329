"""Products with the inverse of the Hessian of a function of tensors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor

from lightning_attr.arguments.checks import check_int
from lightning_attr.batches.nested import map_tensors, select_rows
from lightning_attr.curvature.conjugate_gradient import conjugate_gradient
from lightning_attr.curvature.explicit import factor
from lightning_attr.curvature.lanczos import lanczos, largest_eigenvalue, spectral_inverse
from lightning_attr.curvature.lissa import lissa
from lightning_attr.curvature.parameter_vectors import Product
from lightning_attr.curvature.products import dense
from lightning_attr.func.hessian import AtX, OfX, curvature_at, of_x, structured
from lightning_attr.func.settings import check_settings
from lightning_attr.randomness.streams import gaussian, hashed_seed

log = logging.getLogger(__name__)


def ihvp_explicit(func: Callable[..., Tensor], argnums: int = 0, *, damping: float = 0.0) -> OfX:
    r"""Make a function that solves with the Hessian of ``func``, written out.

    Underneath: batched Hessian products (:func:`~lightning_attr.func.hvp`), then ``torch.linalg`` in float64: Cholesky,
    or LDL where an eigenvalue is negative, which the log reports. Memory :math:`2 p^2`: for p up to about 20 000.

    Args:
        func: returns one value.
        argnums: which positional argument to differentiate in: a tensor, or a dict of tensors.
        damping: :math:`\lambda \ge 0`, absolute: :math:`(H + \lambda I)^{-1} v` is returned.

    Returns:
        A function ``(x, v) -> (H + damping I)^-1 v``; see :func:`~lightning_attr.func.hvp` for ``x`` and ``v``.

    Raises:
        ValueError: (when called) if the damped Hessian is singular or not finite, or an argument does not fit.

    Example:
        >>> import torch
        >>> ihvp_explicit(lambda theta: (theta**3).sum())((torch.tensor([1.0, 2.0]),), torch.eye(2))
        tensor([[0.1667, 0.0000],
                [0.0000, 0.0833]])
    """
    return of_x(ihvp_at_x_explicit, func, argnums, damping=damping)


def ihvp_at_x_explicit(func: Callable[..., Tensor], *x: Any, argnums: int = 0, damping: float = 0.0) -> AtX:
    """Make the function of :func:`ihvp_explicit` for one place: the Hessian is factored once.

    Args:
        func: as in :func:`ihvp_explicit`.
        x: its arguments.
        argnums: as in :func:`ihvp_explicit`.
        damping: as in :func:`ihvp_explicit`.

    Returns:
        A function ``v -> (H + damping I)^-1 v``.

    Raises:
        ValueError: if the damped Hessian is singular or not finite, or an argument does not fit.

    Example:
        >>> import torch
        >>> solve = ihvp_at_x_explicit(lambda theta: (theta**3).sum(), torch.tensor([1.0, 2.0]))
        >>> solve(torch.tensor([6.0, 12.0]))
        tensor([1., 1.])
    """
    check_settings("ihvp_at_x_explicit", func, argnums, damping=damping)
    space, product = curvature_at(func, x, argnums)
    return structured(space, factor(dense(product, space.size, space.dtype, space.device), damping).solve)


def ihvp_cg(
    func: Callable[..., Tensor],
    argnums: int = 0,
    *,
    damping: float = 0.0,
    tolerance: float = 1e-5,
    max_iterations: int = 100,
) -> OfX:
    r"""Make a function that solves with the Hessian of ``func`` by conjugate gradients.

    Underneath: this package's solver for all vectors at once, over the products of :func:`~lightning_attr.func.hvp`.

    Args:
        func: returns one value, with a positive definite Hessian (damping included).
        argnums: which positional argument to differentiate in: a tensor, or a dict of tensors.
        damping: :math:`\lambda \ge 0`, absolute: :math:`(H + \lambda I)^{-1} v` is returned.
        tolerance: a vector is solved when its residual is at most this share of its norm.
        max_iterations: where to stop at the latest.

    Returns:
        A function ``(x, v) -> (H + damping I)^-1 v``; see :func:`~lightning_attr.func.hvp` for ``x`` and ``v``.

    Raises:
        NegativeCurvatureError: (when called) if a direction has curvature that is not positive.
        ValueError: if an argument is out of range or does not fit.

    Example:
        >>> import torch
        >>> solve = ihvp_cg(lambda theta: (theta**3).sum())
        >>> solve((torch.tensor([1.0, 2.0]),), torch.tensor([6.0, 12.0])).round(decimals=4)
        tensor([1., 1.])
    """
    return of_x(ihvp_at_x_cg, func, argnums, damping=damping, tolerance=tolerance, max_iterations=max_iterations)


def ihvp_at_x_cg(
    func: Callable[..., Tensor],
    *x: Any,
    argnums: int = 0,
    damping: float = 0.0,
    tolerance: float = 1e-5,
    max_iterations: int = 100,
) -> AtX:
    """Make the function of :func:`ihvp_cg` for one place: the gradient there is computed once.

    Args:
        func: as in :func:`ihvp_cg`.
        x: its arguments.
        argnums: as in :func:`ihvp_cg`.
        damping: as in :func:`ihvp_cg`.
        tolerance: as in :func:`ihvp_cg`.
        max_iterations: as in :func:`ihvp_cg`.

    Returns:
        A function ``v -> (H + damping I)^-1 v``.

    Raises:
        ValueError: if an argument is out of range or does not fit.

    Example:
        >>> import torch
        >>> solve = ihvp_at_x_cg(lambda theta: (theta**3).sum(), torch.tensor([1.0, 2.0]))
        >>> solve(torch.tensor([[6.0, 12.0], [0.0, 12.0]])).round(decimals=4)
        tensor([[1., 1.],
                [0., 1.]])
    """
    check = partial(check_settings, "ihvp_at_x_cg", func, argnums)
    check(damping=damping, tolerance=tolerance, max_iterations=max_iterations)
    space, product = curvature_at(func, x, argnums)
    damped = _damped(product, damping)

    def solve(rows: Tensor) -> Tensor:
        solution = conjugate_gradient(damped, rows, tolerance=tolerance, max_iterations=max_iterations)
        left = int((solution.residuals > tolerance).sum())
        if left:
            log.info(
                "%d of %d systems are not solved to %g after %d iterations; the largest relative residual is %.2g.",
                left,
                len(rows),
                tolerance,
                max_iterations,
                solution.residuals.max().item(),
            )
        return solution.values

    return structured(space, solve)


def ihvp_lissa(
    func: Callable[..., Tensor],
    argnums: int = 0,
    *,
    damping: float = 0.0,
    scale: float | None = None,
    iterations: int | None = None,
    batch_size: int | None = None,
    repeats: int = 1,
    seed: int = 0,
) -> OfX:
    r"""Make a function that solves with the Hessian of ``func`` by LiSSA.

    Underneath: this package's recursion for all vectors at once (they see the same batches), over the products of
    :func:`~lightning_attr.func.hvp`. Its limit is :math:`(H + \lambda I)^{-1} v` for any scale that converges.

    Args:
        func: returns one value; with ``batch_size``, a mean over samples.
        argnums: which positional argument to differentiate in: a tensor, or a dict of tensors.
        damping: :math:`\lambda \ge 0`, absolute.
        scale: above half the largest eigenvalue of :math:`H + \lambda I`, and of the batches' too; default: 1.1 times
            that of all data, from 20 power iterations.
        iterations: default: :math:`5 s / \lambda`, at most 5000; the error shrinks by
            :math:`1 - (\lambda_{\min} + \lambda) / s` an iteration.
        batch_size: how many samples a product sees, drawn without replacement; default: all. Samples are the rows of
            those tensors in the other arguments that are as long as the first one there.
        repeats: how many estimates to average, each from other batches.
        seed: of the batches.

    Returns:
        A function ``(x, v) -> (H + damping I)^-1 v``; see :func:`~lightning_attr.func.hvp` for ``x`` and ``v``.

    Raises:
        DivergenceError: (when called) if the iterates grow.
        ValueError: if an argument is out of range or does not fit.

    Example:
        >>> import torch
        >>> loss = lambda w, x: (x @ w).square().mean()
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> solve = ihvp_lissa(loss, damping=1.0, iterations=50)
        >>> solve((torch.zeros(2), x), torch.tensor([4.0, 2.0])).round(decimals=4)
        tensor([2., 1.])
    """
    return of_x(
        ihvp_at_x_lissa,
        func,
        argnums,
        damping=damping,
        scale=scale,
        iterations=iterations,
        batch_size=batch_size,
        repeats=repeats,
        seed=seed,
    )


def ihvp_at_x_lissa(
    func: Callable[..., Tensor],
    *x: Any,
    argnums: int = 0,
    damping: float = 0.0,
    scale: float | None = None,
    iterations: int | None = None,
    batch_size: int | None = None,
    repeats: int = 1,
    seed: int = 0,
) -> AtX:
    """Make the function of :func:`ihvp_lissa` for one place: the scale is estimated once.

    Args:
        func: as in :func:`ihvp_lissa`.
        x: its arguments.
        argnums: as in :func:`ihvp_lissa`.
        damping: as in :func:`ihvp_lissa`.
        scale: as in :func:`ihvp_lissa`.
        iterations: as in :func:`ihvp_lissa`.
        batch_size: as in :func:`ihvp_lissa`.
        repeats: as in :func:`ihvp_lissa`.
        seed: as in :func:`ihvp_lissa`; every call sees the same batches.

    Returns:
        A function ``v -> (H + damping I)^-1 v``.

    Raises:
        ValueError: if an argument is out of range or does not fit.

    Example:
        >>> import torch
        >>> solve = ihvp_at_x_lissa(lambda w: w.square().sum(), torch.zeros(2), damping=2.0, scale=6.0)
        >>> solve(torch.tensor([4.0, 8.0])).round(decimals=4)
        tensor([1., 2.])
    """
    settings = {"scale": scale, "iterations": iterations, "batch_size": batch_size}
    check_settings("ihvp_at_x_lissa", func, argnums, settings, **settings, damping=damping, repeats=repeats, seed=seed)
    space, product = curvature_at(func, x, argnums)
    if scale is None:
        top = largest_eigenvalue(product, space.size, dtype=space.dtype, device=space.device)
        scale = 1.1 * (abs(top) + damping)
    chosen = scale

    def solve(rows: Tensor) -> Tensor:
        estimate = product if batch_size is None else _batch_product(func, x, argnums, batch_size, seed)
        return lissa(estimate, rows, scale=chosen, damping=damping, iterations=iterations, repeats=repeats)

    return structured(space, solve)


def ihvp_arnoldi(
    func: Callable[..., Tensor],
    argnums: int = 0,
    *,
    damping: float = 0.0,
    iterations: int = 200,
    top_k: int = 100,
    seed: int = 0,
) -> OfX:
    r"""Make a function that inverts the Hessian of ``func`` on the span of its strongest eigenvectors.

    Underneath: this package's Lanczos (Arnoldi for symmetric maps) with full re-orthogonalisation, over the products of
    :func:`~lightning_attr.func.hvp`. What is orthogonal to these eigenvectors is dropped, so that the result differs
    from the inverse unless ``iterations`` and ``top_k`` reach the number of parameters.

    Args:
        func: returns one value.
        argnums: which positional argument to differentiate in: a tensor, or a dict of tensors.
        damping: :math:`\lambda \ge 0`, absolute, added to the eigenvalues.
        iterations: how many Hessian products; at least ``top_k``.
        top_k: how many eigenvectors to keep, those of largest absolute eigenvalue.
        seed: of the Gaussian that the iteration starts from.

    Returns:
        A function ``(x, v) -> x``; see :func:`~lightning_attr.func.hvp` for ``x`` and ``v``.

    Raises:
        NegativeCurvatureError: (when called) if no eigenvalue is positive, damping included.
        ValueError: if an argument is out of range or does not fit.

    Example:
        >>> import torch
        >>> inverse = ihvp_arnoldi(lambda w: w[0] ** 2 + 4 * w[1] ** 2, top_k=1)
        >>> inverse((torch.zeros(2),), torch.tensor([8.0, 8.0])).round(decimals=4).abs()  # the eigenvalue 8 alone
        tensor([0., 1.])
    """
    return of_x(ihvp_at_x_arnoldi, func, argnums, damping=damping, iterations=iterations, top_k=top_k, seed=seed)


def ihvp_at_x_arnoldi(
    func: Callable[..., Tensor],
    *x: Any,
    argnums: int = 0,
    damping: float = 0.0,
    iterations: int = 200,
    top_k: int = 100,
    seed: int = 0,
) -> AtX:
    """Make the function of :func:`ihvp_arnoldi` for one place: the eigenvectors are computed once.

    Args:
        func: as in :func:`ihvp_arnoldi`.
        x: its arguments.
        argnums: as in :func:`ihvp_arnoldi`.
        damping: as in :func:`ihvp_arnoldi`.
        iterations: as in :func:`ihvp_arnoldi`.
        top_k: as in :func:`ihvp_arnoldi`.
        seed: as in :func:`ihvp_arnoldi`.

    Returns:
        A function ``v -> x``.

    Raises:
        NegativeCurvatureError: if no eigenvalue is positive, damping included.
        ValueError: if an argument is out of range or does not fit.

    Example:
        >>> import torch
        >>> inverse = ihvp_at_x_arnoldi(lambda w: w[0] ** 2 + 4 * w[1] ** 2, torch.zeros(2))
        >>> inverse(torch.tensor([8.0, 8.0])).round(decimals=4)
        tensor([4., 1.])
    """
    check = partial(check_settings, "ihvp_at_x_arnoldi", func, argnums)
    check(damping=damping, iterations=iterations, top_k=top_k, seed=seed)
    space, product = curvature_at(func, x, argnums)
    start = gaussian((space.size,), seed, "arnoldi").to(device=space.device, dtype=space.dtype)
    values, vectors = lanczos(product, start, iterations)
    return structured(space, spectral_inverse(values[:top_k], vectors[:top_k], damping))


def _damped(product: Product, damping: float) -> Product:
    return lambda rows: product(rows).add(rows, alpha=damping)


def _batch_product(func: Callable[..., Tensor], x: Sequence[Any], argnums: int, batch_size: int, seed: int) -> Product:
    """Multiply with the Hessian of another random batch at each call."""
    data = [*x[:argnums], *x[argnums + 1 :]]
    length = _length(data)
    remedy = f"There are {length} samples."
    check_int("ihvp_at_x_lissa", "batch_size", batch_size, 1, length, also="None", remedy=remedy)
    steps = count()

    def product(rows: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(hashed_seed(seed, "lissa", next(steps)))
        chosen = torch.randperm(length, generator=generator)[:batch_size].tolist()
        batch = select_rows(data, length, chosen)
        return curvature_at(func, [*batch[:argnums], x[argnums], *batch[argnums:]], argnums)[1](rows)

    return product


def _length(data: Any) -> int:
    """Return how many rows the first tensor has."""
    found: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        found.extend(tensor.shape[:1])
        return tensor

    map_tensors(data, note)
    return found[0] if found else 0
