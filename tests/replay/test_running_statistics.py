"""Running statistics of BatchNorm with derivatives: as the layers compute and use them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_attr.replay.running_statistics import NewStatistics, UsedStatistics


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3), (6, 4, 2, 3)])
def test_new_statistics_are_those_of_the_layer(shape: tuple[int, ...], momentum: float | None) -> None:
    torch.manual_seed(0)
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)]
    net = nn.Sequential(kind(4, momentum=momentum)).double()
    for _ in range(3):
        before = {name: buffer.clone() for name, buffer in net.named_buffers()}
        with NewStatistics(net, before) as statistics:
            net(torch.randn(shape, dtype=torch.float64))
            net(torch.randn(shape, dtype=torch.float64))  # twice in a step
        assert sorted(statistics.found) == ["0.running_mean", "0.running_var"]
        for name, found in statistics.found.items():
            torch.testing.assert_close(found, net.get_buffer(name))


def test_layers_in_eval_mode_keep_their_statistics() -> None:
    net = nn.BatchNorm1d(2).eval()
    with NewStatistics(net, dict(net.named_buffers())) as statistics:
        net(torch.randn(3, 2))
    assert statistics.found == {}
    assert not net._forward_pre_hooks


def test_used_statistics_have_the_derivative_of_differences() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(4)
    net = nn.Sequential(nn.Linear(3, 4), norm).double().eval()
    x, mean, var = torch.randn(5, 3).double(), torch.randn(4).double(), torch.rand(4).double() + 0.5

    def output(mean: Tensor, var: Tensor) -> Tensor:
        norm.running_mean, norm.running_var = mean.detach(), var.detach()
        with UsedStatistics(net, {"1.running_mean": mean, "1.running_var": var}):
            found: Tensor = net(x)
        torch.testing.assert_close(found, net(x))
        return found

    assert torch.autograd.gradcheck(output, (mean.requires_grad_(), var.requires_grad_()))
