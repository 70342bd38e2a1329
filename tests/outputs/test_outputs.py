"""Model outputs: values against the formulas of probabilities, stability, shapes, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_attr.errors import InvalidLabelError, named_samples
from lightning_attr.outputs import BinaryMargin, ModelOutput, MulticlassMargin, NegativeLoss, Regression

PARTS = ("output", "loss", "out_to_loss", "newton_weight")
LABELS = torch.tensor([0, 3, 1, 1, 2])


def _logits() -> Tensor:
    return 3 * torch.randn(5, 4).double()


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_multiclass_margin_is_the_log_odds_of_the_label(temperature: float) -> None:
    logits, output = _logits(), MulticlassMargin(temperature)
    p = (logits / temperature).softmax(1)[torch.arange(5), LABELS]
    torch.testing.assert_close(output.output(logits, LABELS), (p / (1 - p)).log())
    torch.testing.assert_close(output.loss(logits, LABELS), -p.log())
    torch.testing.assert_close(output.out_to_loss(logits, LABELS), 1 - p)
    torch.testing.assert_close(output.newton_weight(logits, LABELS), p * (1 - p))


def test_multiclass_margin_of_two_classes_is_their_difference() -> None:
    logits = torch.randn(3, 2).double()
    margin = MulticlassMargin().output(logits, torch.tensor([1, 1, 0]))
    torch.testing.assert_close(
        margin, torch.stack([logits[0, 1] - logits[0, 0], logits[1, 1] - logits[1, 0], logits[2, 0] - logits[2, 1]])
    )


def test_a_constant_added_to_all_logits_changes_nothing() -> None:
    logits = _logits()
    for part in PARTS:
        found, moved = (getattr(MulticlassMargin(), part)(values, LABELS) for values in (logits, logits + 100))
        torch.testing.assert_close(found, moved)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_multiclass_labels_of_any_integer_type(dtype: torch.dtype) -> None:
    logits = _logits()
    for part in PARTS:
        found = getattr(MulticlassMargin(), part)(logits, LABELS.to(dtype))
        assert torch.equal(found, getattr(MulticlassMargin(), part)(logits, LABELS))


@pytest.mark.parametrize("output", [MulticlassMargin(), BinaryMargin()])
@pytest.mark.parametrize("size", [40.0, 1000.0])
def test_extreme_logits_stay_finite(output: ModelOutput, size: float) -> None:
    multiclass = isinstance(output, MulticlassMargin)
    logits = torch.tensor([[size, 0.0], [0.0, size]]) if multiclass else torch.tensor([size, -size])
    logits = logits.requires_grad_()
    labels = torch.tensor([0, 0]) if multiclass else torch.tensor([1, 1])
    torch.testing.assert_close(output.output(logits, labels), torch.tensor([size, -size]))
    torch.testing.assert_close(output.loss(logits, labels), torch.tensor([0.0, size]))
    torch.testing.assert_close(output.out_to_loss(logits, labels), torch.tensor([0.0, 1.0]), atol=1e-15, rtol=0)
    gradient = torch.autograd.grad(output.output(logits, labels).sum(), logits)[0]
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0  # the margin, unlike the loss, has a slope where the sample is fitted


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    logits = torch.tensor([[12.0, 0.0, 0.0]], dtype=dtype)  # p rounds to 1 in half precision, and q to 0
    cases: list[tuple[ModelOutput, Any, Any]] = [
        (MulticlassMargin(), logits, torch.tensor([0])),
        (BinaryMargin(), logits[:, 0], torch.tensor([1])),
        (Regression(), logits[:, 0], torch.tensor([12.5])),
    ]
    for output, outputs, targets in cases:
        for part in PARTS:
            assert getattr(output, part)(outputs, targets).dtype == torch.float32
        assert output.out_to_loss(outputs, targets).item() > 0


@pytest.mark.parametrize("columns", [(), (1,)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float64])
def test_binary_margin_is_the_log_odds_of_the_label(columns: tuple[int, ...], dtype: torch.dtype) -> None:
    logits, labels = torch.randn(6).double(), torch.tensor([0, 1, 1, 0, 1, 0])
    p = torch.where(labels == 1, logits.sigmoid(), 1 - logits.sigmoid())
    arguments = logits.reshape(6, *columns), labels.to(dtype).reshape(6, *columns)
    torch.testing.assert_close(BinaryMargin().output(*arguments), (p / (1 - p)).log())
    expected = F.binary_cross_entropy_with_logits(logits, labels.double(), reduction="none")
    torch.testing.assert_close(BinaryMargin().loss(*arguments), expected)
    torch.testing.assert_close(BinaryMargin().out_to_loss(*arguments), 1 - p)
    torch.testing.assert_close(BinaryMargin().newton_weight(*arguments), p * (1 - p))


def test_binary_margin_is_the_multiclass_margin_of_two_classes() -> None:
    logits, labels = torch.randn(6).double(), torch.tensor([0, 1, 1, 0, 1, 0])
    two = torch.stack([torch.zeros(6).double(), logits], 1)
    for part in PARTS:
        found, expected = getattr(BinaryMargin(), part)(logits, labels), getattr(MulticlassMargin(), part)(two, labels)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("columns", [(), (1,)])
def test_regression(columns: tuple[int, ...]) -> None:
    prediction, y = torch.randn(5).double(), torch.randn(5).double()
    arguments = prediction.reshape(5, *columns), y
    assert torch.equal(Regression().output(*arguments), prediction)
    torch.testing.assert_close(Regression(variance=0.5).loss(*arguments), F.mse_loss(prediction, y, reduction="none"))
    torch.testing.assert_close(Regression(variance=0.5).out_to_loss(*arguments), 2 * (y - prediction))
    torch.testing.assert_close(Regression(variance=4.0).newton_weight(*arguments), torch.full((5,), 0.25).double())


def test_negative_loss() -> None:
    logits = _logits()
    output = NegativeLoss(lambda s, y: F.cross_entropy(s, y, reduction="none", label_smoothing=0.1))
    loss = F.cross_entropy(logits, LABELS, reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(output.output(logits, LABELS), -loss)
    torch.testing.assert_close(output.loss(logits, LABELS), loss)
    assert torch.equal(output.out_to_loss(logits, LABELS), torch.ones(5).double())
    assert torch.equal(output.newton_weight(logits, LABELS), torch.ones(5).double())


def _call(output: ModelOutput, outputs: Any, targets: Any) -> None:
    output.output(outputs, targets)
    output.loss(outputs, targets)


@pytest.mark.parametrize(
    ("output", "outputs", "targets", "message"),
    [
        (
            MulticlassMargin(),
            torch.zeros(3),
            torch.zeros(3).long(),
            r"logits of shape \(b, c\) with c >= 2, but got \(3,\)",
        ),
        (MulticlassMargin(), torch.zeros(3, 1), torch.zeros(3).long(), r"but got \(3, 1\).*BinaryMargin for one logit"),
        (MulticlassMargin(), {"logits": 1}, torch.zeros(3).long(), "but got dict. Override `attribution_step`"),
        (
            MulticlassMargin(),
            torch.zeros(3, 2),
            torch.zeros(3, 2),
            r"labels of shape \(3,\), but got torch.float32 of shape \(3, 2\)",
        ),
        (
            MulticlassMargin(),
            torch.zeros(3, 2),
            torch.zeros(3),
            r"but got torch.float32 of shape \(3,\).*soft labels use NegativeLoss",
        ),
        (
            MulticlassMargin(),
            torch.zeros(3, 2),
            torch.zeros(2).long(),
            r"labels of shape \(3,\), but got torch.int64 of shape \(2,\)",
        ),
        (MulticlassMargin(), torch.zeros(3, 2), [0, 1, 0], "but got list"),
        (
            BinaryMargin(),
            torch.zeros(3, 2),
            torch.zeros(3),
            r"for BinaryMargin of shape \(b,\) or \(b, 1\), but got \(3, 2\)",
        ),
        (BinaryMargin(), torch.zeros(3), torch.zeros(3, 2), r"for BinaryMargin of shape"),
        (
            Regression(),
            torch.zeros(3, 2),
            torch.zeros(3),
            r"for Regression of shape .* got \(3, 2\).*For several outputs",
        ),
        (Regression(), torch.zeros(()), torch.zeros(3), r"for Regression of shape .* got \(\)"),
        (
            NegativeLoss(F.cross_entropy),
            torch.zeros(3, 2),
            torch.zeros(3).long(),
            r"of shape \(b,\), but got shape \(\). Use reduction='none'",
        ),
        (NegativeLoss(lambda s, y: s), torch.zeros(3, 2), torch.zeros(3), r"but got shape \(3, 2\)"),
    ],
)
def test_outputs_and_targets_that_do_not_fit(output: ModelOutput, outputs: Any, targets: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _call(output, outputs, targets)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_arguments_that_are_not_positive(value: float) -> None:
    with pytest.raises(ValueError, match=f"`temperature` of MulticlassMargin to be a .*number > 0, but got {value}"):
        MulticlassMargin(value)
    with pytest.raises(ValueError, match=f"`variance` of Regression to be a finite number > 0, but got {value}"):
        Regression(value)


def test_a_loss_that_cannot_be_called() -> None:
    with pytest.raises(TypeError, match=r"`loss_fn` of NegativeLoss to be a function .*, but got 'cross_entropy'"):
        NegativeLoss("cross_entropy")


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_multiclass_loss_is_the_likelihood_of_its_distribution(temperature: float) -> None:
    logits, output = _logits(), MulticlassMargin(temperature)
    found = -output.distribution(logits, torch.zeros_like(LABELS)).log_prob(LABELS)
    torch.testing.assert_close(found, output.loss(logits, LABELS))


@pytest.mark.parametrize("shape", [(5,), (5, 1)])
def test_binary_loss_is_the_likelihood_of_its_distribution(shape: tuple[int, ...]) -> None:
    logits, labels = torch.randn(5).double(), torch.tensor([0, 1, 1, 0, 1]).reshape(shape)
    found = -BinaryMargin().distribution(logits, torch.zeros_like(labels)).log_prob(labels.double())
    assert found.shape == shape
    torch.testing.assert_close(found.reshape(5), BinaryMargin().loss(logits, labels))


@pytest.mark.parametrize("variance", [1.0, 0.5, 3.0])
def test_regression_loss_is_the_likelihood_of_its_distribution(variance: float) -> None:
    predictions, targets, output = torch.randn(5, 1).double(), torch.randn(5).double(), Regression(variance)
    distribution = output.distribution(predictions, torch.zeros_like(targets))
    found = distribution.log_prob(distribution.mean) - distribution.log_prob(targets)
    torch.testing.assert_close(found, output.loss(predictions, targets))


def test_a_loss_of_its_own_has_no_distribution() -> None:
    class Ours(NegativeLoss):
        pass

    with pytest.raises(
        NotImplementedError, match=r'Ours does not .*`curvature="empirical_fisher"`.*`Ours\.distribution`'
    ):
        Ours(lambda outputs, targets: outputs).distribution(torch.zeros(2), torch.zeros(2))


@pytest.mark.parametrize("label", [-100, 3])
def test_labels_that_are_no_class_are_named(label: int) -> None:
    labels = torch.tensor([0, 2, label, 1])
    with pytest.raises(
        InvalidLabelError, match=rf"labels in \[0, 3\).* position 2 of the batch has the label {label}\."
    ):
        MulticlassMargin().output(torch.randn(4, 3), labels)
    with pytest.raises(InvalidLabelError, match=r"Look at dataset\[9\]"), named_samples([5, 7, 9, 11]):
        MulticlassMargin().output(torch.randn(4, 3), labels)
