"""Gradient rules of convolutions and transposed convolutions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_attr.gradients.factored import ConvSum, ParameterGradient, RowSum
from lightning_attr.gradients.rules import gradient_rule


@gradient_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def convolution(
    layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, activations: Tensor, backprops: Tensor
) -> dict[str, ParameterGradient]:
    """Convolutions, with every padding mode of theirs."""
    pads = _padding(layer)
    zeros = pads[::-2]  # first dimension first
    if layer.padding_mode != "zeros" or zeros != pads[-2::-2]:
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        activations, zeros = F.pad(activations, pads, mode=mode), [0] * len(zeros)
    weight = ConvSum(activations, backprops, layer.kernel_size, layer.stride, layer.dilation, layer.groups, zeros)
    return {"weight": weight, "bias": RowSum(weight)}


@gradient_rule(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def transposed_convolution(
    layer: nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d, activations: Tensor, backprops: Tensor
) -> dict[str, ParameterGradient]:
    """Transposed convolutions: a convolution from the output to the input, so that the two change places."""
    pads: list[int] = []
    for i in reversed(range(len(layer.kernel_size))):
        # What the kernels reach; from the output's size, as `output_size` may differ from call to call.
        reach = (activations.shape[2 + i] - 1) * layer.stride[i] + layer.dilation[i] * (layer.kernel_size[i] - 1) + 1
        before = int(layer.padding[i])
        pads += [before, reach - before - backprops.shape[2 + i]]
    weight = ConvSum(F.pad(backprops, pads), activations, layer.kernel_size, layer.stride, layer.dilation, layer.groups)
    return {"weight": weight, "bias": backprops.flatten(2).sum(2)}


def _padding(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> list[int]:
    """Padding as ``torch.nn.functional.pad`` wants it: before and after, last dimension first."""
    if layer.padding == "valid":
        return [0] * (2 * len(layer.kernel_size))
    pads: list[int] = []
    for i in reversed(range(len(layer.kernel_size))):
        if layer.padding == "same":
            total = layer.dilation[i] * (layer.kernel_size[i] - 1)
            pads += [total // 2, total - total // 2]
        else:
            pads += [int(layer.padding[i])] * 2
    return pads
