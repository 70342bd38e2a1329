"""TracIn and GAS against loops over samples and snapshots, finite differences, dattri and captum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cases import BlobClassifier, blobs, loader_of, quiet_trainer
from lightning_attr import AttributionMixin, FeatureStore, attribute
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.errors import AttributionError
from lightning_attr.features.featurizer import Featurizer, plan
from lightning_attr.interop import dattri_task
from lightning_attr.methods import GAS, GradCos, GradDot, SnapshotFeatures, TracIn
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.parameters.weights import load_weights
from lightning_attr.projectors import IdentityProjector, KroneckerProjector, LayerSubset, RademacherProjector

N, M, K = 7, 4, 5
RATES = [0.3, 0.1]
TRAIN, TARGETS = blobs(20), blobs(6, seed=1)


def columns(rows: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "features": torch.randn(rows, K, generator=generator).double(),
        "out_to_loss": torch.randn(rows, generator=generator).double(),
    }


def snapshots(rates: list[float] = RATES, keys: tuple[str, ...] = ("a", "b"), **more: Any) -> list[SnapshotFeatures]:
    return [
        SnapshotFeatures(
            lambda c=c: iter([(range(N), columns(N, c))]), columns(M, c + 5), rate, n_train=N, key=key, **more
        )
        for c, (rate, key) in enumerate(zip(rates, keys, strict=True))
    ]


def scored(method: TracIn, found: list[SnapshotFeatures]) -> tuple[Tensor, Tensor]:
    (block,) = method.score(found)
    assert block.rows == range(N)
    return block.scores, block.self_influence


def looped(omegas: list[float], similarity: Any) -> tuple[Tensor, Tensor]:
    """One sample, one target, one snapshot at a time: minus the sum of w * (loss gradient . output gradient)."""
    scores, self_influence = torch.zeros(N, M).double(), torch.zeros(N).double()
    for c, omega in enumerate(omegas):
        train, targets = columns(N, c), columns(M, c + 5)
        for i in range(N):
            loss_gradient = -train["out_to_loss"][i] * train["features"][i]
            self_influence[i] -= omega * similarity(loss_gradient, train["features"][i])
            for j in range(M):
                scores[i, j] -= omega * similarity(loss_gradient, targets["features"][j])
    return scores, self_influence


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_similarity(a, b, dim=0)


def layer_cosine(a: Tensor, b: Tensor) -> Tensor:
    return (cosine(a[:2], b[:2]) + cosine(a[2:], b[2:])) / 2


@pytest.mark.parametrize(
    ("method", "omegas", "similarity"),
    [
        (TracIn(), [0.3 / N, 0.1 / N], torch.dot),
        (TracIn(weights="lr"), [0.3, 0.1], torch.dot),
        (TracIn(weights="uniform"), [1.0, 1.0], torch.dot),
        (TracIn(weights=(2, 0.5)), [2.0, 0.5], torch.dot),
        (TracIn(normalize=True), [0.3 / N, 0.1 / N], cosine),
        (GAS(), [0.3 / N, 0.1 / N], cosine),
        (GAS(weights="uniform", layerwise=True), [1.0, 1.0], layer_cosine),
        (GradDot(), [0.0, 1.0], torch.dot),  # T-TR-1: the last snapshot with a weight of one
        (GradCos(), [0.0, 1.0], cosine),
    ],
    ids=lambda value: value.config["method"] if isinstance(value, TracIn) else None,
)
def test_matches_a_loop(method: TracIn, omegas: list[float], similarity: Any) -> None:
    found = scored(method, snapshots(layers={"one": slice(0, 2), "two": slice(2, 5)}))
    for own, expected in zip(found, looped(omegas, similarity), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-14)


def test_float32_stays_float32() -> None:
    train = {"features": torch.randn(3, 2), "out_to_loss": torch.randn(3)}
    (block,) = TracIn().score([SnapshotFeatures.of(train, train)])
    assert block.scores.dtype == block.self_influence.dtype == torch.float32


@pytest.mark.parametrize("layerwise", [False, True])
def test_gas_does_not_see_the_size_of_gradients(layerwise: bool) -> None:
    """T-TR-6; layer by layer not even that of one layer."""
    layers = {"one": slice(0, 2), "two": slice(2, 5)}
    train, targets = columns(N, 0), columns(M, 1)
    big = {**train, "features": train["features"] * torch.rand(N, 1).double() * 100}
    if layerwise:
        big["features"][:, :2] *= 1000
    pair = [
        SnapshotFeatures(lambda own=own: iter([(range(N), own)]), targets, n_train=N, layers=layers)
        for own in (train, big)
    ]
    (a, _), (b, _) = (scored(GAS(layerwise=layerwise), [snapshot]) for snapshot in pair)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_a_layer_without_gradient_is_zero_not_nan() -> None:
    train, targets = columns(N, 0), columns(M, 1)
    train["features"][2, :2] = 0
    train["features"][3] = 0
    layers = {"one": slice(0, 2), "two": slice(2, 5)}
    snapshot = SnapshotFeatures(lambda: iter([(range(N), train)]), targets, n_train=N, layers=layers)
    scores, _ = scored(GAS(layerwise=True), [snapshot])
    assert scores.isfinite().all()
    assert not scores[3].any()
    assert scores[2].any()


def test_merged_runs_are_averaged() -> None:
    runs = snapshots(keys=("run0/a", "run1/a"))
    single = [scored(TracIn(), [run])[0] for run in runs]
    torch.testing.assert_close(scored(TracIn(), runs)[0], (single[0] + single[1]) / 2)


@pytest.mark.parametrize(
    ("rates", "keys", "named"),
    [([0.0, 0.0], ("a", "b"), "a, b"), ([0.1, 0.0], ("run0/a", "run1/a"), "run1/a"), ([float("nan"), 1], "ab", "a, b")],
)
@pytest.mark.parametrize("method", [TracIn(), TracIn(weights="lr"), GAS()])
def test_snapshots_without_learning_rates_are_refused(method: TracIn, rates: Any, keys: Any, named: str) -> None:
    message = rf"The learning rates of the snapshots {named} add up to .* Fit with AttributionCallback .*\"uniform\""
    with pytest.raises(AttributionError, match=message):
        scored(method, snapshots(rates, tuple(keys)))


def test_a_single_snapshot_may_have_none() -> None:
    """A schedule that starts at zero."""
    scores = scored(TracIn(), snapshots([0.0, 0.1]))[0]
    torch.testing.assert_close(scores, scored(TracIn(), snapshots([0.1, 0.1])[1:])[0])


def test_other_bad_input() -> None:
    with pytest.raises(
        ValueError,
        match=r"`weights` of .+ 'lr', 'uniform' or a list of one finite number.*, but got 'adam'",
    ):
        TracIn(weights="adam")
    with pytest.raises(ValueError, match=r"`weights.1.` of TracIn to be a finite number, but got nan"):
        TracIn(weights=[1.0, float("nan")])
    with pytest.raises(ValueError, match=r"`preconditioner` of .+ to be 'adam' or None, but got 'sgd'"):
        TracIn(preconditioner="sgd")
    with pytest.raises(ValueError, match=r"`normalize` of .+ to be True, False or 'layer', but got 'snapshot'"):
        TracIn(normalize="snapshot")
    with pytest.raises(ValueError, match="one number for each of the 2 snapshots, but got 3"):
        scored(TracIn(weights=[1, 2, 3]), snapshots())
    with pytest.raises(ValueError, match="Expected snapshots with `n_train`"):
        scored(TracIn(), [SnapshotFeatures(lambda: iter([(range(N), columns(N, 0))]), columns(M, 1))])
    with pytest.raises(ValueError, match="keep the layers apart to normalize each, but RademacherProjector mixes"):
        scored(GAS(RademacherProjector(), layerwise=True), snapshots())


def test_the_scale_is_on_record() -> None:
    methods = [TracIn(), TracIn(preconditioner="adam")]
    assert {method.config["scale"] for method in methods} == {"measurement"}
    ranks = [TracIn(weights="lr"), TracIn(weights=[1.0]), TracIn(normalize=True), GAS(), GradDot(), GradCos()]
    assert {method.config["scale"] for method in ranks} == {"rank_only"}


def test_features_in_adams_metric_are_others() -> None:
    plain = TracIn(IdentityProjector()).projector_config
    assert TracIn(IdentityProjector(), preconditioner="adam").projector_config == {
        "kind": "adam_preconditioned",
        "projector": plain,
    }


# Against training ---------------------------------------------------------------------------------------------------


class Classifier(AttributionMixin, nn.Linear):
    """The smallest, in float64."""


def one_step(rate: float, learned: bool) -> tuple[Tensor, Tensor]:
    """Derivatives of the outputs after one full-batch SGD step in the data weights, and TracIn's scores.

    With ``learned`` the target gradients are those after the step, where the first order is exact.
    """
    torch.manual_seed(2)
    module = Classifier(3, 4).double().eval()
    x, y = torch.randn(N, 3).double(), torch.randint(4, (N,))
    targets = torch.randn(M, 3).double(), torch.randint(4, (M,))
    start = {name: p.detach().clone() for name, p in module.named_parameters()}

    def stepped(weights: Tensor) -> dict[str, Tensor]:
        params = {name: p.clone().requires_grad_() for name, p in start.items()}
        loss = (weights * module.functional_loss(params, {}, (x, y))).mean()
        gradients = torch.autograd.grad(loss, list(params.values()))
        return {name: (p - rate * g).detach() for (name, p), g in zip(params.items(), gradients, strict=True)}

    derivatives = torch.zeros(N, M).double()
    for i in range(N):
        ahead, behind = torch.ones(N).double(), torch.ones(N).double()
        ahead[i], behind[i] = 1 + 1e-4, 1 - 1e-4
        outputs = [module.functional_output(stepped(weights), {}, targets) for weights in (ahead, behind)]
        derivatives[i] = (outputs[0] - outputs[1]) / 2e-4
    projection = IdentityProjector().bind(ParameterLayout.of(module), "")
    featurize = Featurizer(module, plan(module, (x, y), N), projection)
    train = featurize((x, y), range(N))
    load_weights(module, stepped(torch.ones(N).double()) if learned else start)
    snapshot = SnapshotFeatures(
        lambda: iter([(range(N), train)]), featurize(targets, range(M)), learning_rate=rate, n_train=N
    )
    return derivatives, scored(TracIn(), [snapshot])[0]


def test_one_full_batch_step_is_exact() -> None:
    """T-TR-4."""
    derivatives, scores = one_step(0.5, learned=True)
    torch.testing.assert_close(scores, derivatives, rtol=1e-6, atol=1e-8)


def test_with_targets_before_the_step_the_error_is_of_second_order() -> None:
    errors = []
    for rate in (0.02, 0.01):
        derivatives, scores = one_step(rate, learned=False)
        assert (scores - derivatives).norm() < 0.1 * derivatives.norm()
        errors.append((scores - derivatives).norm().item())
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)


# Against others, at the snapshots of a run --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "store"
    callback = AttributionCallback(folder, TracIn(), [0, 1, 3], featurize=False)
    trainer = quiet_trainer(L.Trainer, max_epochs=4, callbacks=[callback])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trainer.fit(BlobClassifier(), loader_of(TRAIN, shuffle=True))
    return folder


def scores_of(run: Path, method: TracIn, tmp_path: Path, **settings: Any) -> Tensor:
    """Exact, at the weights of the run, in float32."""
    store = FeatureStore.merge([run], tmp_path / "copy")  # with features of its own
    module = BlobClassifier()
    arguments = {"train_dataloaders": loader_of(TRAIN), "target_dataloaders": loader_of(TARGETS)}
    result = attribute(
        quiet_trainer(precision="64-true"), model=module, method=method, store=store.path, **arguments, **settings
    )
    return result.scores.values


def own_gradients(run: Path, key: str, data: Any, loss: bool) -> Tensor:
    module = BlobClassifier().eval()
    load_weights(module, FeatureStore.open(run).weights(key))
    module.double()
    rows = []
    for x, y in data:
        batch = (x[None].double(), y[None])
        value = module.functional_loss({}, {}, batch) if loss else module.functional_output({}, {}, batch)
        gradients = torch.autograd.grad(value.sum(), list(module.parameters()))
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(rows)


@pytest.mark.parametrize("projector", [IdentityProjector(), KroneckerProjector(10_000)])
def test_a_run_matches_gradients_one_by_one(run: Path, tmp_path: Path, projector: Any) -> None:
    """T-TR-3: without projection, and with one that keeps everything."""
    expected = torch.zeros(len(TRAIN), len(TARGETS)).double()
    stored = FeatureStore.open(run).snapshots
    assert [s.learning_rate for s in stored] == pytest.approx([0.3, 0.3, 0.6])
    for snapshot in stored:
        losses, outputs = (own_gradients(run, snapshot.key, data, data is TRAIN) for data in (TRAIN, TARGETS))
        expected -= snapshot.learning_rate / len(TRAIN) * losses @ outputs.T
    torch.testing.assert_close(scores_of(run, TracIn(projector), tmp_path), expected.float(), rtol=1e-4, atol=1e-6)


def test_a_subset_of_layers_matches_gradients_one_by_one(run: Path, tmp_path: Path) -> None:
    method = TracIn(LayerSubset(IdentityProjector(), ["network.2"]), weights="uniform")
    expected = torch.zeros(len(TRAIN), len(TARGETS)).double()
    for snapshot in FeatureStore.open(run).snapshots:
        losses, outputs = (own_gradients(run, snapshot.key, data, data is TRAIN)[:, -27:] for data in (TRAIN, TARGETS))
        expected -= losses @ outputs.T
    torch.testing.assert_close(scores_of(run, method, tmp_path), expected.float(), rtol=1e-4, atol=1e-6)


def test_projected_scores_are_near_the_exact_ones(run: Path, tmp_path: Path) -> None:
    exact = scores_of(run, TracIn(IdentityProjector()), tmp_path / "exact")
    near = scores_of(run, TracIn(KroneckerProjector(60)), tmp_path / "near")
    assert torch.corrcoef(torch.stack([exact.flatten(), near.flatten()]))[0, 1] > 0.8


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("normalized", [False, True])
def test_dattri_agrees(run: Path, tmp_path: Path, normalized: bool) -> None:
    algorithm = pytest.importorskip("dattri.algorithm.tracin")
    task = dattri_task(run, BlobClassifier().double())
    weights = [s.learning_rate / len(TRAIN) for s in FeatureStore.open(run).snapshots]
    attributor = algorithm.TracInAttributor(task, torch.tensor(weights), normalized_grad=normalized)
    attributor.projector_kwargs = None
    loaders = [loader_of([(x.double(), y) for x, y in data]) for data in (TRAIN, TARGETS)]
    theirs = -attributor.attribute(*loaders)
    ours = scores_of(run, (GAS if normalized else TracIn)(IdentityProjector()), tmp_path)
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


def negative_loss(module: Any, batch: Any) -> Tensor:
    return -F.cross_entropy(module(batch[0]), batch[1], reduction="none")


@pytest.mark.filterwarnings("ignore")
def test_captum_agrees(run: Path, tmp_path: Path) -> None:
    influence = pytest.importorskip("captum.influence")
    store = FeatureStore.open(run)

    def load(module: Any, key: str) -> float:
        load_weights(module, store.weights(key))
        return store.snapshot(key).learning_rate / len(TRAIN)

    tracin = influence.TracInCP(
        BlobClassifier().double(),
        [(x.double(), y) for x, y in TRAIN],
        [s.key for s in store.snapshots],
        checkpoints_load_func=load,
        loss_fn=nn.CrossEntropyLoss(reduction="none"),
        batch_size=5,
    )
    x, y = TARGETS.tensors
    theirs = tracin.influence((x.double(), y)).T  # (n, m)
    ours = scores_of(run, TracIn(IdentityProjector()), tmp_path, target_function=negative_loss)
    torch.testing.assert_close(ours, theirs.detach().float(), rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


def test_current_weights_have_no_learning_rate() -> None:
    arguments = {"train_dataloaders": loader_of(TRAIN), "target_dataloaders": loader_of(TARGETS)}
    with pytest.raises(AttributionError, match=r"The learning rates of the snapshots current add up to 0\.0"):
        attribute(quiet_trainer(), model=BlobClassifier(), method=TracIn(), **arguments)
    result = attribute(quiet_trainer(), model=BlobClassifier(), method=TracIn(weights="uniform"), **arguments)
    assert result.scores.values.any()
