"""Rules of convolutions against autograd, one sample after the other, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cases import check_gradients

B = 3


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolution(dims: int, bias: bool, groups: int) -> None:
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    sizes, kernel = (9, 8, 7)[:dims], (3, 2, 1)[:dims]
    module = layer(4, 8, kernel, stride=(2, 1, 3)[:dims], dilation=(2, 1, 1)[:dims], groups=groups, bias=bias)
    check_gradients(module, torch.randn(B, 4, *sizes))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # torch's word on its own speed
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", ["same", "valid", 2])
def test_convolution_padding(dims: int, mode: str, padding: str | int) -> None:
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    padding = padding if isinstance(padding, str) else (2, 1, 0)[:dims]
    kernel = (4, 3, 2)[:dims]  # even: "same" pads one more after than before
    check_gradients(
        layer(2, 4, kernel, padding=padding, padding_mode=mode, groups=2), torch.randn(B, 2, *(5, 6, 4)[:dims])
    )


@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_convolution_same_with_dilation(mode: str) -> None:
    check_gradients(
        nn.Conv2d(2, 2, (2, 3), padding="same", dilation=(3, 2), padding_mode=mode), torch.randn(B, 2, 7, 8)
    )


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stride": (2, 3, 1), "output_padding": (1, 2, 0)},
        {"stride": (3, 2, 2), "padding": (2, 0, 1), "output_padding": (0, 1, 1)},
        {"dilation": (2, 3, 1), "padding": (1, 2, 0), "output_padding": (1, 2, 0)},  # more than the stride
    ],
    ids=lambda settings: "+".join(settings) or "plain",
)
def test_transposed_convolution(dims: int, bias: bool, groups: int, settings: dict[str, tuple[int, ...]]) -> None:
    layer = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    settings = {name: values[:dims] for name, values in settings.items()}
    module = layer(4, 6, (3, 2, 2)[:dims], groups=groups, bias=bias, **settings)
    check_gradients(module, torch.randn(B, 4, *(4, 3, 2)[:dims]))


def test_transposed_convolution_to_a_size_given_in_the_call() -> None:
    class Upsample(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x, output_size=(8, 7))

    check_gradients(Upsample(), torch.randn(B, 2, 4, 4))


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_channels_last(kind: type[nn.Conv2d | nn.ConvTranspose2d]) -> None:
    module = nn.Sequential(
        kind(4, 6, 3, groups=2), nn.GroupNorm(2, 6), nn.PReLU(6), nn.BatchNorm2d(6), nn.Tanh(), kind(6, 2, 3, padding=1)
    )
    check_gradients(
        module.to(memory_format=torch.channels_last), torch.randn(B, 4, 6, 5).to(memory_format=torch.channels_last)
    )
