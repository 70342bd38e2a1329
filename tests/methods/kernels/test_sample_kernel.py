"""TRAK by the kernel of training samples: the same as by the kernel of whole gradients, and dense algebra."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from truths import truth_of

from cases import BlobClassifier, blobs, loader_of, quiet_trainer
from lightning_attr import AttributionMixin, FeatureStore, attribute
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.features.snapshot_model import SnapshotModel
from lightning_attr.methods import TRAK, SnapshotFeatures
from lightning_attr.methods.kernels.sample_kernel import DualKernel
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.projectors import IdentityProjector, KroneckerProjector

TRAIN, TARGETS = blobs(30), blobs(6, seed=1)
SIZE = ParameterLayout.of(BlobClassifier()).numel


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dual") / "run"
    trainer = quiet_trainer(max_epochs=3, callbacks=[AttributionCallback(folder, TRAK(exact=True))])
    trainer.fit(BlobClassifier(), loader_of(TRAIN, 10))
    return folder


def scored(run: Path, method: TRAK, tmp_path: Path, **settings: Any) -> Any:
    store = FeatureStore.merge([run], tmp_path / f"{len(list(tmp_path.iterdir()))}")
    loaders = [loader_of(data) for data in (TRAIN, TARGETS)]
    arguments = {"train_dataloaders": loaders[0], "target_dataloaders": loaders[1], "store": store.path}
    trainer = quiet_trainer(precision="64-true")
    return attribute(trainer, model=BlobClassifier(), method=method, **arguments, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel": "margin"},
        {"damping": 0.1, "kernel": "margin"},
        {"newton_weights": False},
        {},
        {"directions": 2},
        {"loo_correction": True},
        {"balanced": False},
    ],
    ids=str,
)
def test_it_is_trak_without_a_projection(run: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    exact = scored(run, TRAK(proj_dim=SIZE, exact=True, **settings), tmp_path)
    stored = scored(run, TRAK(projector=IdentityProjector(), **settings), tmp_path)
    # What is stored is rounded to half precision.
    atol = 5e-3 * stored.scores.values.abs().max().item()
    torch.testing.assert_close(exact.scores.values, stored.scores.values, rtol=5e-3, atol=atol)
    torch.testing.assert_close(exact.self_influence, stored.self_influence, rtol=1e-2, atol=1e-6)
    dimensions = [
        [found.get("effective_dimension") for found in result.scores.provenance["evidence"].values()]
        for result in (exact, stored)
    ]
    if dimensions[0][0] is not None:  # the whole Gauss-Newton kernel of samples has none
        assert dimensions[0] == pytest.approx(dimensions[1], rel=1e-3)


class Classifier(AttributionMixin, nn.Module):
    """A batch is (inputs, labels)."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    def attribution_step(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self.network(batch[0]), batch[1]


