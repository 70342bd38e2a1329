"""Outputs of diffusion models: values, the identity with the loss, precision, shapes, and the sign of D-TRAK."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_attr.outputs import DenoisingLoss, ModelOutput, SquaredPrediction
from lightning_attr.testing import check_model_output

PARTS = ("output", "loss", "out_to_loss", "newton_weight")


def test_the_denoising_loss_is_the_mean_squared_error() -> None:
    prediction, target = torch.randn(3, 2, 4, 4).double(), torch.randn(3, 2, 4, 4).double()
    found = DenoisingLoss()
    for i in range(3):
        error = ((prediction[i] - target[i]) ** 2).sum() / 32
        torch.testing.assert_close(found.loss(prediction, target)[i], error)
        torch.testing.assert_close(found.output(prediction, target)[i], -error)
    assert torch.equal(found.out_to_loss(prediction, target), torch.ones(3).double())


def test_the_squared_prediction_knows_no_target() -> None:
    prediction = torch.randn(3, 2, 4, 4).double()
    found = SquaredPrediction()
    for i in range(3):
        torch.testing.assert_close(found.output(prediction, None)[i], (prediction[i] ** 2).sum() / 32)
    assert torch.equal(found.loss(prediction, None), -found.output(prediction, None))
    assert torch.equal(found.out_to_loss(prediction, None), torch.ones(3).double())


@pytest.mark.parametrize("output", [DenoisingLoss(), SquaredPrediction()])
def test_the_gradient_of_the_loss_is_that_of_the_output(output: ModelOutput) -> None:
    check_model_output(output, torch.randn(4, 1, 3, 3), torch.randn(4, 1, 3, 3))


@pytest.mark.parametrize("output", [DenoisingLoss(), SquaredPrediction()])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(output: ModelOutput, dtype: torch.dtype) -> None:
    prediction, target = (400 * torch.ones(2, 1, 4, 4)).to(dtype), torch.zeros(2, 1, 4, 4).to(dtype)
    for part in PARTS:  # the squares are beyond float16
        values = getattr(output, part)(prediction, target)
        assert values.dtype == torch.float32
        assert values.isfinite().all()
    assert output.output(prediction, target).abs()[0].item() == pytest.approx(prediction[0, 0, 0, 0].item() ** 2)


@pytest.mark.parametrize(
    ("prediction", "target"), [((2, 2, 4, 4), (2, 1, 4, 4)), ((2, 4, 4), (2, 1, 4, 4)), ((2,), (2,))]
)
def test_a_prediction_of_another_shape_than_its_target(prediction: tuple[int, ...], target: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"Expected a prediction of the shape of its target, .* only its first half"):
        DenoisingLoss().loss(torch.zeros(prediction), torch.zeros(target))


def test_a_prediction_without_entries() -> None:
    with pytest.raises(ValueError, match=r"Expected predictions of shape \(b, \.\.\.\) for SquaredPrediction"):
        SquaredPrediction().output(torch.zeros(2), None)


def _trained_on(sample: Tensor, noises: Tensor) -> tuple[Tensor, Tensor]:
    """Both outputs of a sample, before and after training on it."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)

    def outputs() -> list[Tensor]:
        prediction = network(0.5 * sample + noises)
        return [kind.output(prediction, noises).mean() for kind in (DenoisingLoss(), SquaredPrediction())]

    before = torch.stack(outputs()).detach()
    for _ in range(50):
        optimizer.zero_grad()
        (-outputs()[0]).backward()
        optimizer.step()
    return before, torch.stack(outputs()).detach()


def test_training_on_a_sample_raises_both_outputs() -> None:
    # This is what q = 1 says: positive scores are proponents under either output.
    before, after = _trained_on(torch.randn(1, 8), torch.randn(64, 8))
    assert (after > before + 0.05).all()
