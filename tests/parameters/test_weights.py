"""Weights and buffers: tied, shared, outside the state dict; refused where they do not fit; put back."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from lightning_attr.errors import StoreMismatchError
from lightning_attr.files.io import read_tensors, write_tensors
from lightning_attr.parameters.weights import load_weights, loaded, weights_of


class Tied(nn.Module):
    """Tied weights, a frozen parameter, buffers of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Parameter(torch.randn(2), requires_grad=False)
        self.register_buffer("cache", torch.randn(3, dtype=torch.float64), persistent=False)
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("nothing", None)
        self.other = nn.Module()
        self.other.register_buffer("shared", self.cache)


def copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in weights_of(module).items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_everything_that_decides_the_output_is_listed_once() -> None:
    assert list(weights_of(Tied())) == [
        "frozen",
        "embedding.weight",
        "norm.weight",
        "norm.bias",
        "cache",
        "mask",
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    ]


def test_weights_are_the_tensors_themselves_without_a_graph() -> None:
    module = Tied()
    weights = weights_of(module)
    assert weights["embedding.weight"].data_ptr() == module.head.weight.data_ptr()
    assert not any(tensor.requires_grad for tensor in weights.values())


def test_round_trip_through_a_file_that_safetensors_alone_can_read(tmp_path: Path) -> None:
    module, other = Tied(), Tied()
    write_tensors(tmp_path / "weights.safetensors", weights_of(module))
    assert_equal(safetensors.torch.load_file(tmp_path / "weights.safetensors"), copies(module))
    load_weights(other, read_tensors(tmp_path / "weights.safetensors"))
    assert_equal(copies(other), copies(module))
    assert other.head.weight is other.embedding.weight
    assert other.other.shared is other.cache


def test_loading_copies_in_place_and_keeps_flags() -> None:
    module, other = Tied(), Tied()
    tensors = list(other.parameters())
    load_weights(other, weights_of(module))
    assert all(before is after for before, after in zip(tensors, other.parameters(), strict=True))
    assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in module.parameters()]
    assert all(p.grad_fn is None for p in other.parameters())
    with torch.no_grad():
        module.frozen.zero_()
    assert not torch.equal(other.frozen, module.frozen)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("norm.running_var"), "does not fit Tied: norm.running_var differ in presence or shape"),
        (lambda w: w.update(extra=torch.ones(1)), "does not fit Tied: extra differ"),
        (lambda w: w.update(frozen=torch.ones(3)), "does not fit Tied: frozen differ.*Pass the model that was trained"),
        (lambda w: w.clear(), "cache, embedding.weight, frozen, mask and more differ"),
    ],
)
def test_weights_of_another_layout_are_refused_and_the_module_is_unchanged(change: object, message: str) -> None:
    module = Tied()
    before, weights = copies(module), copies(Tied())
    change(weights)
    with pytest.raises(StoreMismatchError, match=message):
        load_weights(module, weights)
    assert_equal(copies(module), before)


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_loaded_puts_everything_back(error: type[BaseException] | None) -> None:
    module = Tied()
    before = copies(module)

    def use() -> None:
        with loaded(module):
            load_weights(module, weights_of(Tied()))
            module.norm.train()
            module.norm(torch.randn(5, 3))
            if error is not None:
                raise error("in the middle")

    if error is None:
        use()
    else:
        with pytest.raises(error, match="in the middle"):
            use()
    assert_equal(copies(module), before)
