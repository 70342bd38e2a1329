"""What each sample puts into a loss, found behind the calls that reduced it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_attr.objectives.reductions import Reductions, shares

B = 4
X = torch.randn(B, 3, generator=torch.Generator().manual_seed(0)).double()
Y = torch.tensor([0, 1, 1, 2])

LOSSES: list[Callable[[Tensor, Tensor], Tensor]] = [
    F.cross_entropy,
    nn.CrossEntropyLoss(reduction="sum"),
    lambda x, y: F.nll_loss(x.log_softmax(1), y),
    lambda x, y: F.mse_loss(x, x.detach() + 1),
    lambda x, y: F.l1_loss(x, x.detach() + y[:, None], reduction="sum"),
    lambda x, y: F.smooth_l1_loss(x, x.detach() + y[:, None]),
    lambda x, y: F.huber_loss(x, x.detach() + y[:, None]),
    lambda x, y: F.binary_cross_entropy_with_logits(x[:, 0], y.double().clamp(max=1)),
    lambda x, y: F.binary_cross_entropy(x.sigmoid(), x.detach().sigmoid()),
    lambda x, y: F.multi_margin_loss(x, y),
    lambda x, y: F.kl_div(x.log_softmax(1), x.detach().softmax(1), reduction="batchmean"),
    lambda x, y: F.kl_div(x.log_softmax(1), x.detach().softmax(1), reduction="sum"),
    lambda x, y: F.gaussian_nll_loss(x[:, 0], y.double(), x[:, 1].exp()),
    lambda x, y: F.triplet_margin_loss(x, x.roll(1, 1), x.roll(2, 1)),
    lambda x, y: x.square().mean(),
    lambda x, y: torch.mean(x.square()),
    lambda x, y: torch.mean(input=x.square()),
    lambda x, y: x.square().sum(),
    lambda x, y: torch.sum(x.square()),
    lambda x, y: x.square().sum(1).mean(dim=0),
    lambda x, y: 2 * F.cross_entropy(x, y) - x.square().sum() / 3 + (x.exp().mean() if len(x) else 0),
    lambda x, y: torch.stack([F.cross_entropy(x, y), x.square().mean()]).norm(p=1),
]


@pytest.mark.parametrize("number", range(len(LOSSES)))
def test_shares_add_up_to_the_loss_and_are_those_of_each_sample(number: int) -> None:
    loss_of = LOSSES[number]
    x = X.clone().requires_grad_()
    with Reductions() as reductions:
        loss = loss_of(x, Y)
    found = shares(loss, reductions.calls, B)
    assert found is not None
    assert found.shape == (B,)
    torch.testing.assert_close(found.sum(), loss, rtol=1e-12, atol=1e-12)
    (whole,) = torch.autograd.grad(loss, x, retain_graph=True)
    for i in range(B):  # a sample's share depends on its own row, and has its part of the gradient
        (row,) = torch.autograd.grad(found[i], x, retain_graph=True)
        assert row[torch.arange(B) != i].eq(0).all()
        torch.testing.assert_close(row[i], whole[i], rtol=1e-12, atol=1e-12)


def test_rows_of_a_sample_are_adjacent() -> None:
    x = torch.arange(12.0).requires_grad_()
    with Reductions() as reductions:
        loss = x.mean()
    found = shares(loss, reductions.calls, B)
    assert found is not None
    assert found.tolist() == [0.25, 1.0, 1.75, 2.5]


@pytest.mark.parametrize(
    "loss_of",
    [
        lambda x: torch.einsum("bi->", x),
        lambda x: x[:3].mean(),
        lambda x: x.mean() + x[:3].sum(),
        lambda x: x.detach().mean(),
        lambda x: x.detach().mean() * 2,
        lambda x: x.mean() * 0 if not x.requires_grad else x.max(),
        lambda x: F.mse_loss(x[0, 0], x[0, 1]),
    ],
)
def test_no_shares(loss_of: Callable[[Tensor], Tensor]) -> None:
    x = X.clone().requires_grad_()
    with Reductions() as reductions:
        loss = loss_of(x)
    found = shares(loss, reductions.calls, B)
    assert found is None or not loss.requires_grad


def test_shares_of_a_scalar_that_is_more_than_its_reductions_do_not_add_up() -> None:
    """That is for the caller to see."""
    x = X.clone().requires_grad_()
    for loss_of in (
        lambda: x.mean() + x.norm(),
        lambda: x.mean() * x.square().mean(),
        lambda: F.cross_entropy(x, Y, weight=torch.tensor([1.0, 2.0, 5.0]).double()),
        lambda: F.cross_entropy(x, Y, ignore_index=1),
    ):
        with Reductions() as reductions:
            loss = loss_of()
        found = shares(loss, reductions.calls, B)
        assert found is None or not torch.allclose(found.sum(), loss, rtol=1e-3)


def test_the_call_itself_is_left_alone() -> None:
    x = X.clone().requires_grad_()
    expected = F.cross_entropy(x, Y, label_smoothing=0.1)
    with Reductions():
        found = F.cross_entropy(x, Y, label_smoothing=0.1)
    assert torch.equal(found, expected)
