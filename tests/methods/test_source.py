"""SOURCE against training again, against its definition with every matrix written out, and at its limits."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from influence_cases import Batch, Line, Network, batches, gradients, network
from method_cases import record
from method_cases import scored as attributed
from torch import Tensor

from cases import BlobClassifier, blobs, loader_of, quiet_trainer
from lightning_attr import FeatureStore
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.curvature.kronecker_inverse import in_eigenbasis
from lightning_attr.errors import AttributionError
from lightning_attr.features.snapshot_model import SnapshotModel
from lightning_attr.methods import EKFAC, SOURCE, AttributionMethod, Influence, SnapshotFeatures, TracIn
from lightning_attr.methods.solvers.layerwise import fit_factors
from lightning_attr.parameters.optimizer_settings import optimizer_settings

PLAIN: dict[str, Any] = {"optimizer": "sgd", "momentum": 0.0, "solver": EKFAC("exact")}


def run_of(modules: Sequence[Any], rates: Sequence[float], train: Batch, targets: Batch, size: int = 7) -> list[Any]:
    """Snapshots of a run, a module each."""
    found = []
    for i, (module, rate) in enumerate(zip(modules, rates, strict=True)):
        model = SnapshotModel.of(module.eval(), batches(train, size), batches(targets, 3), f"epoch={i}")
        found.append(replace(SnapshotFeatures.at(model, {}, rate), key=f"epoch={i}"))
    return found


def scored(method: AttributionMethod, run: Sequence[SnapshotFeatures]) -> tuple[Tensor, Tensor]:
    blocks = list(method.score(run))
    return torch.cat([block.scores for block in blocks]), torch.cat([block.self_influence for block in blocks])


def networks(count: int) -> tuple[list[Network], Batch, Batch]:
    """The same network with weights that go somewhere."""
    module, train, targets = network()
    found = []
    for i in range(count):
        own = copy.deepcopy(module)
        generator = torch.Generator().manual_seed(i)
        for p in own.parameters():
            p.data += 0.2 * torch.randn(p.shape, generator=generator).to(p)
        found.append(own)
    return found, train, targets


# Against training again -------------------------------------------------------------------------------------------

N, P, STEPS = 20, 4, 2**20


def descended(x: Tensor, y: Tensor, start: Tensor, weights: Tensor, time: float, momentum: float) -> Tensor:
    """Full-batch gradient descent with heavy-ball momentum, in the limit of small steps.

    A step is a linear map, a run one of its powers. What is left of the size of the steps is taken off by running with
    half of it, too.
    """
    coarse, fine = (_descended(x, y, start, weights, time, momentum, steps) for steps in (STEPS, 2 * STEPS))
    return 2 * fine - coarse


def _descended(
    x: Tensor, y: Tensor, start: Tensor, weights: Tensor, time: float, momentum: float, steps: int
) -> Tensor:
    rate = time * (1 - momentum) / steps
    h, b = x.T @ (weights[:, None] * x) / N, x.T @ (weights * y) / N
    step = torch.zeros(2 * P + 1, 2 * P + 1).double()  # parameters, velocity, one
    step[P : 2 * P, :P], step[P : 2 * P, P : 2 * P], step[P : 2 * P, -1] = h, momentum * torch.eye(P).double(), -b
    step[:P] = -rate * step[P : 2 * P]
    step[:P, :P] += torch.eye(P).double()
    step[-1, -1] = 1
    begun = torch.cat([start, torch.zeros(P).double(), torch.ones(1).double()])
    return (torch.linalg.matrix_power(step, steps) @ begun)[:P]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("segments", [1, [0.1, 0.5]])
def test_scores_are_the_derivative_of_training_again_where_curvature_and_gradients_stay(
    segments: Any, momentum: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, P, generator=generator).double()
    y = x @ torch.randn(P, generator=generator).double() + torch.randn(N, generator=generator).double()
    targets = torch.randn(3, P, generator=generator).double()
    module = Line(P, 1, bias=False).double()
    module.weight.data[0] = start = torch.linalg.lstsq(x, y).solution  # training from the optimum stays there
    rates = [0.0, 0.3, 0.2, 0.5]
    run = run_of([module] * 4, rates, (x, y), (targets, torch.ones(3).double()))
    method = SOURCE(segments, EKFAC("exact"), optimizer="sgd", momentum=momentum)
    scores, own = scored(method, run)
    time, eps = sum(rates) / (1 - momentum), 1e-2
    for i in range(0, N, 4):
        unit = eps * torch.eye(N).double()[i]
        ends = {k: descended(x, y, start, 1 + k * unit, time, momentum) for k in (-2, -1, 1, 2)}
        change = (8 * (ends[1] - ends[-1]) - (ends[2] - ends[-2])) / (12 * eps)
        size = 1e-6 * scores.abs().max().item()
        torch.testing.assert_close(scores[i], targets @ change, rtol=1e-6, atol=size)
        torch.testing.assert_close(own[i], x[i] @ change, rtol=1e-6, atol=size)


@pytest.mark.slow
def test_on_the_way_to_the_optimum_more_segments_come_nearer() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, P, generator=generator).double()
    y = x @ torch.randn(P, generator=generator).double() + torch.randn(N, generator=generator).double()
    targets = torch.randn(3, P, generator=generator).double()
    start, time, eps = torch.zeros(P).double(), 2.0, 1e-3
    expected = []
    for i in range(N):
        step = eps * torch.eye(N).double()[i]
        ends = [descended(x, y, start, 1 + sign * step, time, 0.0) for sign in (1, -1)]
        expected.append(targets @ (ends[0] - ends[1]) / (2 * eps))

    def error(count: int) -> float:
        modules = []
        for i in range(count):  # in the middle of the steps that each stands for
            modules.append(Line(P, 1, bias=False).double())
            modules[-1].weight.data[0] = descended(x, y, start, torch.ones(N).double(), time * (i + 0.5) / count, 0.0)
        rates = [time / count] * count
        # The last snapshot's output gradient is that of any other: the model is linear.
        run = run_of(modules, rates, (x, y), (targets, torch.ones(3).double()))
        return (scored(SOURCE(count, **PLAIN), run)[0] - torch.stack(expected)).norm().item()

    assert error(4) < error(1) / 8
    assert error(16) < error(4) / 8
    assert error(16) < 1e-2 * torch.stack(expected).norm()


# Against the definition -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solver", "curvature"),
    [("ekfac", "ggn"), pytest.param("kfac", "empirical_fisher", marks=pytest.mark.slow)],
)
def test_it_is_its_definition(solver: str, curvature: str) -> None:
    modules, train, targets = networks(4)
    rates = [0.5, 1.5, 2.0, 1.0]
    found = scored(SOURCE(2, solver, curvature, "sgd", 0.5, 0.1), run_of(modules, rates, train, targets))
    run = run_of(modules, rates, train, targets)
    method, expected, own = SOURCE(solver=solver).solver, 0, 0

    def output(module: Any, data: Batch) -> Tensor:
        return gradients(module, lambda b: module.model_output.output(*module.attribution_step(b)), data)

    q, q_own = output(modules[-1], targets), output(modules[-1], train)
    for segment in ([2, 3], [0, 1]):
        models = [run[i].model for i in segment]
        factors = fit_factors(method, models, curvature, 0).factors
        eigenvalues = {name: block.eigenvalues(method.method) for name, block in factors.blocks.items()}
        eye = torch.eye(43).double()
        h = in_eigenbasis(factors, eye, eigenvalues) + 0.1 * eye
        time = 2 * sum(rates[i] for i in segment)
        left = torch.matrix_exp(-time * h)
        response = torch.linalg.solve(h, eye - left)
        for i in segment:
            part = rates[i] / sum(rates[j] for j in segment)
            module = modules[i]
            g = gradients(module, lambda b, m=module: m.model_output.loss(*m.attribution_step(b)), train)
            expected = expected - part * g @ response @ q.T / len(g)
            own = own - part * (g * (q_own @ response)).sum(1) / len(g)
        q, q_own = q @ left, q_own @ left
    torch.testing.assert_close(found[0], expected)
    torch.testing.assert_close(found[1], own)


def test_the_curvature_of_a_segment_is_the_mean_over_its_snapshots() -> None:
    modules, train, targets = networks(3)
    models = [snapshot.model for snapshot in run_of(modules, [1.0] * 3, train, targets)]
    one = [fit_factors(EKFAC("exact"), [model], "ggn", 0).factors for model in models]
    joint = fit_factors(EKFAC("exact"), models, "ggn", 0).factors
    for name, block in joint.blocks.items():
        traces = [own.blocks[name].second_moments.sum() for own in one]
        torch.testing.assert_close(block.second_moments.sum(), torch.stack(traces).mean())

        def rows(factors: Any, name: str = name) -> Tensor:
            own = factors.blocks[name]
            return own.rows_basis @ torch.diag_embed(own.rows_eigenvalues) @ own.rows_basis.mT

        torch.testing.assert_close(rows(joint), torch.stack([rows(own) for own in one]).mean(0))
    again = fit_factors(EKFAC("exact"), [models[0], models[0]], "ggn", 0).factors
    for name, block in again.blocks.items():
        torch.testing.assert_close(block.second_moments, one[0].blocks[name].second_moments)


# At its limits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("differ", [False, True], ids=["one rate", "a rate a parameter"])
def test_in_a_short_time_it_is_tracin(differ: bool) -> None:
    (module,), train, targets = networks(1)
    (snapshot,) = run_of([module], [1e-8], train, targets)
    if differ:
        rates = {name: 1e-8 * (i + 0.5) for i, name in enumerate(snapshot.model.layout.shapes)}
        snapshot = replace(snapshot, rates=rates, learning_rate=snapshot.model.layout.mean(rates)[0])
    found, expected = scored(SOURCE(**PLAIN), [snapshot]), scored(TracIn(exact=True), [snapshot])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0)


@pytest.mark.parametrize("solver", ["ekfac", pytest.param("kfac", marks=pytest.mark.slow)])
def test_in_a_long_time_it_is_the_influence_function(solver: Any) -> None:
    (module,), train, targets = networks(1)
    (snapshot,) = run_of([module], [1e6], train, targets)
    found = scored(SOURCE(solver=solver, optimizer="sgd", momentum=0.5, weight_decay=0.05), [snapshot])
    expected = scored(Influence("ggn", solver, damping=0.0, weight_decay=0.05), [snapshot])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


# How it goes about it ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_neither_tiles_nor_batches_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    modules, train, targets = networks(3)
    rates = [0.5, 1.5, 2.0]
    run = run_of(modules, rates, train, targets)
    scores, own = scored(SOURCE(2, **PLAIN), run)
    tiles = [[replace(s, target_rows=rows) for s in run] for rows in (range(3), range(3, 4), range(0))]
    parts = [scored(SOURCE(2, **PLAIN), tile) for tile in tiles]
    torch.testing.assert_close(torch.cat([part[0] for part in parts], 1), scores)
    monkeypatch.setattr("lightning_attr.methods.source._TILE", 10 * 43 * 4)
    for size in (4, 24):
        again = scored(SOURCE(2, **PLAIN), run_of(modules, rates, train, targets, size))
        torch.testing.assert_close(again[0], scores)
        torch.testing.assert_close(again[1], own)


def test_merged_runs_are_averaged() -> None:
    modules, train, targets = networks(4)
    first, second = (run_of(modules[i : i + 2], [0.5, 1.0], train, targets) for i in (0, 2))
    expected = [scored(SOURCE(2, **PLAIN), run) for run in (first, second)]
    both = [replace(s, key=f"run{i}/{s.key}") for i, run in enumerate((first, second)) for s in run]
    found = scored(SOURCE(2, **PLAIN), both)
    for i in range(2):
        torch.testing.assert_close(found[i], (expected[0][i] + expected[1][i]) / 2)


@pytest.mark.slow
def test_factors_of_a_segment_are_kept_and_those_of_another_are_others(tmp_path: Path) -> None:
    modules, train, targets = networks(3)
    run = run_of(modules, [1.0] * 3, train, targets)
    for snapshot in run:
        object.__setattr__(snapshot.model, "folder", tmp_path / snapshot.key)
    scored(SOURCE(1, **PLAIN), run)
    (kept,) = tmp_path.rglob("*.safetensors")
    assert kept.parent.name == "epoch=2"
    stamp = kept.stat().st_mtime_ns
    scored(SOURCE(1, **PLAIN), [replace(s, cache=type(s.cache)()) for s in run])
    scored(SOURCE(1, **PLAIN), [replace(s, cache=type(s.cache)()) for s in run[1:]])
    assert kept.stat().st_mtime_ns == stamp
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2


def test_other_trainable_parameters_on_the_way_are_refused() -> None:
    modules, train, targets = networks(2)
    modules[0][0].bias.requires_grad_(False)
    with pytest.raises(AttributionError, match="they change between 'epoch=0' and 'epoch=1'"):
        scored(SOURCE(**PLAIN), run_of(modules, [1.0, 1.0], train, targets))


# What the store says of the optimizer -----------------------------------------------------------------------------


def fitted(path: Path, kind: Any = torch.optim.SGD, moments: bool = False, **settings: Any) -> Path:
    class Own(BlobClassifier):
        def configure_optimizers(self) -> Any:
            return kind(self.parameters(), lr=0.1, **settings)

    callback = AttributionCallback(path, snapshots=[0, 1], featurize=False, log=False, optimizer_state=moments)
    quiet_trainer(max_epochs=2, callbacks=[callback]).fit(Own(), loader_of(blobs(16)))
    return path


def blob_scores(path: Path, method: AttributionMethod) -> Any:
    settings = {"model": BlobClassifier(), "train_dataloaders": loader_of(blobs(16)), "store": path, "method": method}
    return quiet_trainer().attribute(target_dataloaders=loader_of(blobs(4, seed=1)), **settings).scores


def test_momentum_and_weight_decay_are_those_of_the_run(tmp_path: Path) -> None:
    path = fitted(tmp_path / "store", momentum=0.9, weight_decay=0.01)
    found = blob_scores(path, SOURCE())
    forced = blob_scores(path, SOURCE(optimizer="sgd", momentum=0.9, weight_decay=0.01))
    assert torch.equal(found.values, forced.values)
    evidence = found.provenance["evidence"]["epoch=0001-step=000004"]
    assert evidence["optimizer"] == "sgd"
    (settings,) = FeatureStore.open(path).manifest.training["optimizers"]
    assert settings["kind"] == "SGD"
    assert (settings["groups"][0]["momentum"], settings["groups"][0]["weight_decay"]) == (0.9, 0.01)


def test_adam_needs_its_moments(tmp_path: Path) -> None:
    path = fitted(tmp_path / "with", torch.optim.AdamW, moments=True)
    found = blob_scores(path, SOURCE())
    assert found.provenance["evidence"]["epoch=0001-step=000004"]["optimizer"] == "adam"
    assert torch.equal(found.values, blob_scores(path, SOURCE(optimizer="adam")).values)
    with pytest.raises(AttributionError, match=r"has no optimizer state.*AttributionCallback\(optimizer_state=True\)"):
        blob_scores(fitted(tmp_path / "without", torch.optim.AdamW), SOURCE())


def test_an_optimizer_without_a_form_is_named(tmp_path: Path) -> None:
    path = fitted(tmp_path / "store", torch.optim.RMSprop)
    with pytest.raises(AttributionError, match=r"a form for \(SGD, Adam, AdamW\), but .* trained by RMSprop"):
        blob_scores(path, SOURCE())
    blob_scores(path, SOURCE(optimizer="sgd"))


@pytest.mark.slow
def test_a_store_without_a_record_says_so(tmp_path: Path) -> None:
    path = fitted(tmp_path / "store", momentum=0.9)
    store = FeatureStore.open(path)
    training = {name: value for name, value in store.manifest.training.items() if name != "optimizers"}
    for damaged in (training, {**training, "optimizers": 3}, {**training, "optimizers": [3, {"groups": [[]]}]}):
        store._save(replace(store.manifest, training=damaged))
        with pytest.raises(AttributionError, match=r"no record of it.*SOURCE\(optimizer=\"sgd\", momentum=0.9\)"):
            blob_scores(path, SOURCE())
    with pytest.raises(AttributionError, match="Expected argument `momentum` of SOURCE"):
        blob_scores(path, SOURCE(optimizer="sgd"))
    blob_scores(path, SOURCE(optimizer="sgd", momentum=0.9))


def test_groups_of_parameters_have_their_own_settings() -> None:
    net = Network()
    groups = [{"params": net[0].parameters(), "momentum": 0.9}, {"params": net[2].parameters(), "lr": 0.3}]
    optimizer = torch.optim.SGD(groups, lr=torch.tensor(0.1), weight_decay=0.5)
    (found,) = optimizer_settings([optimizer], net)
    assert [group["parameters"] for group in found["groups"]] == [["0.weight", "0.bias"], ["2.weight", "2.bias"]]
    assert [group["momentum"] for group in found["groups"]] == [0.9, 0]
    assert found["groups"][0]["lr"] == pytest.approx(0.1)
    (snapshot,) = run_of([net.double()], [2.0], *network()[1:])
    auto = scored(SOURCE(solver=EKFAC("exact")), [replace(snapshot, optimizers=[found])])
    rates = {name: 20.0 if name.startswith("0") else 2.0 for name in snapshot.model.layout.shapes}
    told = replace(
        snapshot, rates=rates, learning_rate=snapshot.model.layout.mean(rates)[0], cache=type(snapshot.cache)()
    )
    forced = scored(SOURCE(optimizer="sgd", momentum=0.0, weight_decay=0.5, solver=EKFAC("exact")), [told])
    torch.testing.assert_close(auto[0], forced[0])


def test_nothing_recorded_has_no_time(tmp_path: Path) -> None:
    path = shutil.copytree(record(tmp_path / "one"), tmp_path / "two")
    store = FeatureStore.open(path)
    store._save(replace(store.manifest, snapshots=tuple(replace(s, learning_rate=0.0) for s in store.snapshots)))
    with pytest.raises(AttributionError, match=r"add up to 0\.0: nothing was recorded"):
        attributed(SOURCE(), path)


@pytest.mark.parametrize("segments", [0, 1.5, "two", [], [0.5, 0.5], [1.0], [0.6, 0.2], [float("nan")]])
def test_segments_that_are_none(segments: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="`segments"):
        SOURCE(segments)


def test_momentum_of_adam_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`momentum` of SOURCE only with `optimizer=\"sgd\"`"):
        SOURCE(optimizer="adam", momentum=0.9)
