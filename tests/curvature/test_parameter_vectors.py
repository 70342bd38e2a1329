from __future__ import annotations

import pytest
import torch

from lightning_attr.curvature.parameter_vectors import RowSpace, applied, checked_rows, row_dots

POINT = {"w": torch.zeros(2, 3), "b": torch.zeros(()), "c": torch.zeros(4)}


@pytest.mark.parametrize("count", [None, 1, 3])
def test_rows_and_structure_are_inverse(count: int | None) -> None:
    space = RowSpace(POINT)
    lead = () if count is None else (count,)
    vectors = {name: torch.randn((*lead, *tensor.shape)) for name, tensor in POINT.items()}
    rows, many = space.rows(vectors)
    assert rows.shape == (count or 1, 11)
    assert many is (count is not None)
    assert torch.equal(rows[:, 6], vectors["b"].reshape(-1))
    back = space.structure(rows, many)
    assert back.keys() == vectors.keys()
    assert all(torch.equal(back[name], vectors[name]) for name in vectors)


def test_entries_of_a_dict_are_taken_by_name() -> None:
    space = RowSpace({"a": torch.zeros(1), "b": torch.zeros(1)})
    rows, _ = space.rows({"b": torch.ones(1), "a": torch.zeros(1)})
    assert rows.tolist() == [[0.0, 1.0]]


def test_a_tensor_of_any_shape() -> None:
    space = RowSpace(torch.zeros(2, 2))
    rows, many = space.rows(torch.arange(12.0).reshape(3, 2, 2))
    assert many
    assert torch.equal(rows, torch.arange(12.0).reshape(3, 4))
    assert space.structure(rows[:1], many=False).shape == (2, 2)


@pytest.mark.parametrize(
    ("point", "vectors", "kind", "message"),
    [
        (torch.zeros(2), {"w": torch.zeros(2)}, TypeError, "`v` to be a tensor, like the point, but got a dict"),
        (POINT, torch.zeros(11), TypeError, "`v` to be a dict of tensors, like the point, but got a tensor"),
        ({"a": torch.zeros(1)}, {"b": torch.zeros(1)}, ValueError, r"entries of the point, \['a'\], but got \['b'\]"),
        (torch.zeros(2), torch.zeros(3), ValueError, r"the shape of the point, \(2,\), .* but got \(3,\)"),
        (torch.zeros(2), torch.zeros(1, 1, 2), ValueError, r"the shape of the point, \(2,\), .* but got \(1, 1, 2\)"),
        (
            {"a": torch.zeros(1), "b": torch.zeros(1)},
            {"a": torch.zeros(2, 1), "b": torch.zeros(3, 1)},
            ValueError,
            r"the same in every entry\), but got \(3, 1\) for 'b'",
        ),
    ],
)
def test_vectors_that_do_not_fit(point: object, vectors: object, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        RowSpace(point).rows(vectors)


@pytest.mark.parametrize("point", [torch.zeros(2, dtype=torch.int64), torch.zeros(0), {}])
def test_points_that_have_no_gradient(point: object) -> None:
    with pytest.raises(ValueError, match="a floating-point tensor or a dict of them, with at least one entry, but got"):
        RowSpace(point)


def test_dots_are_exact_where_float32_is_not() -> None:
    row = torch.tensor([[1e4, 1.0, -1e4]])
    assert row_dots(row, torch.tensor([[1e4, 1.0, 1e4]])).tolist() == [1.0]


def test_products_are_looked_at() -> None:
    with pytest.raises(ValueError, match=r"map rows of shape \(1, 2\) to that shape, but got \(2,\)"):
        applied(lambda rows: rows[0], torch.ones(1, 2))
    with pytest.raises(ValueError, match="product with the curvature to be finite"):
        applied(lambda rows: rows / 0, torch.ones(1, 2))
    assert applied(torch.Tensor.double, torch.ones(1, 2)).dtype == torch.float32


def test_right_hand_sides_are_looked_at() -> None:
    with pytest.raises(ValueError, match="`rhs` to be a floating-point matrix"):
        checked_rows(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"the rows \[1\] hold NaN"):
        checked_rows(torch.tensor([[1.0], [float("nan")]]))
