"""TRAK's leverages: exact leave-one-out scores, the effective dimension, and features in any batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_attr import AttributionMixin
from lightning_attr.features.featurizer import Featurizer, plan
from lightning_attr.methods import TRAK, SnapshotFeatures
from lightning_attr.methods.kernels import feature_kernel as kernel
from lightning_attr.outputs import Regression
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.projectors import GaussianProjector, IdentityProjector, KroneckerProjector

N, M, P = 64, 6, 5


class Line(AttributionMixin, nn.Linear):
    model_output = Regression()


class Network(AttributionMixin, nn.Sequential):
    pass


def _columns(rows: int = N, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.rand(rows, generator=generator).double()
    features = torch.randn(rows, P, generator=generator).double()
    return {"features": features, "out_to_loss": q, "newton_weight": q * (1 - q)}


def _score(method: TRAK, *snapshots: SnapshotFeatures) -> tuple[Tensor, Tensor]:
    blocks = list(method.score(snapshots))
    return torch.cat([block.scores for block in blocks]), torch.cat([block.self_influence for block in blocks])


def _snapshot(seed: int = 0, rows: int = N) -> SnapshotFeatures:
    return SnapshotFeatures.of(_columns(rows, seed), _columns(M, seed + 100))


# Leaving one out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.0, 0.7])
@pytest.mark.parametrize("newton_weights", [True, False])
def test_regression_is_leaving_one_out_and_training_again(damping: float, newton_weights: bool) -> None:
    x, targets = torch.randn(N, P).double(), torch.randn(M, P).double()
    y = x @ torch.randn(P).double() + torch.randn(N).double()
    ridge = damping * x.square().sum() / P

    def fit(kept: Tensor) -> Tensor:
        return torch.linalg.solve(x[kept].T @ x[kept] + ridge * torch.eye(P).double(), x[kept].T @ y[kept])

    full = fit(torch.ones(N, dtype=torch.bool))
    train = {"features": x, "out_to_loss": y - x @ full, "newton_weight": torch.ones(N).double()}
    method = TRAK(damping=damping, newton_weights=newton_weights, loo_correction=True)
    scores, self_influence = _score(method, SnapshotFeatures.of(train, {"features": targets}))
    for i in range(N):
        without = fit(torch.arange(N) != i)
        torch.testing.assert_close(scores[i], targets @ (full - without), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(self_influence[i], x[i] @ (full - without), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("newton_weights", [True, False])
def test_the_correction_of_an_ensemble_is_made_at_each_snapshot(newton_weights: bool) -> None:
    kernels, leverages = [], []
    for seed in range(3):
        train, targets = _columns(seed=seed), _columns(M, seed + 100)
        phi, q = train["features"], train["out_to_loss"]
        weights = train["newton_weight"] if newton_weights else torch.ones(N).double()
        kernel = phi.T @ (phi * weights[:, None])
        inverse = torch.linalg.inv(kernel + 0.3 * kernel.trace() / P * torch.eye(P).double())
        leverage = (phi @ inverse * phi).sum(1)
        own = (q if newton_weights else 1) / (1 - leverage * weights)
        kernels.append(own[:, None] * (phi @ inverse @ targets["features"].T))
        leverages.append(own * leverage)
    push = torch.stack([_columns(seed=seed)["out_to_loss"] for seed in range(3)]).mean(0)
    push = torch.ones(N).double() if newton_weights else push
    method = TRAK(damping=0.3, newton_weights=newton_weights, loo_correction=True, balanced=False)
    scores, self_influence = _score(method, *(_snapshot(seed) for seed in range(3)))
    torch.testing.assert_close(scores, push[:, None] * torch.stack(kernels).mean(0), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(self_influence, push * torch.stack(leverages).mean(0), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("newton_weights", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sample_that_alone_determines_its_output(newton_weights: bool, dtype: torch.dtype) -> None:
    train, targets = _columns(), _columns(M, seed=1)
    train["features"][:, 0] = 0
    train["features"][50] = torch.eye(P)[0]
    columns = [{name: values.to(dtype) for name, values in own.items()} for own in (train, targets)]
    rows = torch.arange(N).chunk(2)
    parts = [(range(int(r[0]), int(r[-1]) + 1), {name: v[r] for name, v in columns[0].items()}) for r in rows]
    snapshot = SnapshotFeatures(lambda: iter(parts), columns[1])
    method = TRAK(damping=0, newton_weights=newton_weights, loo_correction=True)
    with pytest.raises(ValueError, match=r"leverages below 1 .* but that of training sample 50 is"):
        _score(method, snapshot)
    snapshot.cache.clear()
    scores, _ = _score(TRAK(damping=0.1, newton_weights=newton_weights, loo_correction=True), snapshot)
    assert scores.isfinite().all()


# The effective dimension ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.0, 0.5])
@pytest.mark.parametrize("newton_weights", [True, False])
def test_the_effective_dimension_is_on_record(damping: float, newton_weights: bool) -> None:
    snapshots = [_snapshot(seed) for seed in range(2)]
    _score(TRAK(damping=damping, newton_weights=newton_weights), *snapshots)
    for seed, snapshot in enumerate(snapshots):
        train = _columns(seed=seed)
        features = train["features"] * (train["newton_weight"].sqrt()[:, None] if newton_weights else 1)
        values = torch.linalg.svdvals(features).square()
        expected = (values / (values + damping * values.sum() / P)).sum().item()
        kernel = {"kernel": "margin"} if newton_weights else {}
        assert snapshot.evidence == {"effective_dimension": pytest.approx(expected, rel=1e-10), **kernel}


def test_the_effective_dimensions_of_layers_add_up() -> None:
    snapshot = _snapshot()
    object.__setattr__(snapshot, "layers", {"a": slice(0, 2), "b": slice(2, P)})
    _score(TRAK(damping=0.5, newton_weights=False, per_layer=True), snapshot)
    expected = 0.0
    for columns in snapshot.layers.values():
        values = torch.linalg.svdvals(_columns()["features"][:, columns]).square()
        expected += (values / (values + 0.5 * values.mean())).sum().item()
    assert snapshot.evidence["effective_dimension"] == pytest.approx(expected, rel=1e-10)


# Batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projector", [IdentityProjector(), GaussianProjector(12, seed=1), KroneckerProjector(16)])
def test_batches_and_their_order_change_nothing(projector: Any) -> None:
    module = Network(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double().eval()
    x, y = torch.randn(N, 3).double(), torch.randint(3, (N,))
    projection = projector.bind(ParameterLayout.of(module), "final")
    featurizer = Featurizer(module, plan(module, (x, y), N), projection)

    def features(order: Tensor, size: int) -> dict[str, Tensor]:
        parts = [featurizer((x[rows], y[rows]), rows.tolist()) for rows in order.split(size)]
        columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return {name: values[order.argsort()] for name, values in columns.items()}

    targets = {name: values[:M] for name, values in features(torch.arange(N), N).items()}
    expected = _score(TRAK(), SnapshotFeatures.of(features(torch.arange(N), N), targets))
    for size in (1, 7, 64):
        for order in (torch.arange(N), torch.randperm(N)):
            found = _score(TRAK(), SnapshotFeatures.of(features(order, size), targets))
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("side", [1, 2, 127, 129, 300])
def test_triangular_inverse_is_the_inverse(side: int) -> None:
    lower = torch.randn(side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(side)).tril()
    lower += 3 * side**0.5 * torch.eye(side, dtype=torch.float64)
    found = kernel.triangular_inverse(lower)
    torch.testing.assert_close(found, torch.linalg.inv(lower), rtol=1e-10, atol=1e-12)
    assert torch.equal(found, found.tril())


def test_leverages_are_computed_once_for_all_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    squared_norms = kernel.squared_norms
    monkeypatch.setattr(kernel, "squared_norms", lambda *given: calls.append(len(given[0])) or squared_norms(*given))
    snapshots = [SnapshotFeatures.of(_columns(seed=seed), _columns(M, seed=3)) for seed in (0, 1)]
    first = _score(TRAK(), *snapshots)
    assert calls == [N, N]  # for the weights of the snapshots, which scoring reads again
    second = _score(TRAK(), *snapshots)
    assert calls == [N, N]
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    _score(TRAK(damping=0.1), *snapshots)
    assert calls == 4 * [N]
