from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_attr.curvature.explicit import factor
from lightning_attr.curvature.lanczos import lanczos, largest_eigenvalue, spectral_inverse
from lightning_attr.errors import NegativeCurvatureError

DOUBLE = torch.float64


def matrix_of(eigenvalues: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    size = len(eigenvalues)
    q = torch.linalg.qr(torch.randn(size, size, dtype=DOUBLE, generator=generator))[0]
    matrix = q * eigenvalues @ q.T
    return (matrix + matrix.T) / 2


def start(size: int) -> Tensor:
    return torch.randn(size, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))


SPECTRA = {
    "positive": torch.linspace(0.5, 9, 40, dtype=DOUBLE),
    "both signs": torch.linspace(-3, 8, 40, dtype=DOUBLE),
    "wide": torch.logspace(-8, 2, 40, dtype=DOUBLE),
    "low rank": torch.cat([torch.zeros(25, dtype=DOUBLE), torch.linspace(1, 5, 15, dtype=DOUBLE)]),
    "one value": torch.full((40,), 2.0, dtype=DOUBLE),
    "zero": torch.zeros(40, dtype=DOUBLE),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_p_iterations_find_all_eigenpairs(name: str) -> None:
    matrix = matrix_of(SPECTRA[name])
    values, vectors = lanczos(lambda rows: rows @ matrix, start(40), 60)
    unit = torch.eye(40, dtype=DOUBLE)
    torch.testing.assert_close(vectors @ vectors.T, unit, rtol=0, atol=1e-12)
    torch.testing.assert_close(vectors.T * values @ vectors, matrix, rtol=0, atol=1e-9)
    assert values.abs().tolist() == sorted(values.abs().tolist(), reverse=True)


@pytest.mark.parametrize("name", SPECTRA)
def test_with_all_pairs_the_inverse_is_the_explicit_one(name: str) -> None:
    matrix, rhs = matrix_of(SPECTRA[name]), torch.randn(3, 40, dtype=DOUBLE)
    found = spectral_inverse(*lanczos(lambda rows: rows @ matrix, start(40), 40), damping=0.31)(rhs)
    torch.testing.assert_close(found, factor(matrix, 0.31).solve(rhs), rtol=1e-8, atol=1e-8)


def test_few_iterations_find_the_ends_of_the_spectrum() -> None:
    spectrum = torch.cat([torch.linspace(-1, 1, 97, dtype=DOUBLE), torch.tensor([-30.0, 50.0, 40.0], dtype=DOUBLE)])
    matrix = matrix_of(spectrum)
    calls = []
    values, vectors = lanczos(lambda rows: calls.append(len(rows)) or rows @ matrix, start(100), 20)
    assert calls == [1] * 20
    torch.testing.assert_close(values[:3], torch.tensor([50.0, 40.0, -30.0], dtype=DOUBLE), rtol=1e-10, atol=0)
    torch.testing.assert_close(vectors[:3] @ matrix, values[:3, None] * vectors[:3], rtol=0, atol=1e-6)


def test_float32_stays_orthogonal_and_the_start_is_left_alone() -> None:
    matrix, first = matrix_of(SPECTRA["wide"]).float(), start(40).float()
    before = first.clone()
    values, vectors = lanczos(lambda rows: rows @ matrix, first, 40)
    assert (values.dtype, vectors.dtype) == (DOUBLE, torch.float32)
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(40), rtol=0, atol=1e-5)
    assert torch.equal(first, before)


def test_negative_eigenvalues_keep_their_sign_and_the_rest_is_dropped() -> None:
    values, vectors = torch.tensor([4.0, -2.0], dtype=DOUBLE), torch.eye(3, dtype=DOUBLE)[:2]
    found = spectral_inverse(values, vectors)(torch.tensor([[8.0, 8.0, 8.0]], dtype=DOUBLE))
    assert found.tolist() == [[2.0, -4.0, 0.0]]


def test_damped_zeros_are_dropped() -> None:
    inverse = spectral_inverse(torch.tensor([4.0, -1.0]), torch.eye(2), damping=1.0)
    assert inverse(torch.ones(1, 2)).tolist() == [[pytest.approx(0.2), 0.0]]


@pytest.mark.parametrize("values", [[-1.0, -3.0], [0.0, 0.0], [-2.0, 1e-20]])
def test_no_positive_eigenvalue_is_an_error(values: list[float]) -> None:
    with pytest.raises(
        NegativeCurvatureError, match="None of the 2 eigenvalues that were found is positive with `damp"
    ):
        spectral_inverse(torch.tensor(values), torch.eye(2))


@pytest.mark.parametrize(("spectrum", "expected"), [("wide", 100.0), ("zero", 0.0), ("one value", 2.0)])
def test_largest_eigenvalue(spectrum: str, expected: float) -> None:
    matrix = matrix_of(SPECTRA[spectrum])
    found = largest_eigenvalue(lambda rows: rows @ matrix, 40, dtype=DOUBLE)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-12)
    assert found <= expected + 1e-12


def test_largest_eigenvalue_has_its_sign() -> None:
    matrix = matrix_of(torch.tensor([-9.0, 1.0, 2.0], dtype=DOUBLE))
    assert largest_eigenvalue(lambda rows: rows @ matrix, 3, dtype=DOUBLE) == pytest.approx(-9)


def test_bad_arguments() -> None:
    product = torch.clone
    for bad in (torch.zeros(3), torch.ones(1, 3)):
        with pytest.raises(ValueError, match=r"`start` to be a vector \(p,\) other than zero, but got"):
            lanczos(product, bad, 2)
    for function in (lambda: lanczos(product, torch.ones(3), 0), lambda: largest_eigenvalue(product, 3, iterations=0)):
        with pytest.raises(ValueError, match="`iterations` to be a positive integer, but got 0"):
            function()
    with pytest.raises(ValueError, match=r"rows \[0\] hold NaN"):
        lanczos(product, torch.tensor([float("nan"), 1.0]), 2)
    with pytest.raises(ValueError, match="product with the curvature to be finite"):
        lanczos(lambda rows: rows / 0, torch.ones(3), 2)
    with pytest.raises(ValueError, match="`damping` to be a number >= 0, but got -1"):
        spectral_inverse(torch.ones(1), torch.ones(1, 1), -1)
