"""Parameters divided by `fully_shard`: whole inside, as one process has them, and untouched afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from sharded_cases import GPT, ON_CPUS, CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lightning_attr.errors import AttributionError
from lightning_attr.gradients import hooked_gradients, materialise
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.parameters.weights import load_weights, weights_of
from lightning_attr.parameters.whole import check_division, divided_parameters, whole_parameters

pytestmark = ON_CPUS


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """A mesh of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


def divided(mesh: DeviceMesh, **settings: Any) -> GPT:
    torch.manual_seed(0)
    network = GPT()
    for block in network.blocks:
        fully_shard(block, mesh=mesh, **settings)
    return fully_shard(network, mesh=mesh, **settings)


IDS = torch.arange(12).reshape(2, 6) % 11


def state_of(network: nn.Module) -> list[Any]:
    """All that has to be the same afterwards, by identity."""
    found: list[Any] = []
    for layer in network.modules():
        found += [type(layer), *layer._parameters.values(), *layer._forward_hooks.values()]
        found += layer._forward_pre_hooks.values()
    return found


@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("policy", [MixedPrecisionPolicy(), MixedPrecisionPolicy(param_dtype=torch.bfloat16)])
def test_inside_it_is_the_module_of_one_process(mesh: DeviceMesh, reshard: bool, policy: MixedPrecisionPolicy) -> None:
    torch.manual_seed(0)
    plain = GPT()
    network = divided(mesh, reshard_after_forward=reshard, mp_policy=policy)
    with torch.no_grad():
        network(IDS)  # without a backward pass: parameters that are not resharded stay gathered
    assert any(not isinstance(p, DTensor) for p in network.parameters()) != reshard
    before = state_of(network)
    with whole_parameters(network), whole_parameters(network):
        assert not divided_parameters(network)
        assert [type(layer) for layer in network.modules()] == [type(layer) for layer in plain.modules()]
        assert network.head.weight is network.tokens.weight
        assert ParameterLayout.of(network) == ParameterLayout.of(plain)
        assert all(map(torch.equal, weights_of(network).values(), weights_of(plain).values()))
        assert torch.equal(network(IDS), plain(IDS))
        network(IDS).sum().backward()
        assert all(p.grad is not None for p in network.parameters())
    after = state_of(network)
    assert len(after) == len(before)
    assert all(one is other for one, other in zip(before, after, strict=True))
    assert all(p.grad is None for p in network.parameters())


def test_what_is_written_inside_is_gone_afterwards(mesh: DeviceMesh) -> None:
    network = divided(mesh)
    before, expected = state_of(network), network(IDS)
    with suppress(KeyError), whole_parameters(network):
        load_weights(network, {name: torch.zeros_like(values) for name, values in weights_of(network).items()})
        network.requires_grad_(False)
        assert not network(IDS).any()
        raise KeyError
    assert all(one is other for one, other in zip(before, state_of(network), strict=True))
    assert all(p.requires_grad for p in network.parameters())
    assert torch.equal(network(IDS), expected)


def test_hooks_and_frozen_parameters_are_kept(mesh: DeviceMesh) -> None:
    network, seen = divided(mesh), []
    network.blocks[0].qkv.requires_grad_(False)
    network.blocks[1].register_forward_hook(lambda *_: seen.append("own"))
    with whole_parameters(network):
        assert not network.blocks[0].qkv.weight.requires_grad
        network.blocks[1].register_forward_hook(lambda *_: seen.append("added"))
        network(IDS)
    assert seen == ["own", "added"]
    network(IDS).sum().backward()
    assert seen == ["own", "added"] * 2
    assert network.blocks[0].up.weight.grad is not None


def test_gradients_of_training_stay(mesh: DeviceMesh) -> None:
    network = divided(mesh)
    network(IDS).sum().backward()
    gradients = [p.grad for p in network.parameters()]
    assert all(isinstance(gradient, DTensor) for gradient in gradients)
    with whole_parameters(network):
        found: dict[str, torch.Tensor] = {}

        def add(name: str, gradient: Any) -> None:
            found[name] = found.get(name, 0) + materialise(gradient, tuple(network.get_parameter(name).shape))

        names = [name for name, _ in network.named_parameters()]
        hooked_gradients(network, lambda: network(IDS).sum((1, 2)), 2, names, add)
        assert found.keys() == set(names)
    for p, gradient in zip(network.parameters(), gradients, strict=True):
        assert p.grad is gradient
    for name, p in network.named_parameters():
        torch.testing.assert_close(found[name].sum(0), p.grad.full_tensor(), rtol=1e-5, atol=1e-6)


def test_shares_that_wait_elsewhere_are_gathered(mesh: DeviceMesh) -> None:
    network = divided(mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
    torch.manual_seed(0)
    plain = GPT()
    with whole_parameters(network):
        assert torch.equal(network(IDS), plain(IDS))


def test_a_module_that_is_not_divided_is_left_alone() -> None:
    network = GPT()
    before = state_of(network)
    with whole_parameters(network):
        assert all(one is other for one, other in zip(before, state_of(network), strict=True))
    check_division(network)
    assert divided_parameters(network) == {}


def test_other_divisions_are_refused(mesh: DeviceMesh) -> None:
    check_division(divided(mesh))
    by_hand = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    by_hand[1].weight = nn.Parameter(distribute_tensor(torch.ones(2, 2), mesh, [Shard(0)]))
    with pytest.raises(AttributionError, match=r"`1\.weight` of shape \(2, 2\) is a DTensor of another kind"):
        check_division(by_hand)
    fully_shard(by_hand[0], mesh=mesh)
    with pytest.raises(AttributionError, match=r"parameters of Sequential to be whole, or divided by `fully_shard`"):
        check_division(by_hand)
    squared = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    twice = nn.Linear(2, 2)
    twice.weight = nn.Parameter(distribute_tensor(torch.ones(2, 2), squared["tensor_parallel"], [Shard(0)]))
    twice.bias = nn.Parameter(distribute_tensor(torch.ones(2), squared["tensor_parallel"], [Replicate()]))
    fully_shard(twice, mesh=squared["data_parallel"])
    with pytest.raises(AttributionError, match=r"`weight` of shape .*: with tensor parallelism no process has"):
        check_division(twice)
