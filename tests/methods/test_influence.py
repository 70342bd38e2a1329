"""Influence functions against refits, and against their definition with every matrix written out."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from influence_cases import (
    Batch,
    Line,
    Logistic,
    M,
    N,
    P,
    dense_curvature,
    expected_scores,
    gradients,
    network,
    scored,
    shares,
    snapshot,
)
from torch import Tensor

from cases import BlobClassifier, blobs, loader_of, quiet_trainer
from lightning_attr.errors import DivergenceError, NegativeCurvatureError, UnsupportedLayerError
from lightning_attr.methods import (
    EKFAC,
    KFAC,
    TRAK,
    Arnoldi,
    ConjugateGradient,
    DataInf,
    Explicit,
    Influence,
    LiSSA,
    SnapshotFeatures,
)
from lightning_attr.outputs import NegativeLoss
from lightning_attr.projectors import IdentityProjector

EXACT = [Explicit(), ConjugateGradient(200, 1e-12), Arnoldi(300, 300)]
NAMES = ["explicit", "cg", "arnoldi"]


# Against training again -------------------------------------------------------------------------------------------


def ridge_problem(logistic: bool) -> tuple[Any, Batch, Batch, Any]:
    """A module at its optimum, and a function that fits it with other weights of the samples."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, P, generator=generator).double()
    y = x @ torch.randn(P, generator=generator).double() + torch.randn(N, generator=generator).double()
    targets = torch.randn(M, P, generator=generator).double()
    decay = 0.05

    def fit(weights: Tensor) -> Tensor:
        eye = N * decay * torch.eye(P).double()
        if not logistic:
            return torch.linalg.solve(x.T @ (weights[:, None] * x) + eye, x.T @ (weights * y))
        theta = torch.zeros(P).double()
        for _ in range(50):
            p = (x @ theta).sigmoid()
            slope = x.T @ (weights * (p - labels)) + N * decay * theta
            theta = theta - torch.linalg.solve(x.T @ ((weights * p * (1 - p))[:, None] * x) + eye, slope)
        return theta

    labels = (y > 0).double()
    module = (Logistic if logistic else Line)(P, 1, bias=False).double()
    module.weight.data[0] = fit(torch.ones(N).double())
    own = labels if logistic else y
    return module, (x, own), (targets, torch.ones(M).double()), fit


@pytest.mark.parametrize("logistic", [False, True], ids=["regression", "logistic"])
@pytest.mark.parametrize("solver", EXACT, ids=NAMES)
@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_scores_are_the_derivative_of_training_again(logistic: bool, solver: Any, curvature: str) -> None:
    module, train, targets, fit = ridge_problem(logistic)
    method = Influence(curvature, solver, damping=0.0, weight_decay=0.05)
    scores, self_influence = scored(method, snapshot(module, train, targets))
    eps = 1e-4
    for i in range(0, N, 5):
        step = eps * torch.eye(N).double()[i]
        change = (fit(1 + step) - fit(1 - step)) / (2 * eps)
        torch.testing.assert_close(scores[i], targets[0] @ change, rtol=1e-6, atol=1e-8)
        sign = 2 * train[1][i] - 1 if logistic else 1
        torch.testing.assert_close(self_influence[i], sign * train[0][i] @ change, rtol=1e-6, atol=1e-8)


def test_newton_weights_and_a_ridge_are_influence_functions() -> None:
    module, train, targets, _ = ridge_problem(logistic=True)
    features = snapshot(module, train, targets)
    expected, own = scored(Influence(solver="explicit", damping=0.0, weight_decay=0.05), features)
    identity = IdentityProjector().bind(features.model.layout, "final")
    columns = [part for _, part in features.model.train(identity)]
    train_columns = {name: torch.cat([part[name] for part in columns]) for name in columns[0]}
    kernel = train_columns["features"].T @ (train_columns["features"] * train_columns["newton_weight"][:, None])
    method = TRAK(projector=IdentityProjector(), damping=(N * 0.05 / kernel.diagonal().mean()).item())
    stored = SnapshotFeatures.of(train_columns, features.model.targets(identity, range(M)))
    found, self_influence = scored(method, stored)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(self_influence, own)


