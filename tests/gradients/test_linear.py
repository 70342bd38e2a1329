"""Rules of linear maps and slopes against autograd, one sample after the other, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cases import check_gradients
from lightning_attr.gradients import rule_for

B = 3


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("between", [(), (4,), (2, 3)])
def test_linear(between: tuple[int, ...], bias: bool) -> None:
    check_gradients(nn.Linear(5, 2, bias=bias), torch.randn(B, *between, 5))


# As transformers 4.57 has it, under the name that its rule goes by.
class Conv1D(nn.Module):
    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.nx = nx
        self.weight = nn.Parameter(torch.empty(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        size_out = (*x.size()[:-1], self.nf)
        x = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return x.view(size_out)


@pytest.mark.parametrize("module", ["transformers.pytorch_utils", "transformers.modeling_utils"])
@pytest.mark.parametrize("between", [(), (4,), (2, 3)])
def test_conv1d_of_transformers(monkeypatch: pytest.MonkeyPatch, module: str, between: tuple[int, ...]) -> None:
    assert rule_for(Conv1D(2, 5)) is None
    monkeypatch.setattr(Conv1D, "__module__", module)
    check_gradients(Conv1D(2, 5), torch.randn(B, *between, 5))


def test_conv1d_of_the_transformers_installed() -> None:
    utils = pytest.importorskip("transformers.pytorch_utils")
    check_gradients(utils.Conv1D(2, 5), torch.randn(B, 4, 5))


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("between", [(), (5,), (3, 2)])
def test_prelu(channels: int, between: tuple[int, ...]) -> None:
    layer = nn.PReLU(channels)
    nn.init.normal_(layer.weight)
    check_gradients(layer, torch.randn(B, 4, *between, generator=torch.Generator().manual_seed(0)) - 0.5)
