"""Layers whose outputs are written to afterwards: their hooks see the gradient before that."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_attr.gradients import HookedGradients, materialise, plan_gradients

Make = Callable[[], nn.Module]


class _Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2).sub_(1)


class _Parts(nn.Module):
    """Writes to a part of its input, and reads it twice."""

    def forward(self, x: Tensor) -> Tensor:
        x[:, :1] = 0
        return x + x.relu_()


@pytest.mark.parametrize("shape", [(3, 4), (3, 5, 4), (3, 2, 5, 4)])
@pytest.mark.parametrize(
    "between",
    [
        lambda: nn.ReLU(inplace=True),
        lambda: nn.Sequential(nn.Dropout(), nn.SiLU(inplace=True)),
        lambda: nn.Sequential(nn.Identity(), nn.LeakyReLU(0.1, inplace=True)),
        _Doubled,
        _Parts,
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_keep_their_rule(shape: tuple[int, ...], between: Make, bias: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 6, bias=bias), between(), nn.Linear(6, 2)).double().eval()
    _check(net, torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize("layer", [nn.Conv1d, nn.Conv2d])
def test_convolutions_keep_their_rule(layer: type[nn.Module]) -> None:
    torch.manual_seed(0)
    dims = 1 if layer is nn.Conv1d else 2
    net = nn.Sequential(layer(3, 3, 2), layer(3, 4, 2), nn.ReLU(inplace=True), layer(4, 2, 1)).double().eval()
    _check(net, torch.randn(3, 3, *[6] * dims, dtype=torch.float64))


def test_embeddings_keep_their_rule() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(7, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)).double().eval()
    _check(net, torch.randint(7, (3, 5)))


def _check(net: nn.Module, x: Tensor) -> None:
    def output(batch: Tensor) -> Tensor:
        return net(batch).flatten(1).square().sum(1)

    def functional(params: object, batch: Tensor) -> Tensor:
        raise AssertionError("no parameter needs the fallback")

    names = [name for name, _ in net.named_parameters()]
    assert plan_gradients(net, output, functional, x, len(x)).hooked == tuple(names)
    found = {name: torch.zeros(len(x), *p.shape, dtype=torch.float64) for name, p in net.named_parameters()}

    def add(gradients: object) -> None:
        for name, gradient in gradients.items():  # type: ignore[attr-defined]
            found[name] += materialise(gradient, tuple(found[name].shape[1:]))

    HookedGradients(net, names, direct=())(lambda: output(x), len(x), add)
    for i in range(len(x)):
        rows = torch.autograd.grad(output(x[i : i + 1]).sum(), list(net.parameters()))
        for name, row in zip(names, rows, strict=True):
            torch.testing.assert_close(found[name][i], row)
