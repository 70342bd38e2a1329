"""MAGIC and TrajectoryInfluence: the differences of runs that were trained again with other weights of a sample."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_attr import AttributionMixin
from lightning_attr.errors import AttributionError, MemoryBudgetError
from lightning_attr.features.snapshot_model import SnapshotModel
from lightning_attr.journal import GroupStep, JournalBatch, JournalStep
from lightning_attr.methods.base import ScoreBlock, SnapshotFeatures
from lightning_attr.methods.magic import MAGIC
from lightning_attr.methods.support import run_method
from lightning_attr.methods.support.run_method import RunMethod
from lightning_attr.methods.trajectory_influence import TrajectoryInfluence
from lightning_attr.parameters.optimizer_settings import optimizer_settings
from lightning_attr.parameters.weights import load_weights, weights_of
from lightning_attr.replay.recorded_run import RecordedRun

N, STEPS = 8, 6
DRAW = torch.Generator().manual_seed(5)
X, Y = torch.randn(N, 3, generator=DRAW).double(), torch.randint(0, 4, (N,), generator=DRAW)
TARGETS = torch.randn(3, 3, generator=DRAW).double(), torch.tensor([0, 1, 2])
ROWS = [torch.randperm(N, generator=DRAW)[:4] for _ in range(STEPS)]


class Net(AttributionMixin, L.LightningModule):
    """BatchNorm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 4)
        self.net = nn.Sequential(*layers)
        self.weights: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.net(x)
        return found

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        if self.weights is None:
            return F.cross_entropy(self(x), y)
        return (self.weights * F.cross_entropy(self(x), y, reduction="none")).mean()


def optimizer_of(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=0.05, weight_decay=0.1, eps=1e-4)


def begun() -> Net:
    torch.manual_seed(0)
    return Net().double()


def trained(weights: Tensor | None = None) -> tuple[Net, dict[int, dict[str, Tensor]], list[JournalStep]]:
    """Train by a plain loop with torch's own optimizer; the journal by hand."""
    net = begun()
    optimizer, snapshots, steps = optimizer_of(net), {0: copied(net)}, []
    for step, rows in enumerate(ROWS):
        optimizer.param_groups[0]["lr"] = 0.05 / (1 + step)
        batch = JournalBatch(rows, 0, 0, step, {"torch": torch.get_rng_state()}, {})
        net.weights = None if weights is None else weights[rows]
        net.train().training_step((X[rows], Y[rows]), step).backward()
        optimizer.step()
        optimizer.zero_grad()
        steps.append(JournalStep(0, step, 0, (batch,), (GroupStep(0.05 / (1 + step), 0.1),)))
        if step + 1 in {3, STEPS}:
            snapshots[step + 1] = copied(net)
    net.weights = None
    return net.eval(), snapshots, steps


def copied(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in weights_of(net).items()}


def put_back(states: Mapping[str, Tensor]) -> None:
    if "torch" in states:
        torch.set_rng_state(states["torch"])


def snapshot_of(change: float = 0.0, **settings: Any) -> SnapshotFeatures:
    net, snapshots, steps = trained()
    snapshots[3]["net.0.weight"] = snapshots[3]["net.0.weight"] * (1 + change)
    (optimizer,) = optimizer_settings([optimizer_of(net)], net)
    run = RecordedRun(
        net,
        steps,
        optimizer,
        {number: str(number) for number in snapshots},
        lambda key: snapshots[int(key)],
        lambda batch: (X[batch.rows], Y[batch.rows]),
        put_back,
        N,
        **settings,
    )
    model = SnapshotModel.of(net, [(X[:5], Y[:5]), (X[5:], Y[5:])], [TARGETS])
    model = replace(model, run=lambda: run, load=lambda: load_weights(net, snapshots[STEPS]))
    return SnapshotFeatures.at(model, {})


def scored(method: RunMethod, snapshot: SnapshotFeatures) -> ScoreBlock:
    (block,) = method.score([snapshot])
    return block


