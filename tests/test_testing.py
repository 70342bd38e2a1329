"""``check_model_output``: passes what is right, and names what is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_attr.outputs import BinaryMargin, ModelOutput, MulticlassMargin, NegativeLoss, Regression
from lightning_attr.testing import check_model_output

LABELS, BITS = torch.tensor([0, 2, 1, 1, 0]), torch.tensor([0, 1, 1, 0, 1])


def _smooth(s: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(s, y, reduction="none", label_smoothing=0.2)


SHIPPED: list[tuple[ModelOutput, tuple[int, ...], Tensor]] = [
    (MulticlassMargin(), (5, 3), LABELS),
    (MulticlassMargin(temperature=0.3), (5, 3), LABELS),
    (MulticlassMargin(), (5, 2), BITS),
    (BinaryMargin(), (5,), BITS),
    (BinaryMargin(), (5, 1), BITS.float()[:, None]),
    (Regression(), (5,), torch.randn(5)),
    (Regression(variance=0.2), (5, 1), torch.randn(5)),
    (NegativeLoss(_smooth), (5, 3), LABELS),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, None])
@pytest.mark.parametrize(("output", "shape", "targets"), SHIPPED)
def test_shipped_outputs_pass(output: ModelOutput, shape: tuple[int, ...], targets: Tensor, dtype: torch.dtype) -> None:
    check_model_output(output, torch.randn(shape), targets, dtype=dtype)


def test_one_sample_passes() -> None:
    check_model_output(MulticlassMargin(), torch.randn(1, 3), LABELS[:1])


def test_nested_outputs_pass_and_are_left_alone() -> None:
    class Weighted(ModelOutput):
        def output(self, outputs: Any, targets: Any) -> Tensor:
            return -self.loss(outputs, targets)

        def loss(self, outputs: Any, targets: Any) -> Tensor:
            return outputs["a"].square().sum(1) + outputs["more"][0] * targets["y"]

        def out_to_loss(self, outputs: Any, targets: Any) -> Tensor:
            return torch.ones_like(outputs["more"][0])

    outputs = {"a": torch.randn(5, 2), "more": (torch.randn(5), LABELS), "name": "x"}
    before = outputs["a"].clone()
    check_model_output(Weighted(), outputs, {"y": torch.randn(5)})
    assert torch.equal(outputs["a"], before)
    assert not outputs["a"].requires_grad


class _Sign(MulticlassMargin):
    def out_to_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return -super().out_to_loss(outputs, targets)


class _Scale(Regression):
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 2 * super().loss(outputs, targets)


class _OtherLoss(MulticlassMargin):
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return _smooth(outputs, targets)  # not a function of the margin alone


class _Newton(MulticlassMargin):
    def newton_weight(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 1.1 * super().newton_weight(outputs, targets)


class _NegativeNewton(NegativeLoss):
    def newton_weight(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return -super().newton_weight(outputs, targets)


class _ReducedLoss(MulticlassMargin):
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().loss(outputs, targets).mean()


class _ReducedOutput(MulticlassMargin):
    def output(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().output(outputs, targets).sum()


class _Column(MulticlassMargin):
    def out_to_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().out_to_loss(outputs, targets)[:, None]


class _Mixing(NegativeLoss):
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().loss(outputs, targets) + outputs.mean()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (_Sign(), "_Sign: expected grad loss = -out_to_loss . grad output, but they differ by up to"),
        (_Scale(), "_Scale: expected grad loss = -out_to_loss . grad output"),
        (_OtherLoss(), "_OtherLoss: expected grad loss = -out_to_loss . grad output"),
        (_Newton(), "_Newton: expected grad out_to_loss = -newton_weight . grad output"),
        (_NegativeNewton(_smooth), "_NegativeNewton: expected `newton_weight` not to be negative, but got -1"),
        (_ReducedLoss(), r"expected `loss` to return one value a sample, of shape \(5,\), but got \(\)"),
        (_ReducedOutput(), r"expected `output` to return one value a sample.* but got \(\)"),
        (_Column(), r"expected `out_to_loss` to return one value a sample, of shape \(5,\), but got \(5, 1\)"),
        (_Mixing(_smooth), "_Mixing: expected each sample's output to depend on its own outputs only"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, None])
def test_what_is_wrong_is_named(output: ModelOutput, message: str, dtype: torch.dtype | None) -> None:
    outputs = torch.randn(5, 1) if isinstance(output, Regression) else torch.randn(5, 3)
    targets = torch.randn(5) if isinstance(output, Regression) else LABELS
    with pytest.raises(AssertionError, match=message):
        check_model_output(output, outputs, targets, dtype=dtype)


def test_outputs_without_a_float() -> None:
    with pytest.raises(
        ValueError, match="outputs for MulticlassMargin to hold a floating-point tensor, but found none"
    ):
        check_model_output(MulticlassMargin(), LABELS, LABELS)
