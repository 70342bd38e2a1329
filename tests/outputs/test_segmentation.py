"""The margin of pixels: values against a loop over pixels, ignored pixels, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_attr.outputs import BinaryMargin, MulticlassMargin, NegativeLoss, PixelMargin
from lightning_attr.testing import check_model_output

PARTS = ("output", "loss", "out_to_loss", "newton_weight")


def masks(classes: int = 3, ignore: int = -100) -> tuple[Tensor, Tensor]:
    labels = torch.randint(classes, (4, 5, 6))
    labels[torch.rand(labels.shape) < 0.3] = ignore
    labels[:, 0, 0] = 1
    return 2 * torch.randn(4, classes, 5, 6, dtype=torch.float64), labels


@pytest.mark.parametrize("ignore", [-100, 255, 0])
def test_means_over_the_labelled_pixels_of_each_image(ignore: int) -> None:
    logits, labels = masks(ignore=ignore)
    for part in PARTS:
        found = getattr(PixelMargin(ignore), part)(logits, labels)
        for image in range(4):
            rows, columns = (labels[image] != ignore).nonzero().T
            pixels = logits[image, :, rows, columns].T, labels[image, rows, columns]
            torch.testing.assert_close(found[image], getattr(MulticlassMargin(), part)(*pixels).mean())


def test_the_loss_is_that_of_torch() -> None:
    logits, labels = masks()
    for image in range(4):
        expected = F.cross_entropy(logits[image : image + 1], labels[image : image + 1])
        torch.testing.assert_close(PixelMargin().loss(logits, labels)[image], expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64])
def test_one_channel_is_a_signed_logit(dtype: torch.dtype) -> None:
    logits, labels = torch.randn(4, 1, 5, 6, dtype=torch.float64), torch.randint(2, (4, 5, 6)).to(dtype)
    for part in PARTS:
        expected = getattr(BinaryMargin(), part)(logits.flatten(), labels.flatten()).reshape(4, -1).mean(1)
        torch.testing.assert_close(getattr(PixelMargin(), part)(logits, labels), expected)


def test_the_identity_is_approximate_and_that_of_the_loss_exact() -> None:
    class Claimed(PixelMargin):
        exact = True

    logits, labels = masks()
    check_model_output(PixelMargin(), logits, labels)
    check_model_output(NegativeLoss(PixelMargin().loss), logits, labels)
    with pytest.raises(AssertionError, match="Claimed: expected grad loss = -out_to_loss"):
        check_model_output(Claimed(), logits, labels)
    check_model_output(Claimed(), logits[..., :1, :1], labels[..., :1, :1])  # of one pixel, q is its own


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s, y: (s[:, :, 0, 0], y),
            r"logits of shape \(b, c, height, width\), but got torch.float64 of shape \(4, 3\)",
        ),
        (lambda s, y: (s.long(), y), "but got torch.int64 of shape"),
        (lambda s, y: ("mask", y), "but got str"),
        (lambda s, y: (s, y[:, 0]), r"labels of shape \(4, 5, 6\).* but got torch.int64 of shape \(4, 6\)"),
        (lambda s, y: (s, y.double()), "but got torch.float64 of shape .*For soft masks use NegativeLoss"),
        (lambda s, y: (s, torch.full_like(y, -100)), r"those at the positions \[0, 1, 2, 3\] of the batch have none"),
        (
            lambda s, y: (
                s,
                y.clone().index_put_((torch.tensor(2), torch.tensor(1), torch.tensor(1)), torch.tensor(3)),
            ),
            r"labels in \[0, 3\).* image at position 2 of the batch has the label 3",
        ),
        (lambda s, y: (s[:, :1], y.clamp(1, 2)), r"labels in \[0, 2\)"),
    ],
)
def test_bad_input(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PixelMargin().output(*change(*masks()))
