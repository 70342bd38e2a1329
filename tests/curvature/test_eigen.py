"""Decompositions of sums of few outer products beside the whole ones, and the word before long ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_attr.curvature import eigen
from lightning_attr.curvature.eigen import eigendecomposition
from lightning_attr.curvature.fisher import GradientBatch
from lightning_attr.curvature.kronecker_factors import KroneckerFactors
from lightning_attr.curvature.kronecker_inverse import KroneckerInverse
from lightning_attr.curvature.kronecker_layout import KroneckerLayout
from lightning_attr.gradients import OuterSum


def _sum(vectors: int, side: int, groups: int = 1, decay: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(groups, vectors, side, generator=generator, dtype=torch.float64)
    v *= decay ** torch.arange(vectors, dtype=torch.float64)[:, None]
    return v.mT @ v


@pytest.mark.parametrize(("vectors", "bound"), [(20, 20), (20, 100), (1, 1), (140, 140)])
@pytest.mark.parametrize("decay", [1.0, 0.7])
def test_few_vectors_have_the_eigenvalues_of_the_whole(vectors: int, bound: int, decay: float) -> None:
    matrices = _sum(vectors, 300, groups=2, decay=decay)
    eigenvalues, basis = eigendecomposition("w", matrices, bound)
    torch.testing.assert_close(eigenvalues, torch.linalg.eigvalsh(matrices).clamp(min=0), rtol=1e-9, atol=1e-9)
    assert (eigenvalues.diff() >= 0).all()
    torch.testing.assert_close(basis.mT @ basis, torch.eye(300).double().expand(2, -1, -1))
    torch.testing.assert_close((basis * eigenvalues.unsqueeze(1)) @ basis.mT, matrices)


def test_nothing_at_all_has_zeros() -> None:
    eigenvalues, basis = eigendecomposition("w", torch.zeros(1, 300, 300, dtype=torch.float64), 0)
    assert not eigenvalues.any()
    torch.testing.assert_close(basis.mT @ basis, torch.eye(300).double()[None])


def test_kfac_of_many_classes_is_the_dense_one(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(6, 400, bias=False, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.randn(9, 1, d, generator=generator, dtype=torch.float64) for d in (400, 6))
    vectors = torch.randn(2, 2400, generator=generator, dtype=torch.float64)
    batch = GradientBatch([lambda sink: sink({"weight": OuterSum(rows, columns)})], samples=9)
    found = []
    for small in (256, 1000):  # by few vectors, and whole
        monkeypatch.setattr(eigen, "_SMALL", small)
        factors = KroneckerFactors.fit(KroneckerLayout.of(layer), lambda _: [batch], dtype=torch.float64)
        found.append(KroneckerInverse(factors, damping=0.1, method="kfac").apply(vectors))
    torch.testing.assert_close(found[0], found[1])
    moment = rows.squeeze(1).mT @ rows.squeeze(1) / 9
    other = columns.squeeze(1).mT @ columns.squeeze(1) / 9
    curvature = torch.kron(moment, other)
    damped = curvature + 0.1 * curvature.diagonal().mean() * torch.eye(2400).double()
    torch.testing.assert_close(found[0], torch.linalg.solve(damped, vectors.T).T)


def test_what_takes_long_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(eigen, "_SMALL", 10)
    monkeypatch.setattr(eigen, "_seconds", lambda device: 1e6)
    eigendecomposition("head.weight", _sum(100, 60), 100)
    assert "factors of `head.weight` need the eigenvectors of a matrix of side 60: about 1,609 seconds" in caplog.text
    caplog.clear()
    eigendecomposition("head.weight", _sum(10, 60), 10)
    assert not caplog.messages
