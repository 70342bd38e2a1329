"""Factored gradients: projecting the factors equals projecting the gradient that they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_attr.gradients import ConvSum, FactoredGradient, GatherSum, OuterSum, materialise

B = 3


def _outer(positions: int) -> tuple[FactoredGradient, Tensor]:
    rows, columns = torch.randn(B, positions, 4).double(), torch.randn(B, positions, 5).double()
    return OuterSum(rows, columns), torch.einsum("bsr,bsc->brc", rows, columns)


def _gather() -> tuple[FactoredGradient, Tensor]:
    ids, columns = torch.tensor([[0, 1, 1], [5, 5, 5], [2, 0, 4]]), torch.randn(B, 3, 5).double()
    dense = torch.zeros(B, 6, 5).double()
    for i in range(B):
        for s in range(3):
            dense[i, ids[i, s]] += columns[i, s]
    return GatherSum(ids, columns, num_rows=6), dense


def _conv(dims: int, groups: int, stride: int, dilation: int) -> tuple[FactoredGradient, Tensor]:
    size, kernel, c_in, c_out = 7, 2, 4, 8
    x = torch.randn(B, c_in, *[size] * dims).double()
    weight = torch.zeros(c_out, c_in // groups, *[kernel] * dims).double().requires_grad_()
    convolve = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)[dims - 1]
    out = convolve(x, weight, stride=stride, dilation=dilation, groups=groups)
    delta = torch.randn_like(out)
    rows = [torch.autograd.grad(out[i], weight, delta[i], retain_graph=True)[0].flatten(1) for i in range(B)]
    factored = ConvSum(x, delta, (kernel,) * dims, (stride,) * dims, (dilation,) * dims, groups)
    return factored, torch.stack(rows)


CASES = {
    "outer, one position": lambda: _outer(1),
    "outer, several positions": lambda: _outer(6),
    "gather": _gather,
    "conv1d": lambda: _conv(1, groups=1, stride=1, dilation=1),
    "conv1d, groups": lambda: _conv(1, groups=2, stride=2, dilation=3),
    "conv2d": lambda: _conv(2, groups=1, stride=2, dilation=1),
    "conv2d, groups": lambda: _conv(2, groups=2, stride=2, dilation=2),
    "conv2d, depthwise": lambda: _conv(2, groups=4, stride=1, dilation=1),
    "conv3d, groups": lambda: _conv(3, groups=2, stride=2, dilation=2),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("left", [None, 2])
@pytest.mark.parametrize("right", [None, 3])
def test_project_equals_projecting_the_gradient(case: str, left: int | None, right: int | None) -> None:
    factored, dense = CASES[case]()
    p = None if left is None else torch.randn(left, dense.shape[1]).double()
    q = None if right is None else torch.randn(right, dense.shape[2]).double()
    expected = dense if p is None else p @ dense
    expected = expected if q is None else expected @ q.T
    torch.testing.assert_close(factored.project(p, q), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(factored.materialise(), dense, rtol=1e-12, atol=1e-12)


def test_project_leaves_the_factors_alone() -> None:
    factored, dense = _gather()
    for _ in range(2):
        torch.testing.assert_close(factored.materialise(), dense)


def test_materialise_takes_the_shape_of_the_parameter() -> None:
    factored, dense = _conv(2, groups=1, stride=1, dilation=1)
    shape = (8, 4, 2, 2)
    torch.testing.assert_close(materialise(factored, shape), dense.reshape(B, *shape))
    torch.testing.assert_close(materialise(dense, shape), dense.reshape(B, *shape))
    assert materialise(torch.ones(B, 1), ()).shape == (B,)