def differences(size: float = 1e-5) -> Tensor:
    found = torch.zeros(N, 3).double()
    for row in range(N):
        for sign in (1, -1):
            weights = torch.ones(N).double()
            weights[row] += sign * size
            net = trained(weights)[0]
            with torch.no_grad():
                found[row] += sign * net.model_output.output(net(TARGETS[0]), TARGETS[1]) / (2 * size)
    return found


def test_scores_are_the_differences_of_runs_trained_again() -> None:
    snapshot, expected = snapshot_of(), differences()
    for method in (MAGIC(), TrajectoryInfluence()):
        block = scored(method, snapshot_of())
        torch.testing.assert_close(block.scores, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())
        assert block.rows == range(N)
        assert block.self_influence.isnan().all()
    scored(MAGIC(tolerance=0.0), snapshot)  # bit for bit
    assert snapshot.evidence == {"steps": STEPS, "drift": {"0": 0.0, "3": 0.0, "6": 0.0}}


def test_a_sample_that_is_a_target_has_its_self_influence() -> None:
    snapshot = snapshot_of()
    found = scored(MAGIC(self_influence=True), snapshot).self_influence
    assert snapshot.model is not None
    own = replace(snapshot.model, target_batches=lambda rows: iter([(range(N), (X, Y))]))
    whole = replace(SnapshotFeatures.at(own, {}), cache=type(snapshot.cache)())
    torch.testing.assert_close(found, scored(MAGIC(), whole).scores.diagonal())


def test_a_replay_that_drifts_is_refused_by_step_and_parameter() -> None:
    snapshot = snapshot_of(change=0.01)
    message = r"after 3 optimizer steps `net.0.weight` differs from the snapshot '3' by 0.0099 of its length.*tolerance"
    with pytest.raises(AttributionError, match=message):
        scored(MAGIC(), snapshot)
    assert scored(MAGIC(tolerance=0.1), snapshot_of(change=0.01)).scores.isfinite().all()


def test_trajectory_influence_goes_on_from_the_snapshot() -> None:
    snapshot = snapshot_of(change=0.01)
    found = scored(TrajectoryInfluence(), snapshot).scores
    assert snapshot.evidence["drift"]["3"] == pytest.approx(0.0099, rel=0.01)
    exact = scored(TrajectoryInfluence(), snapshot_of()).scores
    assert not torch.allclose(found, exact, rtol=1e-6)
    torch.testing.assert_close(found, exact, rtol=0.1, atol=0.1 * exact.abs().max().item())


def test_other_hessians_are_close_where_steps_are_small() -> None:
    exact, gram, none = (scored(TrajectoryInfluence(hessian), snapshot_of()).scores for hessian in HESSIANS)
    for other in (gram, none):
        assert torch.corrcoef(torch.stack([exact.flatten(), other.flatten()]))[0, 1] > 0.8
        assert not torch.allclose(exact, other, rtol=1e-3)


HESSIANS = ("exact", "gram", "none")


def test_without_a_run_there_is_nothing_to_replay() -> None:
    net = begun().eval()
    snapshot = SnapshotFeatures.at(SnapshotModel.of(net, [(X, Y)], [TARGETS]), {})
    with pytest.raises(AttributionError, match="MAGIC replays the run that led to a snapshot, but this one has no"):
        scored(MAGIC(), snapshot)


def test_memory_that_would_not_do_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_method, "free_bytes", lambda device: 1000)
    with pytest.raises(MemoryBudgetError, match=r"MAGIC keeps states of the run \(6 steps\) and of each target \(3\)"):
        scored(MAGIC(), snapshot_of())


def test_a_probe_says_how_smooth_the_run_is(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = snapshot_of()
    scored(MAGIC(probe=True), snapshot)
    assert -1 <= snapshot.evidence["smoothness"] <= 1
    monkeypatch.setattr("lightning_attr.methods.magic.metasmoothness", lambda *args: 0.3)
    with caplog.at_level(logging.WARNING, logger="lightning_attr.methods.magic"):
        scored(MAGIC(probe=True), snapshot_of())
    assert "The run is not smooth: its metasmoothness is 0.30" in caplog.text


def test_no_targets_have_no_scores() -> None:
    snapshot = snapshot_of()
    none = replace(snapshot, target_rows=range(0))
    assert scored(MAGIC(), none).scores.shape == (N, 0)
