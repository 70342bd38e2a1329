"""Pure functions behind the metrics: tensors in, float64 tensors out.

Three families: rank correlation, detection of mislabelled training samples from their self-influence, and figures read
off a score matrix without retraining. Scores are `(n_train, n_target)` and positive when the training sample helps the
target. Ties never depend on the order of the samples: ranks are midranks, and counts among the "top k" are expected
values over a random order of the tied samples. NaN and infinite inputs raise.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_attr.metrics.checks import check_finite, check_matrix, check_noise, check_vector
from lightning_attr.metrics.ranks import chance_in_top, midranks, top_count

_BLOCK_ELEMENTS = 2**22  # a float64 row block of a score matrix stays at 32 MiB


def noisy_label_auroc(self_influence: Tensor, noise_mask: Tensor) -> Tensor:
    r"""Area under the ROC curve of self-influence as a detector of mislabelled samples.

    The Mann-Whitney statistic with midranks, :math:`(\sum_{i \in \text{noisy}} r_i - n_1 (n_1 + 1) / 2) / (n_1 n_0)`:
    the chance that a mislabelled sample has a higher value than a clean one, ties counting one half. Constant values
    give exactly 0.5.

    Args:
        self_influence: Shape `(n_train,)`; high means suspicious. Training loss or any other suspicion works too.
        noise_mask: Shape `(n_train,)`, bool or 0/1; True marks a mislabelled sample.

    Returns:
        float64 scalar in [0, 1].

    Raises:
        ValueError: If the values are not a non-empty finite vector, or the mask is not 0/1 of the same length with
            samples of both kinds.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import noisy_label_auroc
        >>> noisy_label_auroc(torch.tensor([0.9, 0.2, 0.2, 0.4]), torch.tensor([True, False, True, False]))
        tensor(0.6250, dtype=torch.float64)
    """
    noisy = check_noise(self_influence, noise_mask)
    n_noisy, n_clean = noisy.sum(), (~noisy).sum()
    rank_sum = midranks(self_influence)[noisy].sum()
    return (rank_sum - n_noisy * (n_noisy + 1) / 2) / (n_noisy * n_clean)


def noisy_label_recall(self_influence: Tensor, noise_mask: Tensor, fraction: float = 0.1) -> Tensor:
    """Share of the mislabelled samples found by inspecting the most self-influential `fraction` of the training set.

    `fraction * n_train` is rounded to the nearest integer, at least 1. Among samples tied at the threshold the value is
    the expectation over a random order.

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
        >>> from lightning_attr.metrics import noisy_label_recall
        >>> noisy_label_recall(torch.tensor([0.9, 0.2, 0.1, 0.4]), torch.tensor([1, 1, 0, 0]), fraction=0.5)
        tensor(0.5000, dtype=torch.float64)
    """
    noisy = check_noise(self_influence, noise_mask)
    return chance_in_top(self_influence, top_count(len(noisy), fraction))[noisy].mean()


def noisy_label_recall_curve(self_influence: Tensor, noise_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Share of the mislabelled samples found against the share of the training set inspected, most suspicious first.

    Args:
        self_influence: Shape `(n_train,)`; high means suspicious.
        noise_mask: Shape `(n_train,)`, bool or 0/1; True marks a mislabelled sample.

    Returns:
        `(inspected, recall)`, both float64 of shape `(n_train + 1,)`, from (0, 0) to (1, 1). Within tied samples the
        recall is the expectation over a random order, a straight line.

    Raises:
        ValueError: If the values are not a non-empty finite vector, or the mask is not 0/1 of the same length with
            samples of both kinds.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import noisy_label_recall_curve
        >>> inspected, recall = noisy_label_recall_curve(torch.tensor([0.9, 0.1, 0.4]), torch.tensor([1, 1, 0]))
        >>> recall
        tensor([0.0000, 0.5000, 0.5000, 1.0000], dtype=torch.float64)
    """
    noisy = check_noise(self_influence, noise_mask)
    ordered, order = self_influence.sort()
    found = pad(noisy[order].cumsum(0), (1, 0))
    first, past = torch.searchsorted(ordered, ordered), torch.searchsorted(ordered, ordered, right=True)  # of the tied
    hits = (found[past] - found[first]).double() / (past - first)
    recall = pad(hits.flip(0).cumsum(0) / noisy.sum(), (1, 0))
    return torch.linspace(0, 1, len(recall), dtype=torch.float64, device=recall.device), recall


def noisy_label_recall_area(self_influence: Tensor, noise_mask: Tensor) -> Tensor:
    r"""Area under :func:`noisy_label_recall_curve`, by the trapezoidal rule.

    With a share :math:`\pi` of mislabelled samples it equals :math:`(1 - \pi) \, \text{AUROC} + \pi / 2`: one half for
    random inspection, at most :math:`1 - \pi / 2`.

    Args:
        self_influence: Shape `(n_train,)`; high means suspicious.
        noise_mask: Shape `(n_train,)`, bool or 0/1; True marks a mislabelled sample.

    Returns:
        float64 scalar.

    Raises:
        ValueError: If the values are not a non-empty finite vector, or the mask is not 0/1 of the same length with
            samples of both kinds.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import noisy_label_recall_area
        >>> noisy_label_recall_area(torch.tensor([0.9, 0.1, 0.4, 0.2]), torch.tensor([1, 0, 0, 0]))
        tensor(0.8750, dtype=torch.float64)
    """
    inspected, recall = noisy_label_recall_curve(self_influence, noise_mask)
    return torch.trapezoid(recall, inspected)


