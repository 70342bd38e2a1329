"""ASTRA against the dense inverse, and what its batches do not hang on."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from influence_cases import M, N, dense_curvature, expected_scores, network, scored, shares, snapshot

from lightning_attr.errors import DivergenceError
from lightning_attr.methods import EKFAC, KFAC, Astra, Influence, SnapshotFeatures
from lightning_attr.methods.solvers.astra import momentum_descent

WHOLE = [
    Astra(steps=60, batch_size=N, preconditioner=EKFAC("exact")),
    Astra(steps=60, batch_size=10 * N, preconditioner=KFAC("exact")),
    Astra("sgd", steps=500, batch_size=N, learning_rate=0.3, preconditioner=EKFAC("exact")),
]


@pytest.mark.parametrize("curvature", ["ggn", "empirical_fisher"])
@pytest.mark.parametrize("solver", WHOLE, ids=["cg", "cg behind K-FAC", "sgd"])
def test_with_all_samples_in_the_batch_it_is_the_dense_inverse(solver: Astra, curvature: str) -> None:
    module, train, targets = network()
    expected = expected_scores(module, train, targets, dense_curvature(module, curvature, train), 1.0, 0.01)
    found = scored(Influence(curvature, solver, damping=1.0, weight_decay=0.01), snapshot(module, train, targets))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("refinement", ["cg", "sgd"])
def test_steps_come_nearer_than_what_they_start_from(refinement: Any) -> None:
    module, train, targets = network()
    expected = expected_scores(module, train, targets, dense_curvature(module, "ggn", train), 1.0)[0]

    def error(steps: int, size: int = N) -> float:
        solver = Astra(refinement, steps, size, preconditioner=EKFAC("exact"))
        return (
            scored(Influence(solver=solver, damping=1.0, self_influence="ekfac"), snapshot(module, train, targets))[0]
            - expected
        ).norm()

    assert error(12) < 0.5 * error(1)
    assert error(12, 6) > error(12)  # one batch, or noisy ones, is not the whole


@pytest.mark.parametrize("refinement", ["cg", "sgd"])
def test_neither_tiles_of_targets_nor_batches_of_the_data_matter_and_the_seed_does(refinement: Any) -> None:
    module, train, targets = network()
    method = Influence(solver=Astra(refinement, 3, 8))
    features = snapshot(module, train, targets)
    scores, own = scored(method, features)
    parts = [scored(method, replace(features, target_rows=rows))[0] for rows in (range(1), range(1, M))]
    torch.testing.assert_close(torch.cat(parts, 1), scores)
    for size in (1, N):
        again = scored(method, snapshot(module, train, targets, size))
        torch.testing.assert_close(again[0], scores, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(again[1], own, rtol=1e-6, atol=1e-9)
    assert not scored(Influence(solver=Astra(refinement, 3, 8), seed=1), snapshot(module, train, targets))[0].allclose(
        scores
    )


@pytest.mark.parametrize("refinement", ["cg", "sgd"])
def test_two_processes_are_one(refinement: Any) -> None:
    module, train, targets = network()
    method = Influence(solver=Astra(refinement, 4, 5))
    expected = scored(method, snapshot(module, train, targets, 4))
    blocks: dict[int, Any] = {}

    def run(rank: int, features: SnapshotFeatures) -> None:
        blocks[rank] = list(method.score([features]))

    parts = shares(module, train, targets, [[0, 3, 4], [1, 2, 5]])
    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(parts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for block in blocks[0] + blocks[1]:
        torch.testing.assert_close(block.scores, expected[0][block.rows.start : block.rows.stop])
        torch.testing.assert_close(block.self_influence, expected[1][block.rows.start : block.rows.stop])


def test_no_damping_leaves_the_preconditioner_some() -> None:
    module, train, targets = network()
    scores, _ = scored(Influence(solver=Astra(steps=2), damping=0.0), snapshot(module, train, targets))
    assert scores.isfinite().all()


def test_a_descent_that_diverges_says_so() -> None:
    with pytest.raises(DivergenceError, match=r"diverges: after \d+ steps .*Lower `learning_rate` \(now 3\)"):
        momentum_descent(lambda _: lambda v: v.clone(), torch.zeros(1, 2), torch.ones(1, 2), lambda v: v, 50, 3.0, 0.0)


def test_the_name_and_its_curvatures() -> None:
    method = Influence(solver="astra")
    assert method.config["solver"] == "astra"
    assert method.config["preconditioner"] == {"solver": "ekfac", "labels": "auto"}
    with pytest.raises(ValueError, match="'ggn' or 'empirical_fisher' for the solver 'astra'"):
        Influence("hessian", "astra")
