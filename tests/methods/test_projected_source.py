"""SOURCE on stored features against its definition, against SOURCE on a linear model, and at its limits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from influence_cases import Line, batches
from torch import Tensor

from lightning_attr.errors import AttributionError
from lightning_attr.features.snapshot_model import SnapshotModel
from lightning_attr.methods import EKFAC, SOURCE, ProjectedSOURCE, SnapshotFeatures, TracIn
from lightning_attr.projectors import IdentityProjector

N, M, K = 20, 3, 5
LAYERS = {"a": slice(0, 2), "b": slice(2, 5)}
PLAIN: dict[str, Any] = {"optimizer": "sgd", "momentum": 0.0}


def snapshot(seed: int, rate: float) -> SnapshotFeatures:
    generator = torch.Generator().manual_seed(seed)
    train = {
        "features": torch.randn(N, K, generator=generator).double(),
        "out_to_loss": torch.randn(N, generator=generator).double(),
        "newton_weight": torch.rand(N, generator=generator).double(),
    }
    found = SnapshotFeatures.of(train, {"features": torch.randn(M, K, generator=generator).double()})
    return replace(found, key=f"epoch={seed}", learning_rate=rate, layers=LAYERS)


@pytest.mark.parametrize("curvature", ["ggn", "empirical_fisher"])
@pytest.mark.parametrize("per_layer", [True, False])
def test_it_is_its_definition(curvature: str, per_layer: bool) -> None:
    rates = [0.0, 0.5, 2.0, 1.0]
    run = [snapshot(seed, rate) for seed, rate in enumerate(rates)]
    scores: Any = 0
    own: Any = 0
    for i, at in enumerate(run):
        ((_, train),) = at.blocks()
        later = sum(rates[i + 1 :]) / 0.5
        for layer in LAYERS.values() if per_layer else [slice(0, K)]:
            phi, psi = train["features"][:, layer], at.targets["features"][:, layer]
            w = train["newton_weight"] if curvature == "ggn" else train["out_to_loss"].square()
            h = phi.T @ (w[:, None] * phi) / N + 0.1 * torch.eye(phi.shape[1]).double()
            eye = torch.eye(len(h)).double()
            inner = torch.matrix_exp(-later * h) @ torch.linalg.solve(h, eye - torch.matrix_exp(-rates[i] / 0.5 * h))
            push = train["out_to_loss"][:, None] * phi / N
            scores = scores + push @ inner @ psi.T
            own = own + (push * (phi @ inner)).sum(1)
    method = ProjectedSOURCE(None, curvature, "sgd", 0.5, 0.1, per_layer)
    (block,) = method.score(run)
    torch.testing.assert_close(block.scores, scores)
    torch.testing.assert_close(block.self_influence, own)


def stored(module: Any, rate: float, train: Any, targets: Any, key: str) -> tuple[SnapshotFeatures, SnapshotFeatures]:
    """The same snapshot with its module, and by its features."""
    model = SnapshotModel.of(module.eval(), batches(train, 7), batches(targets, 3), key)
    identity = IdentityProjector().bind(model.layout, key)
    parts = [columns for _, columns in model.train(identity)]
    columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    found = SnapshotFeatures.of(columns, model.targets(identity, range(len(targets[0]))))
    whole = SnapshotFeatures.at(model, {}, rate)
    return replace(whole, key=key), replace(found, key=key, learning_rate=rate)


def test_on_a_linear_model_it_is_source() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, K, generator=generator).double()
    train = x, x.sum(1) + torch.randn(N, generator=generator).double()
    targets = torch.randn(M, K, generator=generator).double(), torch.ones(M).double()
    pairs = []
    for i, rate in enumerate([0.3, 0.5, 0.2]):
        module = Line(K, 1, bias=False).double()
        module.weight.data[0] = torch.randn(K, generator=generator).double()
        pairs.append(stored(module, rate, train, targets, f"epoch={i}"))
    wholes, features = zip(*pairs, strict=True)
    expected = list(SOURCE(3, EKFAC("exact"), optimizer="sgd", momentum=0.9).score(wholes))
    (found,) = ProjectedSOURCE(optimizer="sgd", momentum=0.9).score(features)
    torch.testing.assert_close(found.scores, torch.cat([block.scores for block in expected]))
    torch.testing.assert_close(found.self_influence, torch.cat([block.self_influence for block in expected]))


def test_in_a_short_time_it_is_tracin() -> None:
    run = [snapshot(seed, 1e-9) for seed in range(3)]
    (found,), (expected,) = ProjectedSOURCE(**PLAIN).score(run), TracIn().score(run)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.self_influence, expected.self_influence, rtol=1e-6, atol=0)


def test_runs_are_averaged() -> None:
    runs = [[snapshot(seed, 1.0) for seed in seeds] for seeds in ([0, 1], [2, 3])]
    both = [replace(at, key=f"run{i}/{at.key}") for i, run in enumerate(runs) for at in run]
    (found,) = ProjectedSOURCE(**PLAIN).score(both)
    one, other = (next(ProjectedSOURCE(**PLAIN).score(run)).scores for run in runs)
    torch.testing.assert_close(found.scores, (one + other) / 2)


def groups(kind: str, *momenta: float) -> list[dict[str, Any]]:
    own = [{"parameters": [f"{i}.weight"], "momentum": momentum} for i, momentum in enumerate(momenta)]
    return [{"kind": kind, "groups": own}]


def test_the_optimizer_on_record() -> None:
    at = snapshot(0, 1.0)

    def scores(method: ProjectedSOURCE, **more: Any) -> Tensor:
        return next(method.score([replace(at, cache=type(at.cache)(), **more)])).scores

    expected = scores(ProjectedSOURCE(optimizer="sgd", momentum=0.9))
    torch.testing.assert_close(scores(ProjectedSOURCE(), optimizers=groups("SGD", 0.9, 0.9)), expected)
    with pytest.raises(AttributionError, match=r"Take ProjectedSOURCE\(optimizer=\"adam\"\)"):
        scores(ProjectedSOURCE(), optimizers=groups("AdamW", 0.0))
    with pytest.raises(AttributionError, match=r"groups of this run have their own\. Take SOURCE\(\)"):
        scores(ProjectedSOURCE(), optimizers=groups("SGD", 0.9, 0.0))
    with pytest.raises(AttributionError, match="no record of it"):
        scores(ProjectedSOURCE())
    assert ProjectedSOURCE(optimizer="adam").projector_config == TracIn(preconditioner="adam").projector_config
