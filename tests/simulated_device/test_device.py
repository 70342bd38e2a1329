"""The simulated device is what it says: a second device, with autograd, and what CUDA refuses it refuses."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import sim
import torch
from torch import Tensor, nn

DEVICE = torch.device("sim:0")


def test_values_are_those_of_the_cpu_and_new_memory_is_nan() -> None:
    x = torch.randn(5, 4)
    y = x.to(DEVICE)
    torch.testing.assert_close((y @ y.T).softmax(1).cpu(), (x @ x.T).softmax(1))
    torch.testing.assert_close(y[:, 1:3].T.contiguous().cumsum(0).cpu(), x[:, 1:3].T.cumsum(0))
    found = torch.linalg.eigh((y.T @ y).double())[0]
    torch.testing.assert_close(found.cpu(), torch.linalg.eigh((x.T @ x).double())[0])
    assert torch.empty(3, device=DEVICE).isnan().all()


@pytest.mark.parametrize(
    "mixed",
    [
        lambda a, b: a + b,
        lambda a, b: b @ a,
        lambda a, b: torch.cat([a, b]),
        lambda a, b: torch.where(b > 0, a, a),
        lambda a, b: b[a.long()],
        lambda a, b: torch.mul(a, a, out=b),
        lambda a, b: nn.functional.linear(a, b),
        lambda a, b: nn.functional.conv1d(a[None], b[None].mT),
        lambda a, b: b.__setitem__([0], a[:1]),
        lambda a, b: a.normal_(generator=torch.Generator()),
        lambda a, b: a + b.to("sim:1"),
    ],
)
def test_mixing_devices_raises(mixed: Callable[[Tensor, Tensor], Any]) -> None:
    with pytest.raises(RuntimeError, match=r"same device|device type for generator|should match"):
        mixed(torch.ones(2, 2, device=DEVICE), torch.ones(2, 2))


def test_what_cuda_allows_is_allowed() -> None:
    a, b = torch.ones(2, 2, device=DEVICE), torch.ones(2, 2)
    assert (a + torch.tensor(1.0)).device == DEVICE
    assert a[torch.tensor([0, 1])].device == DEVICE
    a[torch.tensor([0])] = 3.0
    b.copy_(a)
    assert b.tolist() == [[3, 3], [1, 1]]


def test_the_backward_pass_runs_in_the_thread_of_the_device() -> None:
    x, seen = torch.ones(3, device=DEVICE, requires_grad=True), []
    y = x * 2
    y.register_hook(lambda g: seen.append(threading.get_ident()))
    y.sum().backward()
    assert x.grad.tolist() == [2, 2, 2]
    assert seen[0] != threading.get_ident()


def test_views_share_memory_and_outputs_grow() -> None:
    x = torch.zeros(3, 4, device=DEVICE)
    view = x.view(12).unfold(0, 4, 4)[1]
    view += 1
    assert x.sum() == 4
    out = torch.empty(0, device=DEVICE)
    torch.add(x, 1, out=out)
    assert out.shape == (3, 4)
    assert out.sum() == 16


def test_random_numbers_come_from_a_stream_of_the_device() -> None:
    torch.manual_seed(3)
    cpu = torch.get_rng_state()
    first, state = torch.randn(3, device=DEVICE), torch.sim.get_rng_state(0)
    assert torch.equal(cpu, torch.get_rng_state())
    second = torch.randn(3, device=DEVICE)
    torch.sim.set_rng_state(state, 0)
    assert torch.equal(second, torch.randn(3, device=DEVICE))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_networks_have_the_gradients_of_the_cpu(kind: Any) -> None:
    net = nn.Sequential(kind(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    x = torch.randn(5, 3, 6, 6)
    net(x)
    other = copy.deepcopy(net).to(DEVICE)
    for own, data in ((net, x), (other, x.to(DEVICE))):
        own.zero_grad()
        own(data).square().sum().backward()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad.cpu(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("settings", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}])
def test_recurrent_layers_are_those_of_the_cpu_and_have_cudnns_rule(kind: Any, settings: dict[str, Any]) -> None:
    net, x = kind(3, 4, **settings), torch.randn(2, 5, 3)
    other = copy.deepcopy(net).to(DEVICE)
    for own, data in ((net, x), (other, x.to(DEVICE))):
        own(data)[0].square().sum().backward()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad.cpu())
    with pytest.raises(RuntimeError, match="training mode"):
        other.eval()(x.to(DEVICE))[0].sum().backward()


def test_waits_are_counted_and_can_be_found() -> None:
    x, seen = torch.ones(3, device=DEVICE), []
    with sim.counted(seen.append) as (operators, waits):
        x.sum().item()
        x.cpu()
        x.nonzero()
        torch.ones(3).to(DEVICE)
        torch.empty(3).copy_(x, non_blocking=True)
        x.to("cpu", non_blocking=True)  # into pinned memory, as on CUDA
    once = ("item", "copy to the host", "aten::nonzero", "copy to the device", "copy to the host (not pinned)")
    assert waits == dict.fromkeys(once, 1)
    assert sorted(seen) == sorted(once)
    assert operators["aten::copy_"] == 4


def test_a_pinned_copy_that_is_read_too_early_is_nan() -> None:
    with sim.late_copies():
        host = torch.ones(3, device=DEVICE).to("cpu", non_blocking=True)
        assert host.isnan().all()
        torch.sim.synchronize()
        assert host.tolist() == [1, 1, 1]


def test_float64_can_be_refused_and_memory_limited() -> None:
    with sim.without_float64(), pytest.raises(TypeError, match="float64"):
        torch.ones(3, device=DEVICE).double()
    used = torch.sim.memory_allocated()
    try:
        sim.set_memory(used + 1000)
        with pytest.raises(torch.OutOfMemoryError):
            torch.ones(1000, device=DEVICE)
    finally:
        sim.set_memory(2**34)


def test_products_round_where_the_flags_of_torch_let_them() -> None:
    a, x, kernel = (torch.randn(shape, device=DEVICE) for shape in ((64, 64), (8, 16, 32), (16, 16, 3)))
    exact = a @ a, nn.functional.conv1d(x, kernel)

    def errors() -> list[float]:
        found = a @ a, nn.functional.conv1d(x, kernel)
        return [((f - e).norm() / e.norm()).item() for f, e in zip(found, exact, strict=True)]

    with sim.tensor_cores():
        product, convolution = errors()
        assert product == 0
        assert 1e-4 < convolution < 1e-3
        torch.set_float32_matmul_precision("high")
        product, convolution = errors()
        torch.set_float32_matmul_precision("highest")
        assert 1e-4 < product < 1e-3


def test_what_has_no_deterministic_kernel_is_refused() -> None:
    torch.use_deterministic_algorithms(True)
    torch.ones(3).cumsum(0)
    torch.ones(3, device=DEVICE, dtype=torch.int64).cumsum(0)
    with pytest.raises(RuntimeError, match="deterministic"):
        torch.ones(3, device=DEVICE).cumsum(0)


def test_autocast_and_parameters_that_move() -> None:
    layer = nn.Linear(3, 2)
    p = layer.weight
    layer.to(DEVICE)
    assert layer.weight is p
    with torch.autocast("sim", torch.bfloat16):
        assert layer(torch.ones(1, 3, device=DEVICE)).dtype == torch.bfloat16
    p.data = torch.ones(2, 3)
    assert p.device.type == "cpu"