# Against the definition -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", ["ggn", "hessian", "empirical_fisher"])
@pytest.mark.parametrize("solver", [*EXACT, LiSSA(iterations=60)], ids=[*NAMES, "lissa"])
def test_solvers_agree_with_the_dense_inverse(curvature: str, solver: Any) -> None:
    module, train, targets = network()
    decay = 3.0 if curvature == "hessian" else 0.1  # an untrained network is at no minimum
    damping = 30.0 if isinstance(solver, LiSSA) else 3.0
    expected = expected_scores(module, train, targets, dense_curvature(module, curvature, train), damping, decay)
    method = Influence(curvature, solver, damping=damping, weight_decay=decay)
    found = scored(method, snapshot(module, train, targets, batch_size=13))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_datainf_is_the_mean_of_inverses_layer_by_layer() -> None:
    module, train, targets = network()
    scores, self_influence = scored(Influence(solver="datainf", damping=0.5), snapshot(module, train, targets))
    losses = gradients(module, lambda b: module.model_output.loss(*module.attribution_step(b)), train)
    outputs = [
        gradients(module, lambda b: module.model_output.output(*module.attribution_step(b)), data)
        for data in (targets, train)
    ]
    found = []
    for u in outputs:
        total = torch.zeros(N, len(u)).double()
        for layer in (slice(0, 25), slice(25, 43)):
            g, ridge = losses[:, layer], 0.5 * losses[:, layer].square().mean()
            inverses = [torch.linalg.inv(torch.outer(row, row) + ridge * torch.eye(len(row)).double()) for row in g]
            total -= g @ torch.stack(inverses).mean(0) @ u[:, layer].T / N
        found.append(total)
    torch.testing.assert_close(scores, found[0])
    torch.testing.assert_close(self_influence, found[1].diagonal())


