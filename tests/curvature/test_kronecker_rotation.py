"""Squares of rotated gradients: every way of computing them agrees, whatever the chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_attr.curvature import kronecker_rotation
from lightning_attr.curvature.kronecker_layout import KroneckerBlock
from lightning_attr.curvature.kronecker_rotation import BatchUses, SquaredGradients, chunks, rotated, squared_gradients
from lightning_attr.gradients import ConvSum, OuterSum, RowSum

BLOCK = KroneckerBlock("w", None, (3, 4))


def bases() -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.linalg.qr(torch.randn(1, size, size, dtype=torch.float64)).Q for size in (3, 4))  # type: ignore[return-value]


@pytest.mark.parametrize("positions", [[1], [2], [50], [1, 1], [3, 5]])
@pytest.mark.parametrize("chunk", [1, 100, 1 << 20])
def test_squares(positions: list[int], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kronecker_rotation, "CHUNK", chunk)
    kinds = {"dtype": torch.float64}
    uses = [OuterSum(torch.randn(5, s, 3, **kinds), torch.randn(5, s, 4, **kinds)) for s in positions]
    rows_basis, columns_basis = bases()
    expected = (rows_basis[0].T @ sum(use.materialise() for use in uses) @ columns_basis[0]).square()
    weights = torch.rand(1, 3, 4, **kinds)
    seen = []
    summed = torch.zeros(1, 3, 4, **kinds)
    for samples, squares in squared_gradients(BLOCK, uses, rows_basis, columns_basis):
        seen += list(range(5)[samples])
        summed += squares.summed()
        assert torch.allclose(squares.weighted(weights), (expected[samples] * weights).sum((1, 2)), rtol=1e-12)
    assert seen == list(range(5))
    assert torch.allclose(summed[0], expected.sum(0), rtol=1e-12)


@pytest.mark.parametrize("positions", [[1], [2], [50], [3, 5]])
@pytest.mark.parametrize("chunk", [1, 300, 1 << 20])
@pytest.mark.parametrize("conv", [False, True])
def test_squares_of_several_labels(positions: list[int], chunk: int, conv: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(kronecker_rotation, "CHUNK", chunk)
    kinds = {"dtype": torch.float64}

    def use(s: int) -> Any:
        if conv:
            activations = torch.randn(5, 2, s + 1, **kinds).repeat(2, 1, 1)
            return ConvSum(activations, torch.randn(10, 3, s, **kinds), (2,), (1,), (1,), 1)
        return OuterSum(torch.randn(10, s, 3, **kinds), torch.randn(5, s, 4, **kinds).repeat(2, 1, 1))

    uses = [use(s) for s in positions]
    rows_basis, columns_basis = bases()
    gradients = sum(use.materialise().reshape(10, 3, 4) for use in uses)
    expected = (rows_basis[0].T @ gradients @ columns_basis[0]).square().view(2, 5, 3, 4).sum(0)
    weights, found = torch.rand(1, 3, 4, **kinds), []
    block = KroneckerBlock("w", None, (3, 2, 2)) if conv else BLOCK
    summed = torch.zeros(1, 3, 4, **kinds)
    for _, squares in squared_gradients(block, uses, rows_basis, columns_basis, labels=2):
        found.append(squares.weighted(weights))
        summed += squares.summed()
    assert torch.allclose(torch.cat(found), (expected * weights).sum((1, 2)), rtol=1e-12)
    assert torch.allclose(summed[0], expected.sum(0), rtol=1e-12)


def test_single_positions_are_never_formed() -> None:
    uses = [OuterSum(torch.randn(5, 1, 3).double(), torch.randn(5, 1, 4).double())]
    ((_, squares),) = squared_gradients(BLOCK, uses, *bases())
    assert squares.formed is None


def test_formed_and_factored_squares_agree() -> None:
    rows, columns, weights = torch.rand(5, 2, 3), torch.rand(5, 2, 4), torch.rand(2, 3, 4)
    factored = SquaredGradients(rows=rows, columns=columns)
    formed = SquaredGradients(rows.unsqueeze(3) * columns.unsqueeze(2))
    assert torch.allclose(factored.summed(), formed.summed())
    assert torch.allclose(factored.weighted(weights), formed.weighted(weights))


def test_uses_are_handed_over_once() -> None:
    weight = OuterSum(torch.ones(2, 1, 3), torch.ones(2, 1, 4))
    uses = BatchUses({"w": BLOCK})
    uses({"w": weight, "b": RowSum(weight)})
    uses({"other": torch.ones(2, 1)})
    uses({"w": weight})
    assert list(uses) == [(BLOCK, [weight, weight])]
    assert list(uses) == []


def test_chunks_count_every_use_and_at_least_one_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kronecker_rotation, "CHUNK", 100)
    use = OuterSum(torch.ones(4, 7, 3), torch.ones(4, 7, 4))  # 49 numbers per sample
    assert [part.stop for part in chunks(BLOCK, [use])] == [2, 4]
    assert [part.stop for part in chunks(BLOCK, [use, use])] == [1, 2, 3, 4]
    assert [part.stop for part in chunks(BLOCK, [use], beside=1000)] == [1, 2, 3, 4]
    conv = ConvSum(torch.ones(3, 1, 8), torch.ones(3, 1, 7), (2,), (1,), (1,), 1)  # 7 positions of 1 + 2
    assert [part.stop for part in chunks(KroneckerBlock("w", None, (1, 1, 2)), [conv], beside=29)] == [2, 3]


@pytest.mark.parametrize(("b", "g", "s"), [(4, 1, 3), (4, 3, 2), (1, 2, 1), (0, 1, 2)])
def test_rotated_is_the_product_of_each_sample(b: int, g: int, s: int) -> None:
    factors, basis = torch.randn(b, g, s, 5).double(), torch.randn(g, 5, 4).double()
    torch.testing.assert_close(rotated(factors, basis), factors @ basis)
