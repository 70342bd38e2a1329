"""Factored gradients: projecting the factors equals projecting the gradient that they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_attr.gradients import ConvSum, FactoredGradient, GatherSum, OuterSum, RowSum, materialise

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


def _conv(
    dims: int, groups: int, stride: int, dilation: int, padding: int = 0, kernel: int = 2
) -> tuple[FactoredGradient, Tensor]:
    size, c_in, c_out = 7, 4, 8
    x = torch.randn(B, c_in, *[size] * dims).double()
    weight = torch.zeros(c_out, c_in // groups, *[kernel] * dims).double().requires_grad_()
    convolve = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)[dims - 1]
    out = convolve(x, weight, None, stride, padding, dilation, groups)
    delta = torch.randn_like(out)
    rows = [torch.autograd.grad(out[i], weight, delta[i], retain_graph=True)[0].flatten(1) for i in range(B)]
    factored = ConvSum(x, delta, (kernel,) * dims, (stride,) * dims, (dilation,) * dims, groups, (padding,) * dims)
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
    "conv2d, padding": lambda: _conv(2, groups=1, stride=2, dilation=2, padding=1),
    "conv2d, groups, padding": lambda: _conv(2, groups=2, stride=1, dilation=1, padding=1),
    "conv2d of one pixel": lambda: _conv(2, groups=1, stride=1, dilation=1, kernel=1),
    "conv2d of one pixel, stride": lambda: _conv(2, groups=1, stride=2, dilation=1, kernel=1),
    "conv2d of one pixel, padding": lambda: _conv(2, groups=1, stride=1, dilation=1, padding=1, kernel=1),
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


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("left", "right"), [(None, None), (None, 3), (2, None), (2, 3)])
def test_accumulate_adds_or_overwrites_what_the_target_has_room_for(
    case: str, left: int | None, right: int | None
) -> None:
    factored, dense = CASES[case]()
    sides = [
        None if k is None else torch.randn(k, size).double()
        for k, size in zip((left, right), dense.shape[1:], strict=True)
    ]
    wide = [None if side is None else torch.nn.functional.pad(side, (0, 0, 0, 2)) for side in sides]
    expected = factored.project(*sides)
    target = torch.full((B, 9, 40), torch.nan).double()[:, : expected.shape[1], : expected.shape[2]]  # strided
    factored.accumulate(target, *wide, None, fresh=True)
    torch.testing.assert_close(target, expected, rtol=1e-12, atol=1e-12)
    factored.accumulate(target, *wide, None, fresh=False)
    torch.testing.assert_close(target, 2 * expected, rtol=1e-12, atol=1e-12)


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


@pytest.mark.parametrize("case", ["outer, one position", "outer, several positions", "conv1d, groups", "conv2d"])
@pytest.mark.parametrize("sizes", [(2, 3), (None, 3), (3, 4)])
def test_bias_as_last_column_equals_weight_and_bias_apart(case: str, sizes: tuple[int | None, int]) -> None:
    weight, dense = CASES[case]()
    assert isinstance(weight, OuterSum | ConvSum)
    bias = RowSum(weight).materialise()  # (b, rows, 1)
    rows, columns = dense.shape[1:]
    left = None if sizes[0] is None else torch.randn(sizes[0], rows).double()
    right, shift = torch.randn(sizes[1], columns).double(), torch.randn(sizes[1]).double()
    target = torch.ones(B, rows if left is None else len(left), len(right)).double()
    weight.accumulate(target, left, right, shift, fresh=False)
    augmented, full = torch.cat([dense, bias], dim=2), torch.cat([right, shift[:, None]], dim=1)
    expected = augmented @ full.T
    torch.testing.assert_close(target - 1, expected if left is None else left @ expected, rtol=1e-12, atol=1e-12)


def test_row_sum_is_the_gradient_of_the_bias() -> None:
    rows, columns = torch.randn(B, 6, 4).double(), torch.randn(B, 6, 5).double()
    bias = RowSum(OuterSum(rows, columns))
    torch.testing.assert_close(materialise(bias, (4,)), rows.sum(1))
    left, right = torch.randn(2, 4).double(), torch.randn(3, 1).double()
    torch.testing.assert_close(bias.project(left, right), left @ rows.sum(1)[:, :, None] @ right.T)


def test_both_ways_are_taken_and_agree() -> None:
    rows, columns = torch.randn(B, 200, 8).double(), torch.randn(B, 200, 8).double()
    image, delta = torch.randn(B, 4, 12, 12).double(), torch.randn(B, 8, 11, 11).double()
    conv = ConvSum(image, delta, (2, 2), (1, 1), (1, 1), 1)
    for factored in (OuterSum(rows, columns), conv):
        dense = factored.materialise()
        for k in (1, 7):
            left, right = torch.randn(k, 8).double(), torch.randn(k, dense.shape[2]).double()
            assert factored.materialises(left, right) == (k == 7)
            torch.testing.assert_close(factored.project(left, right), left @ dense @ right.T)
