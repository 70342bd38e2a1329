"""The order of the products that project gradients of matrices from both sides."""

from __future__ import annotations

from torch import Tensor


def materialising_is_cheaper(
    positions: int, rows: int, columns: int, left: Tensor | None, right: Tensor | None
) -> bool:
    r"""Compare the floating point operations of projecting the factors with those of projecting the gradient.

    For ``s`` positions and a weight ``(r, c)`` projected to ``(k_r, k_c)``, up to a factor of two and for one sample:
    :math:`s (r k_r + c k_c + k_r k_c)` against :math:`s r c + r c k_c + r k_r k_c`; a side without projection costs
    nothing.

    Shapes: left (k_r, r), right (k_c, c). Returns True if forming the gradient first takes fewer operations.
    """
    if left is None and right is None:
        return False
    k_rows, k_columns = (side if p is None else p.shape[0] for p, side in ((left, rows), (right, columns)))
    to_left = 0 if left is None else rows * k_rows
    to_right = 0 if right is None else columns * k_columns
    factored = positions * (to_left + to_right + k_rows * k_columns)
    return factored > positions * rows * columns + rows * to_right + k_columns * to_left


def two_sided(gradient: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Project formed gradients from both sides.

    Shapes: gradient (b, rows, columns). Returns ``(b, k_rows, k_columns)``.
    """
    gradient = gradient if right is None else gradient @ right.T
    if left is None:
        return gradient
    if gradient.shape[2] == 1:  # one product for the whole batch, where the other is one a sample
        return (gradient.squeeze(2) @ left.T).unsqueeze(2)
    return left @ gradient
