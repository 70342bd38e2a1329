"""Kernels from a share of the rows, and sketched leverages: unbiased, with the errors that are stated."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_attr.methods import TRAK, SnapshotFeatures, sampling
from lightning_attr.methods.sampling import RowSample, leverage_error, leverage_sketch, sampled_rows

N, K, M = 4000, 12, 5


def columns(rows: int = N, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.rand(rows, generator=generator).double().pow(6)
    features = torch.randn(rows, K, generator=generator).double() * torch.linspace(2, 0.1, K).double()
    return {"features": features, "out_to_loss": q, "newton_weight": q * (1 - q)}


def snapshot(*cuts: int, key: str = "final", n: int = N) -> SnapshotFeatures:
    """The training rows, in blocks that end at the cuts."""
    train, ends = columns(n), [0, *cuts, n]
    parts = [
        (range(start, stop), {name: values[start:stop] for name, values in train.items()})
        for start, stop in pairwise(ends)
    ]
    return SnapshotFeatures(lambda: iter(parts), columns(M, 9), target_rows=range(M), n_train=n, key=key)


def scored(method: TRAK, *given: SnapshotFeatures) -> tuple[Tensor, Tensor]:
    blocks = list(method.score(given))
    return torch.cat([block.scores for block in blocks]), torch.cat([block.self_influence for block in blocks])


def dense_kernel() -> Tensor:
    train = columns()
    return train["features"].T @ (train["newton_weight"][:, None] * train["features"])


def test_a_sampled_kernel_is_unbiased_and_as_close_as_stated() -> None:
    exact, rows, errors = dense_kernel(), 16 * K, []
    ridge = exact.trace() / K * torch.eye(K).double()
    values, vectors = torch.linalg.eigh(exact + ridge)
    root = vectors @ (values.rsqrt()[:, None] * vectors.T)
    mean = torch.zeros_like(exact)
    for draw in range(40):
        ((_, found),) = TRAK().kernels(snapshot(key=f"draw {draw}"), rows)
        errors.append(torch.linalg.matrix_norm(root @ (found - exact) @ root, 2).item())
        mean += found / 40
    torch.testing.assert_close(mean, exact, rtol=0, atol=0.05 * exact.trace().item())
    assert sum(errors) / len(errors) < (K / rows) ** 0.5


def test_rows_are_taken_by_their_size_and_are_no_more_than_wanted() -> None:
    sizes = torch.cat([torch.full((10,), 1e3), torch.ones(N - 10)]).double()
    factors = RowSample.of([sizes], 200, snapshot()).factors(range(N), sizes)
    assert (factors[:10] == 1).all()  # of chance one
    assert 20 < (factors > 0).sum() < 200
    assert (factors * sizes).sum().item() == pytest.approx(sizes.sum().item(), rel=0.1)


@pytest.mark.parametrize("cuts", [(1000, 2500), (7,)], ids=str)
def test_the_sample_does_not_depend_on_the_blocks(cuts: tuple[int, ...]) -> None:
    rows = 8 * K
    ((_, whole),), ((_, parts),) = TRAK().kernels(snapshot(), rows), TRAK().kernels(snapshot(*cuts), rows)
    torch.testing.assert_close(whole, parts, rtol=1e-12, atol=1e-12)


def test_many_samples_are_sampled_and_it_is_on_record() -> None:
    given = snapshot()
    estimate, exact = scored(TRAK(), given), scored(TRAK(sampling=False), snapshot())
    assert given.evidence["kernel_rows"] == 4 * K
    errors = (estimate[0] - exact[0]).norm() / exact[0].norm()
    assert 0 < errors < (1 / 4) ** 0.5
    torch.testing.assert_close(scored(TRAK(), snapshot())[0], estimate[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (TRAK(), 4 * K),
        (TRAK(damping=0.25), 16 * K),
        (TRAK(damping=0.01), None),
        (TRAK(damping=0.0), None),
        (TRAK(loo_correction=True), None),
        (TRAK(sampling=False), None),
    ],
    ids=["default", "smaller", "small", "none", "corrected", "off"],
)
def test_less_damping_takes_more_rows(method: TRAK, expected: int | None) -> None:
    given = snapshot()
    scored(method, given)
    assert given.evidence.get("kernel_rows") == expected


def test_few_samples_are_all_taken() -> None:
    given = snapshot(n=2 * 4 * K)
    scored(TRAK(), given)
    assert "kernel_rows" not in given.evidence
    assert sampled_rows(10**6, 2048, 1.0) == 8192


@pytest.fixture
def sketched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_EXACT_PRODUCTS", 0)
    monkeypatch.setattr(sampling, "_SKETCH", 4)


@pytest.mark.usefixtures("sketched")
def test_sketched_leverages_are_unbiased_with_the_stated_error() -> None:
    factor = torch.linalg.cholesky(dense_kernel() + torch.eye(K).double())
    features = columns(50, seed=3)["features"]
    exact = torch.linalg.solve_triangular(factor, features.T, upper=False).square().sum(0)
    found = []
    for draw in range(400):
        sketch = leverage_sketch(factor, N, f"draw {draw}")
        assert sketch is not None
        assert sketch.shape == (4, K)
        found.append((features @ sketch.T).square().sum(1))
    ratios = torch.stack(found) / exact
    torch.testing.assert_close(ratios.mean(0), torch.ones(50).double(), rtol=0, atol=0.15)
    assert ratios.std(0).max() < 1.15 * leverage_error()


@pytest.mark.usefixtures("sketched")
def test_self_influence_is_sketched_and_it_is_on_record() -> None:
    given = snapshot()
    _, estimate = scored(TRAK(), given)
    scores, exact = scored(TRAK(sampling=False), snapshot())
    assert given.evidence["leverage_error"] == leverage_error()
    assert 0.5 < (estimate.sum() / exact.sum()).item() < 2
    assert "leverage_error" not in snapshot().evidence
    corrected = snapshot()
    scored(TRAK(loo_correction=True), corrected)
    assert "leverage_error" not in corrected.evidence
    assert scores.isfinite().all()


def test_the_effective_dimension_of_a_sketch_is_near(monkeypatch: pytest.MonkeyPatch) -> None:
    exact: dict[str, Any] = {}
    for products in (2**60, 0):
        monkeypatch.setattr(sampling, "_EXACT_PRODUCTS", products)
        monkeypatch.setattr(sampling, "_SKETCH", 5)
        given = snapshot(n=100)
        scored(TRAK(), given)
        exact[f"{products}"] = given.evidence["effective_dimension"]
    assert exact["0"] == pytest.approx(exact[f"{2**60}"], rel=0.5)


def test_the_argument_is_a_flag() -> None:
    with pytest.raises(ValueError, match="argument `sampling` of TRAK to be True or False"):
        TRAK(sampling="yes")  # type: ignore[arg-type]
