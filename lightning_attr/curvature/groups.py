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

    Shapes: solve (m, p), groups (m, p), targets (q, p), group_product (m, p). Returns ``(m, q)``; positive: the group
    raises the measurement.
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
