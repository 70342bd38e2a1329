"""What the removal of many samples at once does (Koh et al., 2019; Basu et al., 2020)."""

from __future__ import annotations

from torch import Tensor

from lightning_attr.curvature.parameter_vectors import Product, applied, checked_rows


def group_influence(
    solve: Product, groups: Tensor, targets: Tensor, *, order: int = 1, group_product: Product | None = None
) -> Tensor:
    r"""Predict how much of each target's measurement is due to each group of training samples.

    With sums over samples, :math:`H_s = \sum_i \nabla^2 l_i` (and :math:`n` times every damping), and
    :math:`g_U, H_U` the same sums over a group, its removal moves the parameters by

    .. math:: \Delta_U = (H_s - H_U)^{-1} g_U = H_s^{-1} g_U + H_s^{-1} H_U H_s^{-1} g_U + \dots

    and the result is :math:`m(S) - m(S \setminus U) = -\langle u, \Delta_U \rangle`, with as many terms as ``order``.
    The whole series is exact for a quadratic objective.

    Args:
        solve: :math:`H_s^{-1}`, applied to rows ``(m, p)``.
        groups: :math:`g_U`, ``(m, p)``: sums of the gradients of the samples' losses.
        targets: u, ``(q, p)``: gradients of the measurements (minus those of a loss).
        order: 1 adds up the samples' influences; 2 and more see the group's own curvature.
        group_product: applies to row j the :math:`H_U` of group j: ``(m, p)`` to ``(m, p)``. Needed above order 1.

    Returns:
        ``(m, q)``; positive: the group raises the measurement.

    Raises:
        ValueError: if ``order`` is not positive, or there is no ``group_product`` for it.

    Example:
        >>> import torch
        >>> group_influence(lambda rows: rows / 2, torch.ones(1, 2), torch.tensor([[-1.0, 0.0]]))
        tensor([[0.5000]])
    """
    if order < 1:
        raise ValueError(f"Expected argument `order` to be a positive integer, but got {order}.")
    if order > 1 and group_product is None:
        raise ValueError(f"Expected argument `group_product` for `order={order}`, but got None.")
    first = applied(solve, checked_rows(groups))
    change = first
    for _ in range(order - 1):
        assert group_product is not None
        change = first + applied(solve, applied(group_product, change))
    return -(change @ checked_rows(targets).to(change).T)
