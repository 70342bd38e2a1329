"""Ranks of values, and who is among the highest: ties never depend on the order of the samples."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_attr.metrics.checks import check_fraction, check_vector


def midranks(values: Tensor) -> Tensor:
    """Rank along the last dimension, starting at 1; tied values share the mean of their ranks.

    Shapes: values (..., n). Returns float64 ranks, shape `(..., n)`.
    """
    values = values.contiguous()
    ordered = values.sort(dim=-1).values
    smaller = torch.searchsorted(ordered, values)
    smaller_or_equal = torch.searchsorted(ordered, values, right=True)
    return (smaller + smaller_or_equal + 1).double() / 2


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation: Pearson's correlation of the midranks.

    Args:
        a: Shape `(n,)`, any real dtype.
        b: Shape `(n,)`, any real dtype.

    Returns:
        float64 scalar in [-1, 1]; NaN when `a` or `b` is constant, where the correlation is undefined.

    Raises:
        ValueError: If an argument is not a non-empty finite vector, or the lengths differ.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import spearman
        >>> spearman(torch.tensor([0.1, 0.2, 0.9]), torch.tensor([1.0, 5.0, 3.0]))
        tensor(0.5000, dtype=torch.float64)
    """
    check_vector("a", a)
    check_vector("b", b, like=("a", a))
    return rank_correlation(a, b)


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Return Spearman's correlation along the last dimension, `(...)`; NaN where `a` or `b` is constant."""
    center = (a.shape[-1] + 1) / 2
    a, b = midranks(a) - center, midranks(b) - center
    return (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()


def top_count(n: int, fraction: float) -> int:
    """Return how many of `n` a share is: rounded to the nearest integer, at least 1."""
    check_fraction(fraction)
    return max(1, int(fraction * n + 0.5))


def chance_in_top(values: Tensor, count: int) -> Tensor:
    """Return each value's chance `(..., n)` to be among the `count` highest of its row, ties broken at random."""
    threshold = values.topk(count).values[..., -1:]
    above, tied = (values > threshold).double(), (values == threshold).double()
    return above + tied * (count - above.sum(-1, keepdim=True)) / tied.sum(-1, keepdim=True)
