"""What would hide layers from the hooks is off while gradients are taken, and on again afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from cases import LayersOf, check_gradients
from lightning_attr.gradients.plain_execution import plain_execution

B = 3


def _checkpointed(reentrant: bool, first: bool) -> nn.Module:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        h = x if first else m.c(x)
        h = checkpoint.checkpoint(lambda h: m.a(h).tanh() + m.a(h * 2), h, use_reentrant=reentrant)
        return m.b(checkpoint.checkpoint(m.d, h, use_reentrant=reentrant))

    layers = {name: nn.Linear(4, 4) for name in ["a", "b", "d"] + ["c"] * (not first)}
    return LayersOf(run, **layers)


@pytest.mark.parametrize("first", [True, False])
def test_checkpoints(first: bool) -> None:
    check_gradients(_checkpointed(False, first), torch.randn(B, 4))


@pytest.mark.parametrize("first", [True, False])
def test_reentrant_checkpoints(first: bool) -> None:
    module, x = _checkpointed(True, first).double(), torch.randn(B, 4).double()
    with plain_execution():  # for the reference: torch.autograd.grad refuses reentrant checkpoints
        check_gradients(module, x)
    if not first:
        output = module(x).sum()
        with pytest.raises(RuntimeError, match=r"(?i)not compatible with \.grad|incompatible with \.grad"):
            torch.autograd.grad(output, list(module.parameters()))


def test_checkpoints_still_recompute() -> None:
    calls: list[int] = []

    def run(x: Tensor) -> Tensor:
        calls.append(1)
        return x.sin()

    x = torch.randn(B, requires_grad=True)
    with plain_execution():
        torch.autograd.grad(checkpoint.checkpoint(run, x, use_reentrant=True).cos().sum(), x)
    assert len(calls) == 2


@pytest.mark.parametrize("how", ["wrapped", "in place", "inner"])
def test_compiled_modules(how: str) -> None:
    torch._dynamo.reset()
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(B, 4).double()
    whole: nn.Module = module
    if how == "wrapped":
        whole = torch.compile(module, backend="eager")
    elif how == "in place":
        module.compile(backend="eager")
    else:
        whole = nn.Sequential(torch.compile(module, backend="eager"), nn.Linear(2, 2))
    whole.double()
    whole(x)  # compiled before there are hooks
    check_gradients(whole, x)
    check_gradients(whole, x)


def test_compiled_modules_are_compiled_again_afterwards() -> None:
    torch._dynamo.reset()
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(1)
        return graph.forward

    module = torch.compile(nn.Linear(4, 2), backend=backend)
    with plain_execution():
        module(torch.randn(B, 4))
    assert graphs == []
    module(torch.randn(B, 4))
    assert graphs == [1]


def _fail_inside() -> None:
    with plain_execution():
        assert not torch.backends.mha.get_fastpath_enabled()
        raise KeyError("planted")


@pytest.mark.parametrize("fused", [True, False])
def test_everything_is_as_before(fused: bool) -> None:
    reentrant = checkpoint.CheckpointFunction
    torch.backends.mha.set_fastpath_enabled(fused)
    try:
        with pytest.raises(KeyError, match="planted"):
            _fail_inside()
        assert torch.backends.mha.get_fastpath_enabled() is fused
        assert checkpoint.CheckpointFunction is reentrant
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_weights_that_autocast_copied_without_gradients_get_theirs() -> None:
    module, x = nn.Linear(4, 2), torch.randn(B, 4)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            module(x)
        with plain_execution():
            total = module(x).sum()
    (found,) = torch.autograd.grad(total, [module.weight])
    torch.testing.assert_close(found, x.sum(0).expand(2, 4), rtol=0.02, atol=0.02)
