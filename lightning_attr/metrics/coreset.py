"""Coresets by scores: few training samples that together serve all targets, and what a choice is predicted to do."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from lightning_attr.arguments.checks import check_int
from lightning_attr.metrics.checks import as_mask, check_matrix, check_vector
from lightning_attr.metrics.functional import score_blocks

_STRENGTH = 8.0
_EVALUATIONS = 2**32
"""Scores looked at in all steps together; a large choice looks at some of the samples in each step."""
_BLOCK_ELEMENTS = 2**22


class PredictedEffect(NamedTuple):
    """Result of :func:`predicted_effect`; float64 scalars, positive where removal raises.

    Attributes:
        loss: Change of the targets' mean loss, in units of the loss, to first order.
        loss_error: Its standard error, targets taken as a sample of all that could be asked.
        output: Change of the targets' mean model output, in units of the output.
        output_error: Its standard error.

    Example:
        >>> import torch
        >>> effect = predicted_effect(torch.tensor([[1.0, 3.0], [0.5, 0.5]]), torch.tensor([False, True]))
        >>> effect.output, effect.output_error
        (tensor(-2., dtype=torch.float64), tensor(1., dtype=torch.float64))
    """

    loss: Tensor
    loss_error: Tensor
    output: Tensor
    output_error: Tensor


def predicted_effect(scores: Tensor, kept: Tensor, slopes: Tensor | None = None) -> PredictedEffect:
    r"""Predict what training on some of the samples does to the targets, under the linear datamodel.

    .. math:: \Delta f_j = -\sum_{i \notin S} s_{ij}, \qquad \Delta \ell_j = -q_j \, \Delta f_j

    The standard errors are those of the mean over targets. They know nothing of errors in the scores, whose sizes are
    off for classifiers: trust the sign and the comparison of two choices, and retrain for the size.

    Args:
        scores: Shape `(n_train, n_target)`, positive for a proponent; read in row blocks, so it may be memory-mapped.
        kept: Shape `(n_train,)`, bool or 0/1: the samples :math:`S` that are trained on.
        slopes: Shape `(n_target,)`: :math:`q_j = -\partial \ell_j / \partial f_j`; None for ones.

    Returns:
        Changes of mean loss and mean output, with standard errors (NaN with one target).

    Raises:
        ValueError: If an argument is not finite, or shapes do not fit.

    Example:
        >>> import torch
        >>> scores = torch.tensor([[1.0, 1.0], [2.0, 4.0]])
        >>> predicted_effect(scores, torch.tensor([True, False]), torch.tensor([0.5, 0.5])).loss
        tensor(1.5000, dtype=torch.float64)
    """
    check_vector("kept", kept, like=("scores", scores))
    left_out = ~as_mask("kept", kept)
    output = torch.zeros(scores.shape[1], dtype=torch.float64)
    for rows, block in score_blocks(scores):
        output -= block[left_out[rows]].sum(0)
    slopes = torch.ones(len(output)) if slopes is None else slopes
    check_vector("slopes", slopes, like=("scores[0]", scores[0]))
    loss, root = -slopes.double() * output, len(output) ** 0.5
    if len(output) == 1:
        unknown = torch.tensor(torch.nan, dtype=torch.float64)
        return PredictedEffect(loss.mean(), unknown, output.mean(), unknown)
    return PredictedEffect(loss.mean(), loss.std() / root, output.mean(), output.std() / root)


def greedy_coreset(scores: Tensor, count: int, groups: Tensor | None = None, quotas: Tensor | None = None) -> Tensor:
    r"""Choose samples one by one, each the one that lowers the targets' predicted loss most beside those chosen.

    .. math:: L(S) = \frac1m \sum_j \log\bigl(1 + e^{-c \sum_{i \in S} s_{ij}}\bigr), \qquad
        c = \frac{8 n}{|S| \, \operatorname{median}_j \sum_i \max(s_{ij}, 0)}

    A target that has its proponents needs no more of them: near-duplicates gain little, and harmful samples nothing.
    The scale :math:`c` makes up for the size of scores. Beyond :math:`2^{32}` sums, each step looks at a random part
    of the samples, with a fixed seed (stochastic greedy, Mirzasoleiman et al., 2015).

    Args:
        scores: Shape `(n_train, n_target)`, positive for a proponent; may be memory-mapped.
        count: How many samples.
        groups: Shape `(n_train,)`, int64: the group of each sample, from 0; None for one group of all.
        quotas: Shape `(n_groups,)`, int64: how many samples a group may have; they add up to at least `count`. Samples
            of a group without a quota are not chosen. None for no limit.

    Returns:
        Rows, `(count,)`, int64, in the order in which they were chosen; ties go to the lower row.

    Raises:
        ValueError: If `count` is no integer from 1 to `n_train`, or shapes or quotas do not fit.

    Example:
        >>> import torch
        >>> scores = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 1.0]])  # the first two say the same
        >>> greedy_coreset(scores, 2)
        tensor([0, 2])
    """
    check_matrix("scores", scores)
    n, m = scores.shape
    count = check_int("greedy_coreset", "count", count, 1, n)
    groups = torch.zeros(n, dtype=torch.int64) if groups is None else groups
    check_vector("groups", groups, like=("scores", scores))
    places = torch.full((int(groups.max()) + 1,), count) if quotas is None else quotas.clone()
    available = int(torch.minimum(places, groups.bincount(minlength=len(places))).sum())
    if available < count:
        raise ValueError(f"Expected argument `quotas` to leave room for {count} samples, but they admit {available}.")
    positive = torch.zeros(m, dtype=torch.float64)
    for _, block in score_blocks(scores):
        positive += block.clamp_(min=0).sum(0)
    scale = _STRENGTH * n / (count * positive.median().clamp(min=torch.finfo(torch.float64).tiny))
    return _greedy(scores, count, groups, places, float(scale))


def _greedy(scores: Tensor, count: int, groups: Tensor, places: Tensor, scale: float) -> Tensor:
    n, m = scores.shape
    generator = torch.Generator().manual_seed(0)
    width = max(1, _EVALUATIONS // (count * m))
    outputs, free = torch.zeros(m), torch.ones(n, dtype=torch.bool)
    chosen = []
    for _ in range(count):
        rows = (free & (places[groups] > 0)).nonzero().flatten()
        if len(rows) > width:
            rows = rows[torch.randperm(len(rows), generator=generator)[:width]].sort().values
        parts = rows.split(max(1, _BLOCK_ELEMENTS // m))
        losses = torch.cat([softplus(-(outputs + scale * scores[part])).mean(1) for part in parts])
        best = int(rows[losses.argmin()])
        chosen.append(best)
        outputs += scale * scores[best]
        free[best] = False
        places[groups[best]] -= 1
    return torch.tensor(chosen)
