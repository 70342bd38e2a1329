"""Second directions against the Hessian of the loss, over all of their random signs at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_attr.outputs import (
    BinaryMargin,
    ContrastiveMargin,
    DenoisingLoss,
    LanguageModel,
    ModelOutput,
    MulticlassMargin,
    NegativeLoss,
    PixelMargin,
    Regression,
    SampleDraws,
    SquaredPrediction,
    curvature_of,
    softmax_direction,
)


class EverySign(SampleDraws):
    """All patterns of so many signs, one after the other, in place of random ones."""

    def signs(self, *shape: int) -> Tensor:
        count = torch.Size(shape).numel()
        patterns = torch.arange(2**count)[:, None] >> torch.arange(count) & 1
        return (1 - 2 * patterns.double()).reshape(-1, *shape)


CASES = {
    "multiclass": (MulticlassMargin(), (1, 5), torch.tensor([2])),
    "multiclass, two classes": (MulticlassMargin(), (1, 2), torch.tensor([1])),
    "multiclass, temperature": (MulticlassMargin(temperature=3.0), (1, 4), torch.tensor([0])),
    "language model": (LanguageModel(), (1, 3, 3), torch.tensor([[0, 2, 1]])),
    "language model, mean": (LanguageModel("mean_loss"), (1, 3, 3), torch.tensor([[0, 2, 1]])),
    "language model, margin": (LanguageModel("margin_of_mean"), (1, 3, 3), torch.tensor([[0, 2, 1]])),
    "language model, sum of margins": (LanguageModel("sum_of_margins", shift=False), (1, 2, 3), torch.tensor([[2, 1]])),
    "language model, ignored": (LanguageModel("mean_loss", shift=False), (1, 3, 3), torch.tensor([[0, -100, 1]])),
    "language model, last": (LanguageModel(positions="last", shift=False), (1, 3, 3), torch.tensor([[0, 2, -100]])),
    "pixels": (PixelMargin(), (1, 3, 1, 3), torch.tensor([[[0, 2, -100]]])),
    "pixels of two classes": (PixelMargin(), (1, 1, 2, 2), torch.tensor([[[0, 1], [1, -100]]])),
    "contrastive": (ContrastiveMargin(), (1, 2, 4), torch.zeros(1)),
    "contrastive, not halved": (ContrastiveMargin(halved=False), (1, 2, 3), torch.zeros(1)),
    "denoising": (DenoisingLoss(), (1, 2, 3), torch.randn(1, 2, 3)),
}


@pytest.mark.parametrize("case", CASES)
def test_second_moments_are_the_gauss_newton_matrix(case: str) -> None:
    model_output, shape, targets = CASES[case]
    if isinstance(model_output, LanguageModel) and model_output.shift:
        signs = (shape[1] - 1) * shape[2]
    elif isinstance(model_output, LanguageModel) and model_output.positions == "last":
        signs = shape[2]
    else:
        signs = torch.Size(shape).numel()
    outputs = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hessian = torch.func.hessian(lambda s: model_output.loss(s, targets).sum())(outputs)
    size = outputs.numel()
    many = outputs.repeat(2**signs, *[1] * (outputs.ndim - 1)).requires_grad_()
    labels = targets.repeat(2**signs, *[1] * (targets.ndim - 1))
    second = model_output.second_direction(many, labels, EverySign(torch.zeros(0, dtype=torch.int64)))
    assert second.shape == (2**signs,)
    (rows,) = torch.autograd.grad(second.sum(), many)
    rows = rows.reshape(len(many), size)
    found = rows.T @ rows / len(rows)
    if model_output.curvature == "rest":
        u = torch.func.grad(lambda s: model_output.output(s, targets).sum())(outputs).reshape(size)
        found = found + model_output.newton_weight(outputs, targets) * u[:, None] * u
    torch.testing.assert_close(found, hessian.reshape(size, size), atol=1e-6, rtol=1e-5)


def test_the_variance_of_a_product_is_as_stated() -> None:
    outputs, targets = torch.randn(1, 5, dtype=torch.float64), torch.tensor([1])
    x = torch.randn(5, dtype=torch.float64)
    many = outputs.repeat(32, 1).requires_grad_()
    second = MulticlassMargin().second_direction(many, targets.repeat(32), EverySign(torch.zeros(0, dtype=torch.int64)))
    (rows,) = torch.autograd.grad(second.sum(), many)
    q = MulticlassMargin().out_to_loss(outputs, targets)
    r = outputs.scatter(1, targets[:, None], float("-inf")).softmax(1)[0]
    a = r.sqrt() * (x - r @ x)
    variance = 2 * q**2 * (a.square().sum() ** 2 - a.pow(4).sum())
    torch.testing.assert_close((rows @ x).square().var(unbiased=False)[None], variance, rtol=1e-5, atol=1e-9)


def test_labels_of_large_vocabularies_are_drawn_from_the_softmax() -> None:
    logits = torch.full((1, 300), -4.0, dtype=torch.float64)
    logits[0, :3] = torch.tensor([3.0, 2.0, 1.0])
    p = logits.softmax(1)[0]
    rows = softmax_direction(logits.repeat(20_000, 1), SampleDraws.of(range(20_000), 0))
    labels = (rows + p).argmax(1)
    torch.testing.assert_close(rows, torch.nn.functional.one_hot(labels, 300) - p.expand(20_000, 300))
    torch.testing.assert_close(labels.bincount(minlength=300) / 20_000, p.float(), atol=0.01, rtol=0)


def test_signs_of_samples_are_their_own_and_fair() -> None:
    rows = list(range(4000))
    signs = SampleDraws.of(rows, 0, "final").signs(2, 3)
    few = SampleDraws.of([7, 3999], 0, "final").signs(2, 3)
    assert torch.equal(few, signs[[7, 3999]])
    flat = signs.flatten(1)
    torch.testing.assert_close(flat.T @ flat / 4000, torch.eye(6), atol=0.06, rtol=0)
    assert flat.mean(0).abs().max() < 0.06
    other = SampleDraws.of(rows, 0, "epoch=1").signs(2, 3)
    assert (other != signs).float().mean() == pytest.approx(0.5, abs=0.02)


class Focal(MulticlassMargin):
    def loss(self, outputs: Any, targets: Any) -> Tensor:
        return super().loss(outputs, targets).square()


class OwnDirection(Focal):
    def second_direction(self, outputs: Any, targets: Any, draws: SampleDraws) -> Tensor:
        return outputs.sum(1)


class OwnOutput(NegativeLoss):
    def __init__(self) -> None:
        super().__init__(lambda outputs, targets: outputs.sum(1))

    def second_direction(self, outputs: Any, targets: Any, draws: SampleDraws) -> Tensor:
        return outputs.sum(1)


@pytest.mark.parametrize(
    ("model_output", "expected"),
    [
        (MulticlassMargin(), "rest"),
        (BinaryMargin(), "newton"),
        (Regression(), "newton"),
        (LanguageModel(), "whole"),
        (NegativeLoss(lambda outputs, targets: outputs.sum(1)), "unknown"),
        (SquaredPrediction(), "unknown"),
        (Focal(), "unknown"),
        (OwnDirection(), "rest"),
        (OwnOutput(), "whole"),
    ],
)
def test_a_curvature_is_known_only_of_the_class_that_states_it(model_output: ModelOutput, expected: str) -> None:
    assert curvature_of(model_output) == expected


def test_an_output_without_a_second_direction_says_so() -> None:
    loss = NegativeLoss(lambda outputs, targets: outputs.sum(1))
    with pytest.raises(NotImplementedError, match=r'NegativeLoss has no second direction.*kernel="margin"'):
        loss.second_direction(torch.ones(1, 2), torch.zeros(1), SampleDraws.of([0], 0))
