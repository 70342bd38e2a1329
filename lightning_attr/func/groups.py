"""The influence of groups of samples on functions of parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.func import vmap

from lightning_attr.curvature import groups as curvature_groups
from lightning_attr.curvature.explicit import factor
from lightning_attr.curvature.parameter_vectors import Point, Product, RowSpace
from lightning_attr.curvature.products import dense, hessian_product
from lightning_attr.func.samples import InDims, sample_dims, sample_gradients, select_samples
from lightning_attr.func.settings import check_in_dims, check_settings

GroupInfluence: TypeAlias = Callable[[Sequence[Any], Sequence[Sequence[int]], Point], Tensor]


def group_influence(
    func: Callable[..., Tensor],
    argnums: int = 0,
    *,
    order: int = 1,
    damping: float = 0.0,
    in_dims: InDims | None = None,
) -> GroupInfluence:
    r"""Make a function that predicts what removing groups of training samples does to measurements.

    .. math:: m(S) - m(S \setminus U) \approx -u^\top \big(1 + H_s^{-1} H_U + \dots\big) H_s^{-1} g_U, \qquad
        H_s = n (H + \lambda I)

    Underneath: the Hessian written out and factored (see :func:`~lightning_attr.func.ihvp_explicit`), and
    :func:`lightning_attr.curvature.groups.group_influence`, which takes any other solver.

    Args:
        func: returns the training loss of ONE sample.
        argnums: which positional argument to differentiate in: a tensor, or a dict of tensors.
        order: terms of the series: 1 adds up the samples' influences (Koh et al., 2019), 2 sees the group's own
            curvature (Basu et al., 2020); the whole series is exact for a quadratic objective.
        damping: :math:`\lambda \ge 0`, absolute: what training adds to the mean loss as
            :math:`\frac{\lambda}{2} |\theta|^2`, and more where the curvature needs it.
        in_dims: see :func:`~lightning_attr.func.ifvp_explicit`.

    Returns:
        A function ``(x, groups, v) -> (m, r)``, or ``(m,)`` for one vector: ``x`` are the arguments for all training
        samples, ``groups`` m lists of their positions, and ``v`` gradients of measurements, as in
        :func:`~lightning_attr.func.hvp`. Positive: the group raises the measurement. In its units.

    Raises:
        TypeError: if ``in_dims`` is no list of dimensions.
        ValueError: (when called) if the damped Hessian is singular, a group is empty, has an unknown or a repeated
            sample, or an argument does not fit.

    Example:
        >>> import torch                           # the mean of 1, 2 and 6, estimated by least squares
        >>> influence = group_influence(lambda mean, x: (mean - x) ** 2 / 2, order=50)
        >>> influence((torch.tensor(3.0), torch.tensor([1.0, 2.0, 6.0])), [[2], [0, 1]], torch.tensor(1.0))
        tensor([ 1.5000, -3.0000])
    """
    check_settings("group_influence", func, argnums, order=order, damping=damping)
    check_in_dims(in_dims)

    def influence(x: Sequence[Any], groups: Sequence[Sequence[int]], v: Point) -> Tensor:
        dims = sample_dims(x, argnums, in_dims)
        gradients = torch.cat(list(sample_gradients(func, x, argnums, in_dims).values()), 1)
        chosen = [_positions(group, len(gradients)).to(gradients.device) for group in groups]
        space = RowSpace(x[argnums])
        targets, many = space.rows(v)

        def summed_loss(rows: Tensor) -> Product:
            part = select_samples(x, dims, rows)
            run = vmap(func, in_dims=dims)
            return hessian_product(lambda p: run(*part[:argnums], p, *part[argnums + 1 :]).sum(), x[argnums])

        count = len(gradients)
        everything = dense(
            summed_loss(torch.arange(count, device=gradients.device)), space.size, space.dtype, space.device
        )
        solve = factor(everything, count * damping).solve
        products = [summed_loss(rows) for rows in chosen]
        scores = curvature_groups.group_influence(
            solve,
            torch.stack([gradients[rows].sum(0) for rows in chosen]),
            targets,
            order=order,
            group_product=lambda rows: torch.cat([
                product(row[None]) for product, row in zip(products, rows, strict=True)
            ]),
        )
        return scores if many else scores[:, 0]

    return influence


def _positions(group: Sequence[int], count: int) -> Tensor:
    rows = torch.as_tensor(group, dtype=torch.int64).flatten()
    inside = bool(len(rows)) and int(rows.min()) >= 0 and int(rows.max()) < count
    if not inside or len(rows.unique()) != len(rows):
        raise ValueError(
            f"Expected each group in `groups` to name at least one of the {count} samples by its position, and none "
            f"twice, but got {rows.tolist()[:8]}."
        )
    return rows
