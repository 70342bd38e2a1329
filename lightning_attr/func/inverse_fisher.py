"""Products with the inverse of the Fisher matrix of a function of one sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_attr.curvature.explicit import factor
from lightning_attr.curvature.parameter_vectors import RowSpace
from lightning_attr.curvature.sherman_morrison import datainf_damping, mean_of_inverses
from lightning_attr.func.hessian import AtX, OfX, differentiated, of_x, structured
from lightning_attr.func.samples import InDims, sample_gradients
from lightning_attr.func.settings import check_settings


def ifvp_explicit(
    func: Callable[..., Tensor], argnums: int = 0, *, damping: float = 0.0, in_dims: InDims | None = None
) -> OfX:
    r"""Make a function that solves with the Fisher matrix :math:`F = \frac{1}{n} \sum_i g_i g_i^\top`, written out.

    With observed labels it is the empirical Fisher; with labels drawn from the model, an estimate of the true one.
    Underneath: ``torch.func.vmap`` of ``torch.func.grad``, then Cholesky in float64. Memory :math:`n p + 2 p^2`.

    Args:
        func: returns the loss of ONE sample: a negative log-likelihood.
        argnums: which positional argument to differentiate in: a tensor, or a dict of tensors.
        damping: :math:`\lambda \ge 0`, absolute: :math:`(F + \lambda I)^{-1} v` is returned.
        in_dims: for each argument, the dimension of its samples, or None where they share it; default: None for the
            one to differentiate in, 0 for the others. As in ``torch.func.vmap``.

    Returns:
        A function ``(x, v) -> (F + damping I)^-1 v``. ``x`` are the arguments for all samples; see
        :func:`~lightning_attr.func.hvp` for ``v``.

    Raises:
        ValueError: (when called) if the damped matrix is singular, as it is without damping when there are fewer
            samples than parameters, or an argument does not fit.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> ifvp_explicit(lambda w, x: w @ x)((torch.zeros(2), x), torch.tensor([1.0, 1.0])).round(decimals=4)
        tensor([2.0000, 0.5000])
    """
    return of_x(ifvp_at_x_explicit, func, argnums, damping=damping, in_dims=in_dims)


def ifvp_at_x_explicit(
    func: Callable[..., Tensor], *x: Any, argnums: int = 0, damping: float = 0.0, in_dims: InDims | None = None
) -> AtX:
    """Make the function of :func:`ifvp_explicit` for one place: the matrix is factored once.

    Args:
        func: as in :func:`ifvp_explicit`.
        x: its arguments, for all samples.
        argnums: as in :func:`ifvp_explicit`.
        damping: as in :func:`ifvp_explicit`.
        in_dims: as in :func:`ifvp_explicit`.

    Returns:
        A function ``v -> (F + damping I)^-1 v``.

    Raises:
        ValueError: if the damped matrix is singular, or an argument does not fit.

    Example:
        >>> import torch
        >>> solve = ifvp_at_x_explicit(lambda w, x: w * x, torch.tensor(0.0), torch.tensor([1.0, 3.0]))
        >>> solve(torch.tensor(10.0))
        tensor(2.)
    """
    check_settings("ifvp_at_x_explicit", func, argnums, damping=damping)
    space = RowSpace(differentiated(x, argnums))
    gradients = torch.cat(list(sample_gradients(func, x, argnums, in_dims).values()), 1).double()
    return structured(space, factor(gradients.T @ gradients / len(gradients), damping, definite=True).solve)


def ifvp_datainf(
    func: Callable[..., Tensor], argnums: int = 0, *, damping: float | None = None, in_dims: InDims | None = None
) -> OfX:
    r"""Make a function that solves with the Fisher matrix as DataInf does (Kwon et al., 2024).

    In each entry of a parameter dict by itself, the mean of the samples' inverses stands for the inverse of the mean:
    :math:`\frac{1}{n} \sum_i (\lambda I + g_i g_i^\top)^{-1} v`. The error grows with the entry's size.
    Underneath: ``torch.func.vmap`` of ``torch.func.grad``, then two matrix products per entry. Memory :math:`n p`.

    Args:
        func: returns the loss of ONE sample.
        argnums: which positional argument to differentiate in: a tensor, or a dict of tensors.
        damping: :math:`\lambda > 0`, absolute, the same in every entry; default: in each entry a tenth of its mean
            squared gradient.
        in_dims: as in :func:`ifvp_explicit`.

    Returns:
        A function ``(x, v) -> x``; see :func:`ifvp_explicit`.

    Raises:
        ValueError: (when called) if the damping is not positive, all gradients of an entry are zero and no damping is
            given, or an argument does not fit.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, 0.0]])
        >>> ifvp_datainf(lambda w, x: w @ x, damping=1.0)((torch.zeros(2), x), torch.tensor([1.0, 1.0]))
        tensor([0.5000, 1.0000])
    """
    return of_x(ifvp_at_x_datainf, func, argnums, damping=damping, in_dims=in_dims)


def ifvp_at_x_datainf(
    func: Callable[..., Tensor],
    *x: Any,
    argnums: int = 0,
    damping: float | None = None,
    in_dims: InDims | None = None,
) -> AtX:
    """Make the function of :func:`ifvp_datainf` for one place: the samples' gradients are computed once.

    Args:
        func: as in :func:`ifvp_datainf`.
        x: its arguments, for all samples.
        argnums: as in :func:`ifvp_datainf`.
        damping: as in :func:`ifvp_datainf`.
        in_dims: as in :func:`ifvp_datainf`.

    Returns:
        A function ``v -> x``.

    Raises:
        ValueError: if all gradients of an entry are zero and no damping is given, or an argument does not fit.

    Example:
        >>> import torch
        >>> solve = ifvp_at_x_datainf(lambda w, x: w * x, torch.tensor(0.0), torch.tensor([2.0]), damping=4.0)
        >>> solve(torch.tensor(8.0))
        tensor(1.)
    """
    check_settings("ifvp_at_x_datainf", func, argnums, ["damping"], damping=damping)
    space = RowSpace(differentiated(x, argnums))
    gradients = sample_gradients(func, x, argnums, in_dims)
    dampings = [datainf_damping(g) if damping is None else damping for g in gradients.values()]
    zero = [name for name, value in zip(gradients, dampings, strict=True) if not value and damping is None]
    if zero:
        raise ValueError(
            f"Expected argument `damping` to be a positive number, because all gradients of {zero} are zero, so that "
            "there is no mean square to take a share of; but got None."
        )

    def solve(rows: Tensor) -> Tensor:
        parts = zip(gradients.values(), rows.split(space.sizes, 1), dampings, strict=True)
        return torch.cat([mean_of_inverses(g, part, value) for g, part, value in parts], 1)

    return structured(space, solve)