def test_kfac_of_one_linear_layer_with_all_labels_is_the_ggn() -> None:
    module, train, targets, _ = ridge_problem(logistic=False)
    features = snapshot(module, train, targets)
    expected = scored(Influence(solver="explicit", damping=0.3), features)
    for solver in (KFAC("exact"), EKFAC("exact")):
        for a, b in zip(
            scored(Influence(solver=solver, damping=0.3), snapshot(module, train, targets)), expected, strict=True
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("relative", ["theta", "loss"])
@pytest.mark.parametrize("solver", [Explicit(), Arnoldi(300, 300), ConjugateGradient(200, 1e-12)], ids=["e", "a", "cg"])
def test_relatif_divides_by_the_change_of_the_model(relative: str, solver: Any) -> None:
    module, train, targets = network()
    curvature = dense_curvature(module, "ggn", train)
    scores, own = expected_scores(module, train, targets, curvature, 3.0)
    g = gradients(module, lambda b: module.model_output.loss(*module.attribution_step(b)), train)
    damped = curvature + 3.0 * curvature.trace() / 43 * torch.eye(43).double()
    change = torch.linalg.solve(damped, g.T).T / N
    divisor = change.norm(dim=1) if relative == "theta" else (g * change).sum(1).sqrt()
    method = Influence(solver=solver, damping=3.0, relative=relative)
    found = scored(method, snapshot(module, train, targets))
    torch.testing.assert_close(found[0], scores / divisor[:, None])
    torch.testing.assert_close(found[1], own / divisor)
    assert method.config["scale"] == "rank_only"


@pytest.mark.parametrize("relative", [None, "theta", "loss"])
def test_ekfac_forms_are_those_of_the_solved_gradients(relative: str | None) -> None:
    module, train, _ = network()
    method = Influence(solver=EKFAC("exact"), relative=relative)
    scores, self_influence = scored(method, snapshot(module, train, train))
    torch.testing.assert_close(scores.diagonal(), self_influence)


@pytest.mark.parametrize("solver", ["explicit", "cg", "ekfac", "kfac", "datainf", "arnoldi"])
@pytest.mark.parametrize("batch_size", [1, N])
def test_batches_do_not_matter(solver: str, batch_size: int) -> None:
    module, train, targets = network()
    expected = scored(Influence(solver=solver), snapshot(module, train, targets))
    for a, b in zip(
        scored(Influence(solver=solver), snapshot(module, train, targets, batch_size)), expected, strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "solver", ["explicit", "cg", "ekfac", "datainf", "arnoldi", LiSSA(iterations=10, batch_size=8)]
)
def test_two_processes_are_one(solver: Any) -> None:
    module, train, targets = network()
    method = Influence(solver=solver, damping=2.0)
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
    assert [block.rows.start for block in blocks[1]] == [4, 8, 20]  # each scores its own
    for block in blocks[0] + blocks[1]:
        torch.testing.assert_close(block.scores, expected[0][block.rows.start : block.rows.stop])
        torch.testing.assert_close(block.self_influence, expected[1][block.rows.start : block.rows.stop])


def test_targets_come_in_tiles_and_the_curvature_is_prepared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module, train, targets = network()
    features = snapshot(module, train, targets)
    method, calls = Influence(solver="explicit"), []
    prepare = Explicit.prepare
    monkeypatch.setattr(Explicit, "prepare", lambda *given: calls.append(1) or prepare(*given))
    scores, own = scored(method, features)
    parts = [scored(method, replace(features, target_rows=rows)) for rows in (range(3), range(3, M), range(0))]
    torch.testing.assert_close(torch.cat([part[0] for part in parts], 1), scores)
    assert all(torch.equal(part[1], own) for part in parts)
    assert len(calls) == 1


def test_dtype_of_scores() -> None:
    for dtype in (torch.float32, torch.float64):
        scores, own = scored(Influence(), snapshot(*network(dtype)))
        assert scores.dtype == own.dtype == dtype


# Settings that cost ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("solver", "what"), [(EKFAC("sampled"), "kronecker"), ("explicit", "curvature")])
def test_factors_are_kept_and_computed_anew_for_other_settings(solver: Any, what: str, tmp_path: Path) -> None:
    module, train, targets = network()

    def run(**settings: Any) -> Tensor:
        return scored(Influence(solver=solver, **settings), snapshot(module, train, targets, folder=tmp_path))[0]

    expected = run()
    (path,) = tmp_path.iterdir()
    assert path.name.startswith(what)
    stamp = path.stat().st_mtime_ns
    assert torch.equal(run(), expected)
    assert path.stat().st_mtime_ns == stamp
    assert not torch.allclose(run(damping=5.0), expected)
    assert len(list(tmp_path.iterdir())) == 1  # they serve every damping
    run(curvature="empirical_fisher")
    assert len(list(tmp_path.iterdir())) == 2
    run(seed=1)
    assert len(list(tmp_path.iterdir())) == (2 if solver == "explicit" else 3)


def test_a_preconditioner_saves_iterations_and_changes_nothing() -> None:
    module, train, targets = network()
    found = []
    for preconditioner in (None, EKFAC("exact")):
        features = snapshot(module, train, targets)
        solver = ConjugateGradient(200, 1e-10, preconditioner)
        found.append((scored(Influence(solver=solver, damping=0.01), features)[0], features.evidence["iterations"]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=1e-9)
    assert found[1][1] < found[0][1]


def test_self_influence_may_be_approximated() -> None:
    module, train, targets = network()
    method = Influence(solver=ConjugateGradient(200, 1e-10), damping=0.1, self_influence="ekfac")
    scores, own = scored(method, snapshot(module, train, targets))
    exact = scored(Influence(solver="explicit", damping=0.1), snapshot(module, train, targets))
    torch.testing.assert_close(scores, exact[0], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(own, scored(Influence(damping=0.1), snapshot(module, train, targets))[1])
    assert not torch.allclose(own, exact[1])


def test_evidence() -> None:
    module, train, targets = network()
    features = snapshot(module, train, targets)
    scored(Influence(), features)
    assert features.evidence == {"parameters_covered": 1.0, "labels": "exact"}
    features = snapshot(module, train, targets)
    scored(Influence(solver="cg"), features)
    assert features.evidence["residual"] <= 1e-5
    assert features.evidence["iterations"] > 1
    trace = dense_curvature(module, "ggn", train).trace().item()
    assert features.evidence["damping"] == pytest.approx(10 * trace / 43)
    assert Influence(solver=ConjugateGradient(7, preconditioner=KFAC())).config == {
        "method": "Influence", "scale": "measurement", "curvature": "ggn", "damping": 10.0, "weight_decay": 0.0,
        "relative": None, "snapshots": "last", "seed": 0, "self_influence": "exact", "projector": None, "solver": "cg",
        "max_iterations": 7, "tolerance": 1e-5, "preconditioner": {"solver": "kfac", "labels": "auto"},
    }  # fmt: skip


# Groups ----------------------------------------------------------------------------------------------------------


def test_the_first_order_of_a_group_is_the_sum_and_the_whole_series_is_training_without_it() -> None:
    module, train, targets, fit = ridge_problem(logistic=False)
    method, groups = Influence(solver="explicit", damping=0.0, weight_decay=0.05), [[0, 7, 8], [23]]
    features = snapshot(module, train, targets)
    scores, _ = scored(method, features)
    first = method.score_groups(features, groups)
    torch.testing.assert_close(first, torch.stack([scores[group].sum(0) for group in groups]))
    for row, group in enumerate(groups):
        weights = torch.ones(N).double()
        weights[group] = 0
        change = targets[0] @ (fit(torch.ones(N).double()) - fit(weights))
        second = method.score_groups(features, groups, order=2)[row]
        assert (second - change).norm() < 0.7 * (first[row] - change).norm()
        torch.testing.assert_close(method.score_groups(features, groups, order=80)[row], change)


def test_groups_of_rows_that_are_not_there() -> None:
    features = snapshot(*network())
    for group in ([N], [-1], [2, 2]):
        with pytest.raises(IndexError, match=f"`groups` to hold different rows from 0 to {N - 1}"):
            Influence().score_groups(features, [group])
    with pytest.raises(ValueError, match="Expected `relative=None` for groups"):
        Influence(relative="loss").score_groups(features, [[1]])


# Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"solver": "lu"},
            "`solver` of Influence to be 'ekfac', .* or a Solver such as .*, but got 'lu'",
        ),
        ({"curvature": "fisher"}, "`curvature` of .+ to be 'ggn', 'hessian' or 'empirical_fisher', but got 'fisher'"),
        ({"curvature": "hessian"}, "`curvature` of .+ to be 'ggn' or 'empirical_fisher' for the solver 'ekfac'"),
        (
            {"curvature": "ggn", "solver": "datainf"},
            "`curvature` of .+ 'empirical_fisher' for the solver 'datainf'",
        ),
        ({"relative": "all"}, "`relative` of .+ to be 'theta', 'loss' or None, but got 'all'"),
        ({"self_influence": "no"}, "`self_influence` of .+ to be 'exact' or 'ekfac', but got 'no'"),
        ({"weight_decay": -1.0}, "`weight_decay` of .+ to be a finite number >= 0, but got -1.0"),
        ({"damping": -1.0}, "`damping` of .+ to be a finite number >= 0, or 'auto', but got -1.0"),
        ({"damping": "auto"}, '`truth` with `damping="auto"`'),
    ],
)
def test_bad_arguments(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Influence(**settings)


def test_bad_solver_settings() -> None:
    with pytest.raises(ValueError, match=r"`labels` of EKFAC .+ 'mixed' or 'sampled', but got 'observed'"):
        EKFAC("observed")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`batch_size` of LiSSA to be an integer >= 1, or None, but got 0"):
        LiSSA(batch_size=0)
    with pytest.raises(ValueError, match=r"`rank` of .+ to be an integer >= 1, but got 0"):
        Arnoldi(rank=0)


@pytest.mark.parametrize("solver", ["explicit", "cg", "kfac", "ekfac", "datainf"])
def test_a_singular_curvature_without_damping(solver: str) -> None:
    module, train, targets = network()
    train[0][:, 2] = 0  # a pixel that is always black
    with pytest.raises((ValueError, NegativeCurvatureError), match=r"[Rr]aise the damping|`damping` to be positive"):
        scored(Influence(solver=solver, damping=0.0), snapshot(module, train, targets))


def test_a_singular_curvature_without_damping_where_a_solver_drops_or_never_reaches_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    module, train, targets = network()
    train[0][:, 2] = 0
    scores, own = scored(Influence(solver="arnoldi", damping=0.0), snapshot(module, train, targets))
    assert scores.isfinite().all()
    assert own.isfinite().all()
    assert "A system is not solved" not in caplog.text
    method = Influence(solver=LiSSA(iterations=20), damping=0.0, self_influence="ekfac")
    features = snapshot(module, train, targets)
    solved = method._solved_targets(features)
    assert solved.isfinite().all()
    assert "A system is not solved" in caplog.text


def test_negative_curvature() -> None:
    module, train, targets = network()
    for parameter in module.parameters():
        parameter.data.mul_(6)
    assert torch.linalg.eigvalsh(dense_curvature(module, "hessian", train)).min() < -1e-4
    with pytest.raises(NegativeCurvatureError, match=r"Take the GGN.* or raise the damping"):
        scored(Influence("hessian", "cg", damping=0.0), snapshot(module, train, targets))


def test_a_hessian_without_positive_eigenvalues(monkeypatch: pytest.MonkeyPatch) -> None:
    module, train, targets, _ = ridge_problem(logistic=False)
    monkeypatch.setattr(Line, "model_output", NegativeLoss(lambda out, y: -out.squeeze(1).square()))
    features = snapshot(module, train, targets)
    with pytest.raises(NegativeCurvatureError, match=r"None of the .* eigenvalues that were found is positive"):
        scored(Influence("hessian", "arnoldi", damping=0.0), features)
    with pytest.raises(NegativeCurvatureError, match="mean eigenvalue of the Hessian is negative"):
        scored(Influence("hessian", "cg"), snapshot(module, train, targets))


def test_lissa_that_diverges() -> None:
    with pytest.raises(DivergenceError, match="Raise `scale`"):
        scored(Influence(solver=LiSSA(scale=1e-3)), snapshot(*network()))


def test_systems_that_are_not_solved_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    scored(Influence(solver=ConjugateGradient(1), damping=0.01), snapshot(*network()))
    scored(Influence(solver=LiSSA(iterations=2), damping=0.01), snapshot(*network()))
    for remedy in ("max_iterations", "iterations"):
        assert f"Raise `{remedy}` or the damping" in caplog.text


def test_kronecker_factors_of_a_module_without_linear_layers() -> None:
    module = Line(1, 1, bias=False).double()
    norm = torch.nn.LayerNorm(3).double()

    class Normed(Line):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.norm = norm

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x).square().sum(1, keepdim=True)

    x = torch.randn(6, 3).double()
    with pytest.raises(UnsupportedLayerError, match="Normed has no layer with Kronecker factors"):
        scored(Influence(), snapshot(Normed(), (x, x[:, 0]), (x, x[:, 0])))
    assert module.weight.shape == (1, 1)


