"""What samples put into a loss: its derivative by the weight of each."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_attr.objectives.reductions import Reductions
from lightning_attr.replay.shares import sample_shares

LABELS = torch.tensor([0, 2, -100, 1])
CLASSES = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)


def kept(x: Tensor, w: Tensor, weight: Tensor | None = None) -> Tensor:
    """Cross-entropy over the labels that count, whose number is constant."""
    terms = F.cross_entropy(x, LABELS, weight=weight, reduction="none")
    counts = LABELS >= 0
    return (w * terms).sum() / (counts.sum() if weight is None else weight[LABELS[counts]].sum())


# Logits (4, 3) -> a loss; the same with weights of the samples.
LOSSES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "mean": (lambda x: x.square().mean(), lambda x, w: (w[:, None] * x.square()).mean()),
    "sum": (lambda x: x.exp().sum(), lambda x, w: (w[:, None] * x.exp()).sum()),
    "ignored labels": (lambda x: F.cross_entropy(x, LABELS), kept),
    "weights of classes": (
        lambda x: F.cross_entropy(x, LABELS, weight=CLASSES),
        lambda x, w: kept(x, w, CLASSES),
    ),
    "root": (lambda x: x.square().mean().sqrt(), lambda x, w: (w[:, None] * x.square()).mean().sqrt()),
    "two terms": (
        lambda x: 2 * x.abs().mean() + F.mse_loss(x, torch.ones_like(x), reduction="sum") ** 2,
        lambda x, w: 2 * (w[:, None] * x.abs()).mean() + (w[:, None] * (x - 1) ** 2).sum() ** 2,
    ),
    "a term of no sample": (
        lambda x: x.square().mean() + x[:3, 0].prod(),
        lambda x, w: (w[:, None] * x.square()).mean() + x[:3, 0].prod(),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_shares_are_the_derivative_by_weights(name: str) -> None:
    plain, weighted = LOSSES[name]
    torch.manual_seed(0)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    w = torch.ones(4, dtype=torch.float64, requires_grad=True)
    with Reductions() as reductions:
        loss = plain(x)
    found = sample_shares(loss, reductions.calls, 4)
    assert found is not None
    expected = weighted(x, w)
    torch.testing.assert_close(loss, expected)
    (shares,) = torch.autograd.grad(expected, w, create_graph=True)
    torch.testing.assert_close(found, shares)
    mix = torch.randn(4, dtype=torch.float64)
    slopes = [torch.autograd.grad((mix * s).sum(), x, retain_graph=True)[0] for s in (found, shares)]
    torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("plain", [lambda x: x.prod(), lambda x: x[:3].mean(), lambda x: x.detach().mean()])
def test_a_loss_without_terms_of_samples_has_no_shares(plain: Callable[[Tensor], Tensor]) -> None:
    x = torch.ones(4, 3, requires_grad=True)
    with Reductions() as reductions:
        loss = plain(x)
    assert sample_shares(loss, reductions.calls, 4) is None
