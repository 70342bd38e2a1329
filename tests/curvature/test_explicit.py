from __future__ import annotations

import logging

import pytest
import torch

from lightning_attr.curvature.explicit import factor

DOUBLE = torch.float64


def symmetric(eigenvalues: torch.Tensor, seed: int = 0) -> torch.Tensor:
    size = len(eigenvalues)
    q = torch.linalg.qr(torch.randn(size, size, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed)))[0]
    return q * eigenvalues.double() @ q.T


@pytest.mark.parametrize("damping", [0.0, 0.7])
@pytest.mark.parametrize("lowest", [0.1, -3.3])
def test_solves_like_the_inverse(damping: float, lowest: float) -> None:
    matrix, rows = symmetric(torch.linspace(lowest, 4, 30)), torch.randn(5, 30, dtype=DOUBLE)
    expected = rows @ torch.linalg.inv(matrix + damping * torch.eye(30, dtype=DOUBLE))
    torch.testing.assert_close(factor(matrix, damping).solve(rows), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("negative", [0, 1, 7, 12, 30])
def test_negative_eigenvalues_are_counted_and_logged(negative: int, caplog: pytest.LogCaptureFixture) -> None:
    for seed in range(5):
        values = torch.linspace(0.5, 4, 30)
        values[:negative] *= -1
        with caplog.at_level(logging.WARNING):
            assert factor(symmetric(values, seed)).negative_eigenvalues == negative
    assert (f"{negative} of 30 eigenvalues" in caplog.text) == (negative > 0)


def test_damping_counts_before_signs_do() -> None:
    assert factor(torch.diag(torch.tensor([-1.0, 2.0])), damping=1.5).negative_eigenvalues == 0


def test_what_is_not_symmetric_is_symmetrised() -> None:
    rows = torch.ones(1, 2)
    upper = factor(torch.tensor([[2.0, 1.0], [0.0, 2.0]])).solve(rows)
    torch.testing.assert_close(upper, factor(torch.tensor([[2.0, 0.5], [0.5, 2.0]])).solve(rows))


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
@pytest.mark.parametrize("definite", [False, True])
@pytest.mark.parametrize("rank", [0, 1, 20, 39])
def test_singular_curvature_is_refused_and_damping_cures_it(dtype: torch.dtype, definite: bool, rank: int) -> None:
    half = torch.randn(rank, 40, dtype=dtype, generator=torch.Generator().manual_seed(rank))
    matrix = half.T @ half / 20
    with pytest.raises(ValueError, match=r"curvature of 40 parameters is singular with `damping=0.0`. Raise the damp"):
        factor(matrix, definite=definite)
    assert factor(matrix, 0.01, definite=definite).solve(torch.ones(1, 40, dtype=dtype)).isfinite().all()


def test_null_directions_of_a_softmax_layer() -> None:
    """The same vector added to all class weights changes nothing."""
    x, p = torch.randn(20, 3, dtype=DOUBLE), torch.randn(20, 4, dtype=DOUBLE).softmax(1)
    blocks = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    hessian = torch.einsum("nab,ni,nj->aibj", blocks, x, x).reshape(12, 12) / 20
    with pytest.raises(ValueError, match="singular"):
        factor(hessian)


def test_a_definite_curvature_is_not_indefinite() -> None:
    with pytest.raises(ValueError, match=r"singular with `damping=0.1`"):
        factor(torch.diag(torch.tensor([1.0, -1.0])), 0.1, definite=True)


@pytest.mark.parametrize(
    ("matrix", "damping", "message"),
    [
        (torch.eye(2), -0.1, "`damping` to be a number >= 0, but got -0.1"),
        (torch.eye(2), float("nan"), "`damping` to be a number >= 0, but got nan"),
        (torch.ones(2, 3), 0.0, r"`matrix` to be square, but got shape \(2, 3\)"),
        (torch.full((2, 2), float("nan")), 0.0, "a finite curvature"),
    ],
)
def test_bad_arguments(matrix: torch.Tensor, damping: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        factor(matrix, damping)
    with pytest.raises(ValueError, match="floating-point matrix"):
        factor(torch.eye(2)).solve(torch.ones(2))


@pytest.mark.parametrize("lowest", [0.1, -3.3])
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
def test_forms_are_products_with_the_solutions(lowest: float, dtype: torch.dtype) -> None:
    factors, rows = factor(symmetric(torch.linspace(lowest, 4, 30)), 0.1), torch.randn(5, 30, dtype=dtype)
    expected = (rows * factors.solve(rows)).sum(1)
    assert factors.form(rows).dtype == dtype
    torch.testing.assert_close(factors.form(rows), expected, rtol=1e-3 if dtype is torch.float32 else 1e-9, atol=1e-4)
