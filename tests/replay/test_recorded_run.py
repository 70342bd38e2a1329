"""Metagradients of a training step's own code: the differences of runs with other weights of a sample."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_attr.errors import AttributionError
from lightning_attr.journal import GroupStep, JournalBatch, JournalStep
from lightning_attr.replay.optimizer_forms import Clipping
from lightning_attr.replay.recorded_run import RecordedRun
from lightning_attr.replay.running_statistics import UsedStatistics
from lightning_attr.replay.state import RunState, floating
from lightning_attr.replay.trajectory import Trajectory, memory_needed

N = 8
DRAW = torch.Generator().manual_seed(3)
X, Y = torch.randn(N, 3, generator=DRAW).double(), torch.randint(0, 4, (N,), generator=DRAW)
TARGETS = torch.randn(3, 3, generator=DRAW).double()
ADAM = {"betas": (0.9, 0.99), "eps": 1e-4}


class Net(L.LightningModule):
    """BatchNorm, dropout and a term of no sample; the loss may weigh samples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)
        self.drop = nn.Dropout(0.3)
        self.weights: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.drop(torch.tanh(self.norm(self.first(x)))))
        return found

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, rows = batch
        weight = 0.01 * self.last.weight.square().mean(1).prod()
        if self.weights is None:
            return F.cross_entropy(self(x), y) + weight
        return (self.weights[rows] * F.cross_entropy(self(x), y, reduction="none")).sum() / len(y) + weight


def read(batch: JournalBatch) -> tuple[Tensor, Tensor, Tensor]:
    """With an augmentation."""
    if batch.reading_state is not None:
        put_back(batch.reading_state)
    rows = batch.rows
    return X[rows] + 0.1 * torch.randn(len(rows), 3).double(), Y[rows], rows


def state_of(seed: int) -> dict[str, Tensor]:
    return {"torch": torch.Generator().manual_seed(seed).get_state()}


def put_back(states: Any) -> None:
    if "torch" in states:
        torch.set_rng_state(states["torch"])


def recorded(
    net: Net, kind: str, settings: dict[str, Any], clipping: Clipping | None, steps: int = 5, kept: bool = True
) -> RecordedRun:
    draw, made = torch.Generator().manual_seed(0), []
    for step in range(steps):
        batches = tuple(
            JournalBatch(
                torch.randperm(N, generator=draw)[:5],
                0,
                0,
                2 * step + k,
                random_state=state_of(2 * step + k) if kept else None,
                reading_state=state_of(100 + 2 * step + k),
            )
            for k in range(2)
        )
        groups = GroupStep(0.1 / (1 + step), 0.1), GroupStep(0.05, 0.0)
        made.append(JournalStep(0, step, 0, batches, groups))
    names = ("first.weight", "first.bias", "norm.weight"), ("norm.bias", "last.weight", "last.bias")
    optimizer = {"kind": kind, "groups": [{"parameters": own, **settings} for own in names]}
    weights = {name: t.detach().clone() for name, t in [*net.named_parameters(), *net.named_buffers()]}
    return RecordedRun(net, made, optimizer, {0: "start"}, lambda key: weights, read, put_back, N, clipping)


def outputs(net: Net, parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
    net.eval()
    given = {**parameters, **{name: buffer.detach() for name, buffer in buffers.items()}}
    with UsedStatistics(net, buffers):
        return torch.func.functional_call(net, given, (TARGETS,))[:, 0]


def derivatives(run: RecordedRun, hessian: str = "exact") -> Tensor:
    trajectory = Trajectory(run.state_at(0), run.replay_steps)
    end = trajectory.end
    leaves = {name: t.detach().requires_grad_() for name, t in {**end.parameters, **floating(end.buffers)}.items()}
    parts = [{name: leaves.get(name, t) for name, t in part.items()} for part in (end.parameters, end.buffers)]
    adjoints = []
    for output in outputs(run.module, *parts):
        slopes = torch.autograd.grad(output, list(leaves.values()), retain_graph=True, materialize_grads=True)
        found = dict(zip(leaves, slopes, strict=True))
        of_buffers = {name: found.pop(name) for name in floating(end.buffers)}
        adjoints.append(RunState.adjoint(found, of_buffers, end))
    return trajectory.weight_derivatives(adjoints, N, hessian)


def differences(run: RecordedRun, size: float = 2e-6) -> Tensor:
    rows = []
    for i in range(N):
        ends = []
        for sign in (1, -1):
            run.module.weights = torch.ones(N).double()
            run.module.weights[i] += sign * size
            end = Trajectory(run.state_at(0), run.replay_steps).end
            with torch.no_grad():
                ends.append(outputs(run.module, end.parameters, end.buffers))
        rows.append((ends[0] - ends[1]) / (2 * size))
    run.module.weights = None
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("kind", "settings", "clipping"),
    [
        ("SGD", {"momentum": 0.9, "dampening": 0.1}, None),
        ("SGD", {"momentum": 0.9, "nesterov": True}, Clipping(0.5, "norm")),
        ("Adam", ADAM, Clipping(0.02, "value")),  # differences step over no bound of it
        ("AdamW", ADAM, Clipping(0.5, "norm")),
    ],
    ids=str,
)
def test_metagradients_are_differences(kind: str, settings: dict[str, Any], clipping: Clipping | None) -> None:
    torch.manual_seed(0)
    run = recorded(Net().double(), kind, settings, clipping)
    before = {name: t.clone() for name, t in run.module.state_dict().items()}
    found, expected = derivatives(run), differences(run)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())
    for name, tensor in run.module.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_other_hessians_are_other_scores_of_the_same_last_step() -> None:
    torch.manual_seed(0)
    run = recorded(Net().double(), "SGD", {}, None, steps=1)
    exact = derivatives(run)
    for hessian in ("gram", "none"):
        torch.testing.assert_close(derivatives(run, hessian), exact)
    longer = recorded(run.module, "SGD", {}, None, steps=4)
    found = [derivatives(longer, hessian) for hessian in ("exact", "gram", "none")]
    assert not torch.allclose(found[0], found[1])
    assert not torch.allclose(found[1], found[2])


def test_a_step_that_draws_other_random_numbers_each_time_is_refused() -> None:
    torch.manual_seed(0)
    run = recorded(Net().double(), "SGD", {}, None)
    steps = [replace(s, batches=tuple(replace(b, reading_state=None) for b in s.batches)) for s in run.steps]
    with pytest.raises(AttributionError, match=r"The training loss of step 4 was .* is not deterministic"):
        derivatives(replace(run, steps=steps))


def test_a_loss_without_terms_is_refused() -> None:
    class Product(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch[0]).prod()

    run = recorded(Product().double(), "SGD", {}, None)
    with pytest.raises(AttributionError, match=r"`training_step` of Product returns in step 4 cannot be split"):
        derivatives(run)


def test_streams_that_were_not_kept_are_the_same_each_time() -> None:
    torch.manual_seed(0)
    run = recorded(Net().double(), "SGD", {}, None, kept=False)
    found, expected = derivatives(run), differences(run)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())


def test_a_step_of_other_groups_is_refused() -> None:
    run = recorded(Net().double(), "SGD", {}, None)
    step = replace(run.steps[2], groups=(GroupStep(0.1, 0.0),))
    with pytest.raises(AttributionError, match=r"began with 2 parameter group\(s\), but step 2 was taken with 1"):
        derivatives(replace(run, steps=[*run.steps[:2], step]))


def test_memory_grows_with_the_root_of_the_steps() -> None:
    assert memory_needed(1, 10_000, outputs=1) == 202
