"""``vmap(grad)`` and the loop against plain autograd."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_attr.gradients import loop_gradients, vmap_gradients

B = 5
PER_SAMPLE = [vmap_gradients, loop_gradients]


def _output(params: Mapping[str, Tensor], batch: Mapping[str, Any]) -> Tensor:
    hidden = (batch["x"] @ params["w"]).tanh() * batch["scale"]
    return (hidden * batch["nested"][0]).sum(1) + params["b"]


def _inputs() -> tuple[dict[str, Tensor], dict[str, Any]]:
    params = {"w": torch.randn(3, 2).double(), "b": torch.zeros(()).double(), "unused": torch.ones(4).double()}
    batch = {
        "x": torch.randn(B, 3).double(),
        "scale": torch.tensor([2.0, 3.0]).double(),  # shared by the samples
        "nested": [torch.randn(B, 2).double(), "text"],
    }
    return params, batch


@pytest.mark.parametrize("per_sample", PER_SAMPLE)
def test_matches_autograd(per_sample: Callable[..., dict[str, Tensor]]) -> None:
    params, batch = _inputs()
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    output = _output(leaves, batch)
    found = per_sample(_output, params, batch, B)
    assert list(found) == list(params)
    for i in range(B):
        expected = torch.autograd.grad(output[i], list(leaves.values()), retain_graph=True, materialize_grads=True)
        for (name, rows), row in zip(found.items(), expected, strict=True):
            assert rows.shape == (B, *params[name].shape)
            torch.testing.assert_close(rows[i], row, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("per_sample", PER_SAMPLE)
def test_leaves_no_graph_and_no_grad(per_sample: Callable[..., dict[str, Tensor]]) -> None:
    params, batch = _inputs()
    params = {name: p.requires_grad_() for name, p in params.items()}
    batch["x"].requires_grad_()
    with torch.no_grad():  # the caller's mode does not matter
        found = per_sample(_output, params, batch, B)
    assert all(not rows.requires_grad for rows in found.values())
    assert all(p.grad is None and p.requires_grad for p in params.values())
    assert batch["x"].grad is None


@pytest.mark.parametrize("per_sample", PER_SAMPLE)
def test_an_output_without_parameters_has_zero_gradients(per_sample: Callable[..., dict[str, Tensor]]) -> None:
    found = per_sample(lambda params, x: x.sum(1), {"w": torch.ones(2)}, torch.randn(B, 3), B)
    assert torch.equal(found["w"], torch.zeros(B, 2))


@pytest.mark.parametrize("chunk_size", [1, 2, B, 100])
def test_chunks_change_nothing(chunk_size: int) -> None:
    params, batch = _inputs()
    whole, chunked = (vmap_gradients(_output, params, batch, B, chunk_size=size) for size in (None, chunk_size))
    for name in params:
        torch.testing.assert_close(chunked[name], whole[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("per_sample", PER_SAMPLE)
def test_one_sample(per_sample: Callable[..., dict[str, Tensor]]) -> None:
    params, batch = _inputs()
    one = {"x": batch["x"][:1], "scale": batch["scale"], "nested": [batch["nested"][0][:1], "text"]}
    found, rows = per_sample(_output, params, one, 1), per_sample(_output, params, batch, B)
    torch.testing.assert_close(found["w"], rows["w"][:1], rtol=1e-12, atol=1e-12)