def snapshot_of(n: int = 12) -> SnapshotFeatures:
    torch.manual_seed(0)
    module = Classifier().double().eval()
    train = [(torch.randn(n // 2, 4).double(), torch.randint(3, (n // 2,))) for _ in range(2)]
    targets = [(torch.randn(5, 4).double(), torch.randint(3, (5,)))]
    return SnapshotFeatures.at(SnapshotModel.of(module, train, targets), {})


@pytest.mark.parametrize("weighted", [True, False])
def test_terms_and_leverages_are_those_of_dense_algebra(weighted: bool) -> None:
    snapshot = snapshot_of()
    model = snapshot.model
    assert model is not None
    identity = IdentityProjector().bind(model.layout, "final")
    parts = [columns for _, columns in model.train(identity)]
    gradients = torch.cat([columns["features"] for columns in parts])
    weights = torch.cat([columns["newton_weight"] for columns in parts]) if weighted else torch.ones(12).double()
    targets = model.targets(identity, range(5))["features"]
    matrix = gradients.T @ (weights[:, None] * gradients) + 0.3 * torch.eye(model.layout.numel).double()
    solved = DualKernel(snapshot, weighted).solve(snapshot, ridge=0.3)
    expected = gradients @ torch.linalg.solve(matrix, gradients.T)
    torch.testing.assert_close(solved.terms, gradients @ torch.linalg.solve(matrix, targets.T), rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(solved.leverage, expected.diagonal(), rtol=1e-8, atol=1e-12)
    assert solved.dimension == pytest.approx((expected.diagonal() * weights).sum().item(), rel=1e-8)


def test_samples_without_weight_are_scored_too() -> None:
    """A sample that is fitted perfectly has no part in the kernel, but a gradient all the same."""
    snapshot = snapshot_of()
    kernel = DualKernel(snapshot, weighted=True)
    weights = kernel.columns["newton_weight"].clone()
    weights[3] = 0
    roots = weights.clamp(min=1e-8 * weights.mean().item()).sqrt()
    kernel.kernel = kernel.factors.products(kernel.features, kernel.features) * roots * roots[:, None]
    kernel.roots = roots
    solved = kernel.solve(snapshot, ridge=0.3)
    model = snapshot.model
    assert model is not None
    identity = IdentityProjector().bind(model.layout, "final")
    gradients = torch.cat([columns["features"] for _, columns in model.train(identity)])
    targets = model.targets(identity, range(5))["features"]
    matrix = gradients.T @ (weights[:, None] * gradients) + 0.3 * torch.eye(model.layout.numel).double()
    expected = gradients @ torch.linalg.solve(matrix, targets.T)
    torch.testing.assert_close(solved.terms, expected, rtol=1e-6, atol=1e-8)


def test_targets_in_tiles_and_the_best_alone(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = scored(run, TRAK(exact=True), tmp_path)
    monkeypatch.setattr("lightning_attr.attribution.scoring._MOST_TARGETS", 4)
    best = scored(run, TRAK(exact=True), tmp_path, topk=3)
    expected, rows = whole.scores.values.topk(3, 0)
    indices, values = best.scores.topk(3)
    torch.testing.assert_close(values, expected.T, rtol=1e-5, atol=1e-7)
    assert torch.equal(indices, rows.T)
    torch.testing.assert_close(best.self_influence, whole.self_influence)


def test_a_kernel_is_kept_for_the_next_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = snapshot_of()
    assert DualKernel.at(snapshot, True) is DualKernel.at(snapshot, True)
    assert DualKernel.at(snapshot, True) is not DualKernel.at(snapshot, False)
    monkeypatch.setattr("lightning_attr.methods.kernels.sample_kernel._KEPT_ROWS", 4)
    snapshot = snapshot_of()
    assert DualKernel.at(snapshot, True) is not DualKernel.at(snapshot, True)


def test_damping_is_chosen(run: Path, tmp_path: Path) -> None:
    truth = truth_of(torch.randn(len(TRAIN), len(TARGETS), generator=torch.Generator().manual_seed(0)))
    result = scored(run, TRAK(exact=True, damping="auto", truth=truth), tmp_path)
    for found in result.scores.provenance["evidence"].values():
        assert found["damping_choice"]["damping"] in found["damping_choice"]["grid"]


def test_a_singular_kernel_is_refused() -> None:
    snapshot = snapshot_of(80)  # more samples than parameters
    with pytest.raises(ValueError, match=r"The kernel of 80 training samples is singular.*Raise the damping"):
        list(TRAK(exact=True, damping=0.0).score([snapshot]))


def test_what_does_not_fit_into_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 4 * 8 * 12**2 + 8 * 12 * (4 + 5 + 5 + 3)
    monkeypatch.setattr("lightning_attr.methods.kernels.sample_kernel.free_bytes", lambda device: needed)
    DualKernel(snapshot_of(), weighted=True)
    monkeypatch.setattr("lightning_attr.methods.kernels.sample_kernel.free_bytes", lambda device: needed - 1)
    message = r"the gradients of all 12 training samples for `exact=True`, about 0\.0 GB, but .* Leave `exact` out"
    with pytest.raises(ValueError, match=message):
        DualKernel(snapshot_of(), weighted=True)


def test_a_kernel_that_is_not_finite_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = snapshot_of()
    monkeypatch.setattr(
        "lightning_attr.projectors.GradientFactors.products", lambda *_: torch.full((12, 12), torch.inf)
    )
    with pytest.raises(ValueError, match=r"Expected a finite kernel, but the inner products .* training that diverged"):
        DualKernel(snapshot, weighted=True)


@pytest.mark.parametrize("arguments", [{"projector": KroneckerProjector()}, {"per_layer": True}], ids=list)
def test_what_does_not_go_together_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"`exact` to come without `projector`, .* and without `per_layer`"):
        TRAK(**arguments, exact=True)
