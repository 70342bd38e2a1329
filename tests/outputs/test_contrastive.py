"""The contrastive margin: values against the formulas of probabilities, the identity, stability, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_attr.outputs import ContrastiveMargin, MulticlassMargin, NegativeLoss
from lightning_attr.testing import check_model_output


def logits(b: int = 4, n: int = 6) -> Tensor:
    return 3 * torch.randn(b, 2, 1 + n, dtype=torch.float64)


@pytest.mark.parametrize(("halved", "scale"), [(True, 0.5), (False, 1.0)])
def test_formulas(halved: bool, scale: float) -> None:
    given = logits()
    p = given.softmax(2)[..., 0]  # of the right pair among the simulated batch and it
    found = ContrastiveMargin(halved=halved)
    torch.testing.assert_close(found.margins(given), (p / (1 - p)).log())
    torch.testing.assert_close(found.output(given, None), (p / (1 - p)).log().sum(1))
    torch.testing.assert_close(found.loss(given, None), -scale * p.log().sum(1))
    torch.testing.assert_close(found.out_to_loss(given, None), scale * (1 - p).mean(1))
    assert not found.exact
    check_model_output(found, given, None)


def test_each_direction_is_the_margin_of_a_classifier() -> None:
    """With the embeddings of all other class texts as simulated batch."""
    s, labels = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 3, 1, 1, 2])
    others = torch.stack([torch.cat([row[:y], row[y + 1 :]]) for row, y in zip(s, labels.tolist(), strict=True)])
    given = torch.cat([s.gather(1, labels[:, None]), others], 1)
    found = ContrastiveMargin().margins(given[:, None].repeat(1, 2, 1))
    torch.testing.assert_close(found[:, 0], MulticlassMargin().output(s, labels))


@pytest.mark.parametrize("halved", [True, False])
def test_the_identity_holds_with_one_q_a_direction(halved: bool) -> None:
    given, output = logits().requires_grad_(), ContrastiveMargin(halved=halved)
    margins = output.margins(given)
    q = torch.sigmoid(-margins).detach() * (0.5 if halved else 1)
    (expected,) = torch.autograd.grad((q * margins).sum(), given, retain_graph=True)
    (found,) = torch.autograd.grad(output.loss(given, None).sum(), given)
    torch.testing.assert_close(found, -expected)


def test_one_q_is_exact_where_the_directions_agree() -> None:
    class Agreeing(ContrastiveMargin):
        exact = True

        def margins(self, outputs: Tensor) -> Tensor:
            return super().margins(outputs)[:, :1].expand(-1, 2)

    for halved in (True, False):
        check_model_output(Agreeing(halved=halved), logits(), None)


def test_the_loss_itself_needs_no_approximation() -> None:
    output = NegativeLoss(ContrastiveMargin().loss)
    assert output.exact
    check_model_output(output, logits(), None)


@pytest.mark.parametrize("size", [100.0, 10_000.0])
def test_large_logits_in_half_precision(size: float) -> None:
    given = torch.tensor([[[size, 0.0, 1.0], [0.0, size, 1.0]]], dtype=torch.float16).requires_grad_()
    output = ContrastiveMargin()
    assert output.margins(given).dtype == torch.float32
    torch.testing.assert_close(output.margins(given), torch.tensor([[size - F.softplus(torch.tensor(1.0)), -size]]))
    assert torch.autograd.grad(output.output(given, None).sum(), given)[0].isfinite().all()


@pytest.mark.parametrize("wrong", [torch.zeros(3, 4), torch.zeros(3, 3, 4), torch.zeros(3, 2, 1), "logits"])
def test_logits_of_another_shape(wrong: Any) -> None:
    found = str(tuple(wrong.shape)) if isinstance(wrong, Tensor) else "str"
    with pytest.raises(
        ValueError, match=r"logits of shape \(b, 2, 1 \+ N\).* but got " + found.replace("(", r"\(")[:4]
    ):
        ContrastiveMargin().output(wrong, None)
