"""Rules of normalisations against autograd, one sample after the other, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cases import check_gradients

B = 3


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape", "normalized"), [((6,), 6), ((4, 6), 6), ((4, 5, 6), (5, 6)), ((2, 3), (2, 3))])
def test_layer_norm(shape: tuple[int, ...], normalized: int | tuple[int, ...], bias: bool) -> None:
    layer = nn.LayerNorm(normalized, eps=0.1, bias=bias)
    nn.init.normal_(layer.weight)
    check_gradients(layer, torch.randn(B, *shape))


@pytest.mark.parametrize("shape", [(6,), (6, 4), (6, 3, 4)])
def test_group_norm(shape: tuple[int, ...]) -> None:
    layer = nn.GroupNorm(2 if shape != (6,) else 3, 6, eps=0.1)
    nn.init.normal_(layer.weight)
    check_gradients(layer, torch.randn(B, *shape))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.BatchNorm1d, ()), (nn.BatchNorm1d, (5,)), (nn.BatchNorm2d, (3, 4)), (nn.BatchNorm3d, (2, 3, 2))],
)
def test_batch_norm_in_eval_mode(layer: type[nn.BatchNorm1d], shape: tuple[int, ...]) -> None:
    norm = layer(4, eps=0.1)
    norm(3 * torch.randn(8, 4, *shape) + 1)  # running statistics that are not the initial ones
    nn.init.normal_(norm.weight)
    check_gradients(norm, torch.randn(B, 4, *shape))


@pytest.mark.parametrize("eps", [None, 0.1])
@pytest.mark.parametrize(("shape", "normalized"), [((6,), 6), ((4, 6), 6), ((4, 5, 6), (5, 6)), ((2, 3), (2, 3))])
def test_rms_norm(shape: tuple[int, ...], normalized: int | tuple[int, ...], eps: float | None) -> None:
    layer = nn.RMSNorm(normalized, eps=eps)
    nn.init.normal_(layer.weight)
    check_gradients(layer, torch.randn(B, *shape))


@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.InstanceNorm1d, (5,)), (nn.InstanceNorm2d, (3, 4)), (nn.InstanceNorm3d, (2, 3, 2))],
)
def test_instance_norm(layer: type[nn.InstanceNorm1d], shape: tuple[int, ...], running: bool) -> None:
    norm = layer(4, eps=0.1, affine=True, track_running_stats=running)
    norm(3 * torch.randn(8, 4, *shape) + 1)  # running statistics that are not the initial ones
    nn.init.normal_(norm.weight)
    check_gradients(norm, torch.randn(B, 4, *shape))


@pytest.mark.parametrize("running", [True, False])
def test_instance_norm_in_train_mode(running: bool) -> None:
    norm = nn.InstanceNorm1d(4, affine=True, track_running_stats=running, momentum=0.5).train()
    norm.eval = lambda: norm
    check_gradients(norm, torch.randn(B, 4, 5) + 2)


@pytest.mark.parametrize(
    "layer",
    [nn.LayerNorm(4, elementwise_affine=False), nn.RMSNorm(4, elementwise_affine=False), nn.InstanceNorm1d(4)],
)
def test_a_norm_without_parameters(layer: nn.Module) -> None:
    check_gradients(nn.Sequential(nn.Linear(4, 4), layer), torch.randn(B, 4, 4))
