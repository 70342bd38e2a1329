"""TRAK by blocks, in any precision, against the formula with every matrix written out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_attr.methods import TRAK, ScoreBlock, SnapshotFeatures

N, M, P = 40, 6, 5
METHODS = [TRAK(damping=0), TRAK(damping=0.3), TRAK(damping=0.3, newton_weights=False)]


def _joined(blocks: Iterable[ScoreBlock]) -> tuple[Tensor, Tensor]:
    found = sorted(blocks, key=lambda block: block.rows.start)
    return torch.cat([block.scores for block in found]), torch.cat([block.self_influence for block in found])


def _score(method: TRAK, train: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    return _joined(method.score([SnapshotFeatures.of(train, targets)]))


def _columns(rows: int = N, dim: int = P, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.rand(rows, generator=generator).double()
    features = torch.randn(rows, dim, generator=generator).double()
    return {"features": features, "out_to_loss": q, "newton_weight": q * (1 - q)}


def _blocks(train: Mapping[str, Tensor], ranges: Sequence[range]) -> Any:
    return lambda: ((rows, {name: values[rows] for name, values in train.items()}) for rows in ranges)


@pytest.mark.parametrize("method", METHODS)
def test_several_blocks_are_one(method: TRAK) -> None:
    train, targets = _columns(), _columns(M, seed=1)
    expected = _score(method, train, targets)
    ranges = [range(30, N), range(7), range(7, 8), range(8, 30)]
    found = _joined(method.score([SnapshotFeatures(_blocks(train, ranges), targets)]))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_are_one(method: TRAK) -> None:
    train, targets = _columns(), _columns(M, seed=1)
    expected = _score(method, train, targets)
    shares = [[range(10), range(25, N)], [range(10, 25)]]

    def kernel(ranges: Sequence[range]) -> Tensor:
        rows = [i for part in ranges for i in part]
        phi = train["features"][rows]
        weights = train["newton_weight"][rows] if method.newton_weights else torch.ones(len(rows)).double()
        return phi.T @ (phi * weights[:, None])

    found: list[ScoreBlock] = []
    for own, other in (shares, shares[::-1]):
        snapshot = SnapshotFeatures(_blocks(train, own), targets, reduce=lambda t, other=other: t + kernel(other))
        found += method.score([snapshot])
        assert [block.rows for block in found[-len(own) :]] == own  # a process scores its own rows only
    for a, b in zip(_joined(found), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("method", METHODS)
def test_float32_features_and_scores_are_close(method: TRAK) -> None:
    train, targets = _columns(), _columns(M, seed=1)
    expected = _score(method, train, targets)
    single = [{name: values.float() for name, values in columns.items()} for columns in (train, targets)]
    for a, b in zip(_score(method, *single), expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def _reference(method: TRAK, train: dict[str, Tensor], targets: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The formula with every matrix written out, in float64; self-influence is the diagonal of n x n."""
    phi, q, w = (train[name].double() for name in ("features", "out_to_loss", "newton_weight"))
    psi, weights = targets["features"].double(), torch.diag(w) if method.newton_weights else torch.eye(len(w)).double()
    kernel = phi.T @ weights @ phi
    damped = kernel + method.damping * kernel.diagonal().mean() * torch.eye(len(kernel)).double()
    solve = torch.linalg.inv(damped)
    return torch.diag(q) @ phi @ solve @ psi.T, (torch.diag(q) @ phi @ solve @ phi.T).diagonal()


# Widths on either side of a strip, and not a multiple of it.
@pytest.mark.parametrize("dim", [1, 255, 256, 257, 600])
@pytest.mark.parametrize("newton_weights", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_any_width_in_any_precision(dim: int, newton_weights: bool, dtype: torch.dtype) -> None:
    train, targets = (
        {name: values.to(dtype) for name, values in _columns(rows, dim, seed).items()}
        for rows, seed in ((700, 0), (M, 1))
    )
    method = TRAK(damping=0.1, newton_weights=newton_weights)
    blocks = [range(300), range(300, 301), range(301, 700)]
    found = _joined(method.score([SnapshotFeatures(_blocks(train, blocks), targets)]))
    for a, b in zip(found, _reference(method, train, targets), strict=True):
        relative = (a.double() - b).abs().max() / b.abs().max()
        assert a.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert relative < (1e-10 if dtype == torch.float64 else 2e-6), relative


def test_targets_are_solved_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    train, targets = _columns(), _columns(M, seed=1)
    expected = _score(TRAK(), train, targets)
    monkeypatch.setattr("lightning_attr.methods.kernels.feature_kernel._SOLVE", 4)
    for a, b in zip(_score(TRAK(), train, targets), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_kernels_are_added_up_in_float64() -> None:
    """Many small blocks after one that is larger by more than float32's digits."""
    train = {"features": torch.ones(2001, 1), "out_to_loss": torch.ones(2001), "newton_weight": torch.ones(2001)}
    train["features"][0] = 3e4
    ranges = [range(i, i + 1) for i in range(2001)]
    found, _ = _joined(
        TRAK(damping=0).score([SnapshotFeatures(_blocks(train, ranges), {"features": torch.ones(1, 1)})])
    )
    assert found[1].item() == pytest.approx(1 / (9e8 + 2000), rel=2e-7)


def test_the_kernel_is_computed_once_for_all_targets() -> None:
    train, targets, reads = _columns(), _columns(M, seed=1), []

    def blocks() -> Any:
        reads.append(1)
        return _blocks(train, [range(N)])()

    snapshot = SnapshotFeatures(blocks, targets)
    expected = _joined(TRAK().score([snapshot]))[0]
    part = replace(snapshot, targets={name: values[2:] for name, values in targets.items()})
    torch.testing.assert_close(_joined(TRAK().score([part]))[0], expected[:, 2:], rtol=1e-12, atol=1e-14)
    assert len(reads) == 3  # once for the kernel, and twice to score


def test_the_columns_are_left_alone() -> None:
    train, targets = _columns(), _columns(M, seed=1)
    before = [{name: values.clone() for name, values in columns.items()} for columns in (train, targets)]
    _score(TRAK(), train, targets)
    for columns, copies in zip((train, targets), before, strict=True):
        assert all(torch.equal(values, copies[name]) for name, values in columns.items())


@pytest.mark.parametrize(
    ("column", "newton_weights"), [("features", False), ("features", True), ("newton_weight", True)]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite(column: str, newton_weights: bool, value: float) -> None:
    train, targets = _columns(), _columns(M, seed=1)
    train[column][3] = value
    with pytest.raises(ValueError, match=r"Expected finite features, but the kernel .* holds NaN or infinite values"):
        _score(TRAK(newton_weights=newton_weights), train, targets)