def share_helpful(scores: Tensor) -> Tensor:
    """Share of the training samples whose mean score over the targets is positive.

    Args:
        scores: Shape `(n_train, n_target)`, positive for a proponent; read in row blocks, so it may be memory-mapped.

    Returns:
        float64 scalar in [0, 1].

    Raises:
        ValueError: If `scores` is not a non-empty finite matrix.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import share_helpful
        >>> share_helpful(torch.tensor([[1.0, 2.0], [1.0, -3.0], [0.0, 0.0], [2.0, -1.0]]))
        tensor(0.5000, dtype=torch.float64)
    """
    return (_mean_scores(scores) > 0).double().mean()


def share_harmful(scores: Tensor) -> Tensor:
    """Share of the training samples whose mean score over the targets is negative.

    Args:
        scores: Shape `(n_train, n_target)`, positive for a proponent; read in row blocks, so it may be memory-mapped.

    Returns:
        float64 scalar in [0, 1]. With :func:`share_helpful` it adds up to 1 less the share of exact zeros.

    Raises:
        ValueError: If `scores` is not a non-empty finite matrix.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import share_harmful
        >>> share_harmful(torch.tensor([[1.0, 2.0], [1.0, -3.0], [0.0, 0.0], [2.0, -1.0]]))
        tensor(0.2500, dtype=torch.float64)
    """
    return (_mean_scores(scores) < 0).double().mean()


def effective_proponents(scores: Tensor) -> Tensor:
    r"""Effective number of proponents of a target: the participation ratio of its positive scores, mean over targets.

    :math:`(\sum_i s_i^+)^2 / \sum_i (s_i^+)^2` with :math:`s^+ = \max(s, 0)`: k when k samples share the credit
    equally, near 1 when one sample holds nearly all of it, 0 for a target without proponents.

    Args:
        scores: Shape `(n_train, n_target)`, positive for a proponent; read in row blocks, so it may be memory-mapped.

    Returns:
        float64 scalar in [0, n_train].

    Raises:
        ValueError: If `scores` is not a non-empty finite matrix.

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import effective_proponents
        >>> effective_proponents(torch.tensor([[2.0, 1.0], [2.0, 0.0], [-9.0, 0.0]]))
        tensor(1.5000, dtype=torch.float64)
    """
    check_matrix("scores", scores)
    sums = torch.zeros(2, scores.shape[1], dtype=torch.float64, device=scores.device)
    for _, block in score_blocks(scores):
        sums += positive_sums(block)
    return participation(sums)


def overlap(self_influence: Tensor, data_value: Tensor, fraction: float = 0.1) -> Tensor:
    """Share of the most self-influential `fraction` that is also in the `fraction` of lowest data value.

    Near `fraction` when the two orders are unrelated, 1 when they single out the same samples. Samples tied at either
    threshold count with their chance of inclusion.

    Args:
        self_influence: Shape `(n_train,)`.
        data_value: Shape `(n_train,)`, mean score of each training sample over the targets.
        fraction: In (0, 1]; `fraction * n_train` is rounded to the nearest integer, at least 1.

    Returns:
        float64 scalar in [0, 1].

    Raises:
        ValueError: If an argument is not a non-empty finite vector, lengths differ, or `fraction` is outside (0, 1].

    Example:
        >>> import torch
        >>> from lightning_attr.metrics import overlap
        >>> overlap(torch.tensor([9.0, 8.0, 1.0, 1.0]), torch.tensor([-2.0, 3.0, -1.0, 2.0]), fraction=0.5)
        tensor(0.5000, dtype=torch.float64)
    """
    check_vector("self_influence", self_influence)
    check_vector("data_value", data_value, like=("self_influence", self_influence))
    count = top_count(len(data_value), fraction)
    return (chance_in_top(self_influence, count) * chance_in_top(-data_value, count)).sum() / count


def score_blocks(scores: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Walk a score matrix in float64 row blocks of at most 32 MiB (one row at least), all in the same memory.

    Shapes: scores (n_train, n_target). Yields `(rows, block)`: the slice of rows and a float64 copy of them,
    overwritten by the next.
    """
    check_matrix("scores", scores)
    n_train, n_target = scores.shape
    # One buffer: blocks allocated anew fragment the heap (1.2 GiB for 0.8 GB of float32 scores, against 32 MiB).
    buffer = scores.new_empty(min(n_train, max(1, _BLOCK_ELEMENTS // n_target)), n_target, dtype=torch.float64)
    for start in range(0, n_train, len(buffer)):
        rows = slice(start, min(start + len(buffer), n_train))
        block = buffer[: rows.stop - start].copy_(scores[rows])
        if not block.sum().isfinite():  # a sum needs no memory of the block's size
            check_finite("scores", block)
        yield rows, block


def positive_sums(block: Tensor) -> Tensor:
    """Return the sums `(2, n_target)` of a float64 block's positive scores and of their squares; overwrites it."""
    total = block.clamp_(min=0).sum(0)
    return torch.stack([total, block.square_().sum(0)])


def participation(sums: Tensor) -> Tensor:
    """Return the effective number of proponents, mean over targets, from the sums of all rows."""
    total, squares = sums
    return torch.where(total > 0, total.square() / squares, total).mean()


def _mean_scores(scores: Tensor) -> Tensor:
    """Return the mean score `(n_train,)` of each training sample over the targets."""
    return torch.cat([block.mean(1) for _, block in score_blocks(scores)])
