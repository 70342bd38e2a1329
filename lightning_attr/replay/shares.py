"""What each sample puts into a training loss, as a function that can be differentiated twice."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_attr.objectives.reductions import Reduction


def sample_shares(loss: Tensor, calls: Sequence[Reduction], batch_size: int) -> Tensor | None:
    r"""Split a loss into the shares of its samples, for weights of samples that are one.

    Of a loss :math:`L(r_1, r_2, \dots)` of means or sums :math:`r_k = \sum_z r_{kz}` over samples, a sample's share is

    .. math:: s_z = \sum_k \frac{\partial L}{\partial r_k} r_{kz}

    so that :math:`L + \sum_z (w_z - 1) s_z` has the loss's values and derivatives at :math:`w = 1`, whatever else the
    loss has in it. What a mean divides by (labels that count, weights of classes) is constant.

    Returns ``(b,)``, with its graph; None if no reduction over samples leads to the loss.

    Example:
        >>> from lightning_attr.objectives.reductions import Reductions
        >>> x, w = torch.tensor([1.0, 3.0]), torch.ones((), requires_grad=True)
        >>> with Reductions() as reductions:
        ...     loss = (w * x).mean() + 0.1 * w.square()
        >>> sample_shares(loss, reductions.calls, 2)
        tensor([0.5000, 1.5000], grad_fn=<AddBackward0>)
    """
    found = [
        (call.result, part)
        for call in calls
        if call.result.requires_grad and (part := _parts(call, batch_size)) is not None
    ]
    if not (found and loss.requires_grad):
        return None
    total = torch.zeros(batch_size, dtype=loss.dtype, device=loss.device)
    slopes = torch.autograd.grad(loss, [result for result, _ in found], create_graph=True, allow_unused=True)
    leads = False
    for slope, (_, part) in zip(slopes, found, strict=True):
        if slope is not None:
            total, leads = total + slope * part, True
    return total if leads else None


def _parts(call: Reduction, batch_size: int) -> Tensor | None:
    """What samples put into a reduction, so that it is their sum."""
    parts = call.shares(batch_size)
    if parts is None:
        return None
    total = parts.detach().sum()
    scale = call.result.detach() / total
    even = not scale.isfinite() or torch.isclose(scale, torch.ones_like(scale), rtol=1e-6)
    return parts if even else scale * parts
