"""Precision of self-influence as a detector of mislabelled training samples: tensors in, float64 tensors out."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_attr.metrics.functional import noisy_label_recall, noisy_label_recall_curve
from lightning_attr.metrics.ranks import top_count


def noisy_label_precision(self_influence: Tensor, noise_mask: Tensor, fraction: float = 0.1) -> Tensor:
    """Share of mislabelled samples among the most self-influential `fraction` of the training set.

    `fraction * n_train` is rounded to the nearest integer, at least 1. Among samples tied at the threshold the value is
    the expectation over a random order. Random inspection finds the share of mislabelled samples in the training set.

    Args:
        self_influence: Shape `(n_train,)`; high means suspicious.
        noise_mask: Shape `(n_train,)`, bool or 0/1; True marks a mislabelled sample.
        fraction: Share of the training set inspected, in (0, 1].

    Returns:
        float64 scalar in [0, 1].

    Raises:
        ValueError: If the values are not a non-empty finite vector, the mask is not 0/1 of the same length with samples
            of both kinds, or `fraction` is outside (0, 1].

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import noisy_label_precision
        >>> noisy_label_precision(torch.tensor([0.9, 0.2, 0.1, 0.4]), torch.tensor([1, 1, 0, 0]), fraction=0.25)
        tensor(1., dtype=torch.float64)
    """
    recall = noisy_label_recall(self_influence, noise_mask, fraction)
    return recall * noise_mask.sum().to(recall.device) / top_count(len(noise_mask), fraction)


def noisy_label_precision_curve(self_influence: Tensor, noise_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Share of mislabelled samples among those inspected, against the share inspected, most suspicious first.

    With the recall of :func:`~lightning_attr.metrics.noisy_label_recall_curve` (less its first point, where nothing is
    inspected) it makes the precision-recall curve.

    Args:
        self_influence: Shape `(n_train,)`; high means suspicious.
        noise_mask: Shape `(n_train,)`, bool or 0/1; True marks a mislabelled sample.

    Returns:
        `(inspected, precision)`, both float64 of shape `(n_train,)`, from one sample to all. Within tied samples the
        precision is the expectation over a random order.

    Raises:
        ValueError: If the values are not a non-empty finite vector, or the mask is not 0/1 of the same length with
            samples of both kinds.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import noisy_label_precision_curve
        >>> inspected, precision = noisy_label_precision_curve(torch.tensor([0.9, 0.1, 0.4]), torch.tensor([1, 1, 0]))
        >>> precision
        tensor([1.0000, 0.5000, 0.6667], dtype=torch.float64)
    """
    inspected, recall = noisy_label_recall_curve(self_influence, noise_mask)
    found = recall[1:] * noise_mask.sum().to(recall.device)
    return inspected[1:], found / torch.arange(1, len(recall), dtype=torch.float64, device=recall.device)
