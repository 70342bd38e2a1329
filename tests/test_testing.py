"""The checks: they pass what is right, and name what is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_attr.gradients import OuterSum, ParameterGradient, gradient_rule
from lightning_attr.gradients.rules import GradientRule
from lightning_attr.outputs import BinaryMargin, ModelOutput, MulticlassMargin, NegativeLoss, Regression
from lightning_attr.testing import check_gradient_rule, check_model_output

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


class _Affine(nn.Module):
    """A layer of a user, with the rule that a test gives it."""

    def __init__(self, rows: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows))
        self.bias = nn.Parameter(torch.randn(rows))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


def _affine(layer: _Affine, activations: Tensor, backprops: Tensor) -> dict[str, Tensor]:
    return {"weight": (activations * backprops).sum(1), "bias": backprops.sum(1)}


def _other_sign(layer: _Affine, activations: Tensor, backprops: Tensor) -> dict[str, Tensor]:
    return {**_affine(layer, activations, backprops), "bias": -backprops.sum(1)}


def _forgets_bias(layer: _Affine, activations: Tensor, backprops: Tensor) -> dict[str, Tensor]:
    return {"weight": (activations * backprops).sum(1)}


def _forgets_positions(layer: _Affine, activations: Tensor, backprops: Tensor) -> dict[str, Tensor]:
    return {"weight": activations * backprops, "bias": backprops.sum(1)}


def _factored_too_wide(layer: _Affine, activations: Tensor, backprops: Tensor) -> dict[str, ParameterGradient]:
    return {"weight": OuterSum(backprops[..., :2], activations), "bias": backprops.sum(1)}


def _centred(layer: _Affine, activations: Tensor, backprops: Tensor) -> dict[str, Tensor]:
    found = _affine(layer, activations, backprops)
    return {**found, "bias": found["bias"] - found["bias"].mean(0)}


def _single(layer: _Affine, activations: Tensor, backprops: Tensor) -> dict[str, Tensor]:
    found = _affine(layer, activations, backprops)
    return {name: value.squeeze() if len(value) == 1 else value for name, value in found.items()}


def _remembers(layer: _Affine, activations: Tensor, backprops: Tensor) -> dict[str, Tensor]:
    first = vars(layer).setdefault("first", activations)
    seen = first if first.shape == activations.shape and first.dtype == activations.dtype else activations
    return _affine(layer, seen, backprops)


def _overflows(layer: _Affine, activations: Tensor, backprops: Tensor) -> dict[str, Tensor]:
    found = _affine(layer, activations, backprops)
    return {**found, "weight": found["weight"] / (layer.weight.dtype != torch.bfloat16)}


def test_a_right_rule_passes() -> None:
    gradient_rule(_Affine, replace=True)(_affine)
    layer = _Affine().train()
    before = [(p.dtype, p.clone()) for p in layer.parameters()]
    check_gradient_rule(layer.requires_grad_(False), torch.randn(4, 5, 3))
    assert layer.training
    assert not any(p.requires_grad for p in layer.parameters())
    assert all(
        p.dtype == dtype and torch.equal(p, old) for p, (dtype, old) in zip(layer.parameters(), before, strict=True)
    )


@pytest.mark.parametrize(
    ("layer", "inputs"),
    [
        (nn.Linear(3, 2), (torch.randn(4, 5, 3),)),
        (nn.ConvTranspose2d(2, 4, 3, groups=2), (torch.randn(3, 2, 4, 4),)),
        (nn.Embedding(5, 3, padding_idx=1), (torch.tensor([[0, 1], [2, 4], [3, 3]]),)),
        (nn.PReLU(3), (torch.randn(4, 3),)),
        (nn.RMSNorm(3), (torch.randn(4, 3),)),
        (nn.InstanceNorm1d(3, affine=True), (torch.randn(4, 3, 5),)),
        (nn.MultiheadAttention(4, 2, batch_first=True), tuple(torch.randn(3, 5, 4) for _ in range(3))),
        (nn.Sequential(nn.Linear(3, 2), nn.Dropout(), nn.LayerNorm(2)), (torch.randn(4, 3),)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_rules_of_the_package_pass(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    check_gradient_rule(layer, *inputs)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (_other_sign, r"autograd's gradient of `bias` \(called once, a batch of 4\), but they differ by up to"),
        (_forgets_bias, r"a gradient of `bias` \(called once, a batch of 4\), but it gives none"),
        (_forgets_positions, r"a gradient of `weight` of shape \(4, 3\) .*, but got \(4, 5, 3\)"),
        (_factored_too_wide, r"a gradient of `weight` of shape \(4, 3\) .*, but got \(4, 2, 3\)"),
        (_centred, "autograd's gradient of `bias`"),
        (_single, r"a gradient of `weight` of shape \(1, 3\) \(called once, a batch of 1\), but got \(3,\)"),
        (_remembers, r"autograd's gradient of `weight` \(called twice, a batch of 4\), but they differ"),
        (_overflows, r"finite gradients of `weight` in bfloat16, but 12 of 12 values are NaN or Inf"),
    ],
)
def test_what_is_wrong_with_a_rule_is_named(rule: GradientRule, message: str) -> None:
    gradient_rule(_Affine, replace=True)(rule)
    with pytest.raises(AssertionError, match=f"^_Affine: expected the rule to give {message}"):
        check_gradient_rule(_Affine(), torch.randn(4, 5, 3))


def test_a_layer_that_does_not_run_in_half_precision_is_checked_in_double() -> None:
    class Strict(_Affine):
        def forward(self, x: Tensor) -> Tensor:
            if x.dtype == torch.bfloat16:
                raise NotImplementedError("not here")
            return super().forward(x)

    gradient_rule(Strict)(_affine)
    check_gradient_rule(Strict(), torch.randn(4, 5, 3))


@pytest.mark.parametrize("layer", [nn.LSTM(3, 2), nn.ReLU()])
def test_a_layer_without_a_rule(layer: nn.Module) -> None:
    with pytest.raises(ValueError, match=f"Expected {type(layer).__name__} to have parameters and a gradient rule"):
        check_gradient_rule(layer, torch.randn(4, 3))


@pytest.mark.parametrize(
    ("inputs", "found"),
    [
        ((), "none"),
        ((torch.ones(1, 3),), r"\(1, 3\)"),
        ((torch.ones(()),), r"\(\)"),
        ((torch.ones(4, 3), torch.ones(3)), r"\(4, 3\), \(3,\)"),
    ],
)
def test_inputs_that_are_no_batch(inputs: tuple[Tensor, ...], found: str) -> None:
    with pytest.raises(ValueError, match=rf"shape \(b, ...\) with one b >= 2, but got {found}\."):
        check_gradient_rule(nn.Linear(3, 2), *inputs)
