"""The hooks: what they leave behind (nothing), what they never compute (weight gradients), what they stream."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_attr.gradients import ParameterGradient, hooked_gradients, hooked_layers, materialise
from lightning_attr.gradients.hooks import HookedGradients, frozen

B = 3


def _net() -> nn.Sequential:
    net = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5), nn.LayerNorm(5))
    net[0].bias.requires_grad_(False)
    return net.eval()


def _names(module: nn.Module) -> list[str]:
    return [name for own in hooked_layers(module).values() for name in own.values()]


def _state(module: nn.Module) -> list[object]:
    hooks = [(len(m._forward_hooks), len(m._backward_hooks), len(m._forward_pre_hooks)) for m in module.modules()]
    return [[(p.requires_grad, p.grad, p._backward_hooks) for p in module.parameters()], hooks, torch.is_grad_enabled()]


def _run(module: nn.Module, x: Tensor, sink: object = lambda name, gradient: None) -> Tensor:
    return hooked_gradients(module, lambda: module(x).square().sum(1), len(x), _names(module), sink)


@pytest.mark.parametrize("grad_mode", [True, False])
def test_everything_is_as_before(grad_mode: bool) -> None:
    net = _net()
    before, weights = _state(net), [p.clone() for p in net.parameters()]
    with torch.set_grad_enabled(grad_mode):
        output = _run(net, torch.randn(B, 2, 5))
    assert _state(net) == before
    assert all(torch.equal(p, w) for p, w in zip(net.parameters(), weights, strict=True))
    assert not output.requires_grad


def _raise(*_: object) -> None:
    raise KeyError("planted")


def test_everything_is_as_before_when_the_forward_pass_raises() -> None:
    net, x = _net(), torch.randn(B, 2, 5)
    before = _state(net)

    def forward() -> Tensor:
        net(x)
        raise KeyError("planted")

    with pytest.raises(KeyError, match="planted"):
        hooked_gradients(net, forward, B, _names(net), _raise)
    assert _state(net) == before


def test_everything_is_as_before_when_the_sink_raises() -> None:
    net = _net()
    before = _state(net)
    with pytest.raises(KeyError, match="planted"):
        _run(net, torch.randn(B, 2, 5), _raise)
    assert _state(net) == before


def test_frozen_restores_only_what_it_froze() -> None:
    net = _net()
    before = [p.requires_grad for p in net.parameters()]
    with frozen(net.parameters()):
        assert not any(p.requires_grad for p in net.parameters())
    with pytest.raises(KeyError, match="planted"), frozen(net.parameters()):
        _raise()
    assert [p.requires_grad for p in net.parameters()] == before == [True, False, True, True, True, True]


class _Shapes(TorchDispatchMode):
    """Notes the shapes of all that torch computes, transposed or not."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        out = func(*args, **(kwargs or {}))
        new = () if func.is_view else out if isinstance(out, (tuple, list)) else (out,)
        self.seen |= {tuple(sorted(t.shape)) for t in new if isinstance(t, Tensor)}
        return out


def test_no_weight_gradient_is_formed() -> None:
    net = nn.Sequential(nn.Linear(11, 13), nn.ReLU(), nn.Linear(13, 17))
    fired: list[str] = []
    for name, p in net.named_parameters():
        p.register_hook(lambda grad, name=name: fired.append(name))
    with _Shapes() as shapes:
        _run(net, torch.randn(B, 11))
    assert fired == []
    weights = {(11, 13), (13, 17), (B, 11, 13), (B, 13, 17)}
    assert not weights & shapes.seen
    with _Shapes() as shapes:  # the test can fail: plain autograd forms them
        net(torch.randn(B, 11)).sum().backward()
    assert weights & shapes.seen == {(11, 13), (13, 17)}
    assert len(fired) == 4


def test_gradients_leave_layer_by_layer_from_the_last() -> None:
    order: list[str] = []
    _run(_net(), torch.randn(B, 2, 5), lambda name, gradient: order.append(name))
    assert order == ["4.weight", "4.bias", "3.weight", "3.bias", "0.weight"]


def test_only_the_wanted_names_are_streamed() -> None:
    net, seen = _net(), []
    x = torch.randn(B, 2, 5)
    hooked_gradients(net, lambda: net(x).sum(1), B, ["3.bias"], lambda name, gradient: seen.append(name))
    assert seen == ["3.bias"]
    hooked_gradients(net, lambda: net(x).sum(1), B, [], lambda name, gradient: seen.append(name))
    assert seen == ["3.bias"]


def test_the_output_is_the_forward_pass() -> None:
    net, x = _net(), torch.randn(B, 2, 5)
    torch.testing.assert_close(_run(net, x), net(x).square().sum(1).detach(), rtol=0, atol=0)


def test_an_output_without_gradient_streams_nothing() -> None:
    net, seen = _net(), []
    x = torch.randn(B, 2, 5)
    hooked_gradients(net, lambda: net(x).sum(1).detach(), B, _names(net), lambda name, gradient: seen.append(name))
    assert seen == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_are_summed_in_float32(dtype: torch.dtype) -> None:
    layer = nn.Linear(4, 2).to(dtype)
    x = torch.randn(B, 300, 4, dtype=dtype)
    found: dict[str, Tensor] = {}

    def keep(name: str, gradient: ParameterGradient) -> None:
        found[name] = materialise(gradient, tuple(layer.get_parameter(name).shape))

    with torch.autocast("cpu", torch.bfloat16):  # must not put the sums back into half precision
        hooked_gradients(layer, lambda: layer(x).flatten(1).float().sum(1), B, ["weight", "bias"], keep)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    torch.testing.assert_close(found["weight"][:, 0], x.float().sum(1), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found["bias"], torch.full((B, 2), 300.0))


def test_hooked_layers_lists_tied_parameters_by_their_one_name() -> None:
    net = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "head": nn.Linear(3, 5)})
    net["head"].weight = net["embedding"].weight
    assert list(hooked_layers(net).values()) == [
        {"weight": "embedding.weight"},
        {"weight": "embedding.weight", "bias": "head.bias"},
    ]


def test_hooked_layers_leaves_out_what_is_frozen_or_without_rule() -> None:
    net = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.LSTM(2, 2), nn.Linear(2, 2, bias=False))
    assert list(hooked_layers(net).values()) == [{"weight": "2.weight"}]


def test_outputs_of_one_forward_pass_have_their_gradients_apart() -> None:
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double(), torch.randn(5, 3).double()
    names = [name for name, _ in module.named_parameters()]
    gradients = HookedGradients(module, names, direct=())
    assert gradients.shares
    found: list[dict[str, Tensor]] = [{}, {}]

    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}

    def sink_of(own: dict[str, Tensor]) -> Any:
        return lambda layer: own.update({name: materialise(g, shapes[name]) for name, g in layer.items()})

    outputs = gradients.several(lambda: list(module(x).unbind(1)), 5, [sink_of(own) for own in found])
    for number, own in enumerate(found):
        torch.testing.assert_close(outputs[number], module(x)[:, number].detach())
        for i in range(5):
            expected = torch.autograd.grad(module(x)[i, number], list(module.parameters()))
            for name, gradient in zip(names, expected, strict=True):
                torch.testing.assert_close(own[name][i], gradient)