def test_too_many_parameters_for_the_matrix() -> None:
    with pytest.raises(ValueError, match="at most 40 parameters for the explicit solver, but the module has 43"):
        scored(Influence(solver=Explicit(max_parameters=40)), snapshot(*network()))


def test_a_layer_without_gradients_has_no_influence_by_datainf() -> None:
    module, train, targets = network()
    module[2].weight.data.zero_()  # nothing reaches the first layer
    scores, _ = scored(Influence(solver=DataInf()), snapshot(module, train, targets))
    assert scores.isfinite().all()
    assert scores.any()


@pytest.mark.parametrize("solver", ["explicit", "cg", "arnoldi", "ekfac"])
def test_a_function_of_the_targets_takes_the_place_of_their_output(solver: str) -> None:
    module = BlobClassifier().double().eval()
    x, y = blobs(N).tensors
    shown, labels = blobs(M, seed=1).tensors
    train, targets = (x.double(), y), (shown.double(), labels)

    def difference(module: Any, batch: Any) -> Tensor:
        """Of two logits, whatever the label."""
        logits: Tensor = module(batch[0])
        return logits[:, 0] - logits[:, 1]

    settings = {"explicit": Explicit(), "cg": ConjugateGradient(500, 1e-12), "arnoldi": Arnoldi(200, 200)}
    result, plain = (
        quiet_trainer().attribute(
            model=module,
            method=Influence(solver=settings.get(solver, solver), damping=0.1),
            train_dataloaders=loader_of(list(zip(*train, strict=True))),
            target_dataloaders=loader_of(list(zip(*targets, strict=True))),
            **more,
        )
        for more in ({"target_function": difference}, {})
    )
    assert not torch.allclose(result.scores.values, plain.scores.values, rtol=0.1)
    torch.testing.assert_close(result.self_influence, plain.self_influence)  # of the training samples' own outputs
    if solver == "ekfac":
        return
    curvature = dense_curvature(module, "ggn", train)
    p = len(curvature)
    damped = curvature + 0.1 * curvature.trace() / p * torch.eye(p).double()
    losses = gradients(module, lambda b: module.model_output.loss(*module.attribution_step(b)), train)
    measured = gradients(module, lambda b: difference(module, b), targets)
    expected = -losses @ torch.linalg.solve(damped, measured.T) / N
    torch.testing.assert_close(result.scores.values.double(), expected, rtol=1e-4, atol=1e-6)
