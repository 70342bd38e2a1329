"""Moments of optimizers by parameter: against the optimizers' own state, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_attr.errors import AttributionError
from lightning_attr.parameters.optimizer_state import AdamMoments, OptimizerState


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def steps(module: nn.Module, *optimizers: torch.optim.Optimizer, count: int = 3) -> None:
    for _ in range(count):
        for optimizer in optimizers:
            optimizer.zero_grad()
        module(torch.randn(5, 3).double()).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize(
    "kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam], ids=lambda kind: kind.__name__
)
def test_moments_are_the_optimizers_own(kind: Any) -> None:
    module = network()
    optimizer = kind(module.parameters(), lr=0.01, betas=(0.8, 0.95), eps=1e-6)
    steps(module, optimizer)
    state = OptimizerState.of([optimizer], module)
    assert list(state.moments) == [name for name, _ in module.named_parameters()]
    for name, p in module.named_parameters():
        moments, own = state.moments[name], optimizer.state[p]
        assert moments.exp_avg is own["exp_avg"]
        assert moments.exp_avg_sq is own["exp_avg_sq"]
        assert (moments.step, moments.betas, moments.eps) == (3, (0.8, 0.95), 1e-6)
        assert (moments.learning_rate, moments.kind) == (0.01, kind.__name__)


def test_the_preconditioner_is_adams_own_scale() -> None:
    """A step of Adam without momentum moves by lr * D * g."""
    module = network()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1, betas=(0.0, 0.9), eps=1e-3)
    steps(module, optimizer)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    steps(module, optimizer, count=1)
    state = OptimizerState.of([optimizer], module)
    for name, p in module.named_parameters():
        expected = before[name] - 0.1 * state.moments[name].preconditioner() * p.grad
        torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-14)


def test_amsgrad_divides_by_the_largest() -> None:
    module = network()
    optimizer = torch.optim.Adam(module.parameters(), betas=(0.9, 0.1), amsgrad=True)
    steps(module, optimizer, count=5)
    state = OptimizerState.of([optimizer], module)
    for name, p in module.named_parameters():
        assert state.moments[name].exp_avg_sq is optimizer.state[p]["max_exp_avg_sq"]


def test_several_optimizers_and_groups() -> None:
    module = network()
    first = torch.optim.Adam([{"params": module[0].weight, "lr": 0.1}, {"params": module[0].bias, "eps": 1e-4}])
    second = torch.optim.AdamW(module[2].parameters(), lr=torch.tensor(0.2), betas=(0.5, 0.6))
    steps(module, first, second)
    moments = OptimizerState.of([first, second], module).moments
    assert {name: own.kind for name, own in moments.items()} == {
        "0.weight": "Adam", "0.bias": "Adam", "2.weight": "AdamW", "2.bias": "AdamW"
    }  # fmt: skip
    assert [own.learning_rate for own in moments.values()] == pytest.approx([0.1, 0.001, 0.2, 0.2])
    assert [own.eps for own in moments.values()] == [1e-8, 1e-4, 1e-8, 1e-8]
    assert moments["2.bias"].betas == (0.5, 0.6)


def test_parameters_that_were_never_updated_have_none() -> None:
    module = network()
    module[2].bias.requires_grad_(False)
    optimizer = torch.optim.Adam([module[0].weight, module[2].weight, module[2].bias])
    assert OptimizerState.of([optimizer], module).moments == {}
    module[0](torch.randn(5, 3).double()).sum().backward()
    optimizer.step()
    assert list(OptimizerState.of([optimizer], module).moments) == ["0.weight"]
    assert list(optimizer.state) == [module[0].weight]  # looking has added nothing


def test_round_trip() -> None:
    module = network()
    optimizer = torch.optim.AdamW(module.parameters())
    steps(module, optimizer)
    state = OptimizerState.of([optimizer], module)
    tensors = state.tensors()
    assert sorted(tensors)[0] == "exp_avg/0.bias"
    again = OptimizerState.from_tensors(tensors)
    assert list(again.moments) == sorted(state.moments)
    for name, own in again.moments.items():
        for key, value in vars(state.moments[name]).items():
            found = getattr(own, key)
            assert torch.equal(found, value) if isinstance(value, Tensor) else found == value


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize(
    "kind",
    [
        lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9),
        lambda params: torch.optim.RMSprop(params, lr=0.01),
        lambda params: torch.optim.Adamax(params, lr=0.01),
    ],
)
def test_others_are_refused(kind: Any, started: bool) -> None:
    """At once, but for one that has two betas and yet no second moment."""
    module = network()
    optimizer = kind(module.parameters())
    if started:
        steps(module, optimizer)
    elif isinstance(optimizer, torch.optim.Adamax):
        return
    name = type(optimizer).__name__
    with pytest.raises(AttributionError, match=rf"`exp_avg_sq` .* but {name}, which updates `0\.weight`, has none"):
        OptimizerState.of([optimizer], module)


def test_lbfgs_is_refused() -> None:
    module = network()
    with pytest.raises(AttributionError, match="but LBFGS, which updates"):
        OptimizerState.of([torch.optim.LBFGS(module.parameters())], module)


def test_an_optimizer_of_other_parameters_does_not_matter() -> None:
    module = network()
    other = torch.optim.SGD(network().parameters(), lr=0.1)
    assert OptimizerState.of([other], module).moments == {}


def test_sharded_moments_are_refused() -> None:
    class Sharded(torch.optim.Adam):
        def consolidate_state_dict(self) -> None: ...

    module = network()
    with pytest.raises(AttributionError, match=r"but Sharded shards them\. Use the optimizer that it wraps"):
        OptimizerState.of([Sharded(module.parameters())], module)


def test_bias_is_corrected() -> None:
    moments = AdamMoments(torch.zeros(1), torch.full((1,), 0.75), 2, (0.9, 0.5), 0.5, 0.1, "Adam")
    assert moments.preconditioner().item() == pytest.approx(1 / (1.0 + 0.5))
