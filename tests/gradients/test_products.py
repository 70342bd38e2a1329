"""The order of the products that project a gradient from both sides."""

from __future__ import annotations

import pytest
import torch

from lightning_attr.gradients import OuterSum
from lightning_attr.gradients.products import materialising_is_cheaper, two_sided


@pytest.mark.parametrize("columns", [1, 5])
@pytest.mark.parametrize("k_rows", [None, 2])
@pytest.mark.parametrize("k_columns", [None, 3])
def test_two_sided(columns: int, k_rows: int | None, k_columns: int | None) -> None:
    gradient = torch.randn(3, 4, columns).double()
    left = None if k_rows is None else torch.randn(k_rows, 4).double()
    right = None if k_columns is None else torch.randn(k_columns, columns).double()
    rows = torch.eye(4).double() if left is None else left
    ends = torch.eye(columns).double() if right is None else right
    expected = torch.einsum("kr,brc,lc->bkl", rows, gradient, ends)
    torch.testing.assert_close(two_sided(gradient, left, right), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("positions", "rows", "columns", "k_rows", "k_columns"),
    [
        (1, 64, 64, 8, 8),
        (1024, 64, 27, 20, None),
        (1024, 64, 64, 48, 48),
        (400, 128, 128, 64, 64),
        (300, 9, 90, None, 8),
    ],
)
def test_cheaper_way_is_found_by_counting_multiplications(
    positions: int, rows: int, columns: int, k_rows: int | None, k_columns: int | None
) -> None:
    def times(a: tuple[int, int], b: tuple[int, int]) -> tuple[tuple[int, int], int]:
        assert a[1] == b[0]
        return (a[0], b[1]), a[0] * a[1] * b[1]

    u, v = (rows, positions), (positions, columns)
    gradient, formed = times(u, v)
    factored = 0
    if k_columns is not None:
        v, cost = times(v, (columns, k_columns))
        factored += cost
        gradient, cost = times(gradient, (columns, k_columns))
        formed += cost
    if k_rows is not None:
        u, cost = times((k_rows, rows), u)
        factored += cost
        gradient, cost = times((k_rows, rows), gradient)
        formed += cost
    factored += times(u, v)[1]
    left = None if k_rows is None else torch.ones(k_rows, rows)
    right = None if k_columns is None else torch.ones(k_columns, columns)
    assert materialising_is_cheaper(positions, rows, columns, left, right) == (formed < factored)
    outer = OuterSum(torch.ones(1, positions, rows), torch.ones(1, positions, columns))
    assert outer.materialises(left, right) == (formed < factored)
