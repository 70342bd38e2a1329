"""The whole Gauss-Newton kernel of TRAK: against dense algebra and autograd, on stored features and without."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import BlobClassifier, blobs, loader_of, quiet_trainer
from lightning_attr import AttributionMixin, FeatureStore, attribute
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.features.second_direction import SecondFeaturizer
from lightning_attr.features.snapshot_model import SnapshotModel
from lightning_attr.methods import TRAK, GradDot, SnapshotFeatures
from lightning_attr.methods.dual_gauss_newton import GaussNewtonKernel
from lightning_attr.outputs import LanguageModel, ModelOutput, NegativeLoss, Regression
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.projectors import EigenProjector, IdentityProjector

TRAIN, TARGETS = blobs(30), blobs(6, seed=1)
SIZE = ParameterLayout.of(BlobClassifier()).numel


class Classifier(AttributionMixin, nn.Module):
    """A batch is (inputs, labels)."""

    def __init__(self, output: ModelOutput | None = None) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4))
        if output is not None:
            self.model_output = output

    def attribution_step(self, batch: Any) -> tuple[Tensor, Tensor]:
        scores = self.network(batch[0])
        return (scores[:, None], batch[1][:, None]) if self.sequences else (scores, batch[1])

    @property
    def sequences(self) -> bool:
        return isinstance(self.model_output, LanguageModel)


def model_of(output: ModelOutput | None = None, n: int = 12) -> SnapshotModel:
    torch.manual_seed(0)
    module = Classifier(output).double().eval()
    train = [(torch.randn(n // 2, 4).double(), torch.randint(4, (n // 2,))) for _ in range(2)]
    targets = [(torch.randn(5, 4).double(), torch.randint(4, (5,)))]
    return SnapshotModel.of(module, train, targets)


def gauss_newton(model: SnapshotModel) -> Tensor:
    """The sum of J' H J over the samples, one after the other, by autograd."""
    module: Any = model.module
    params = {name: p.detach() for name, p in module.named_parameters()}
    total = torch.zeros(model.layout.numel, model.layout.numel).double()
    for _, (x, _) in model.train_batches():
        for one in x:

            def scores(params: Any, one: Tensor = one) -> Any:
                return torch.func.functional_call(module.network, {k[8:]: p for k, p in params.items()}, one)

            parts = torch.func.jacrev(scores)(params)
            jacobian = torch.cat([parts[name].flatten(1) for name in params], 1)
            p = scores(params).softmax(0)
            total += jacobian.T @ (p.diag() - p[:, None] * p) @ jacobian
    return total


@pytest.mark.parametrize("output", [None, LanguageModel(shift=False)], ids=["rest", "whole"])
def test_the_mean_over_many_draws_is_the_gauss_newton_matrix(output: ModelOutput | None) -> None:
    model, draws = model_of(output), 150
    identity = IdentityProjector().bind(model.layout, "final")
    found = torch.zeros(model.layout.numel, model.layout.numel).double()
    for _, rows in model.second_directions(identity, draws):
        flat = rows.flatten(0, 1)
        found += flat.T @ flat
    if output is None:
        for _, columns in model.train(identity):
            found += columns["features"].T @ (columns["newton_weight"][:, None] * columns["features"])
    expected = gauss_newton(model)
    assert (found - expected).norm() < 0.15 * expected.norm()
    x = torch.randn(model.layout.numel).double()
    assert (x @ found @ x).item() == pytest.approx((x @ expected @ x).item(), rel=0.2)


@pytest.mark.parametrize("directions", [1, 3])
@pytest.mark.parametrize("output", [None, LanguageModel(shift=False)], ids=["rest", "whole"])
def test_terms_and_leverages_are_those_of_dense_algebra(output: ModelOutput | None, directions: int) -> None:
    model = model_of(output)
    snapshot = SnapshotFeatures.at(model, {})
    identity = IdentityProjector().bind(model.layout, "final")
    columns = [columns for _, columns in model.train(identity)]
    phi, w = (torch.cat([part[name] for part in columns]) for name in ("features", "newton_weight"))
    second = torch.cat([rows for _, rows in model.second_directions(identity, directions)]).flatten(0, 1)
    rows = second if output is not None else torch.cat([second, w.sqrt()[:, None] * phi])
    targets = model.targets(identity, range(5))["features"]
    inverse = torch.linalg.inv(rows.T @ rows + 0.3 * torch.eye(model.layout.numel).double())
    kernel = GaussNewtonKernel(snapshot, directions, whole=output is not None)
    solved = kernel.solve(snapshot, ridge=0.3)
    torch.testing.assert_close(kernel.kernel.diagonal().sum(), rows.square().sum())
    torch.testing.assert_close(solved.terms, phi @ inverse @ targets.T, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(solved.leverage, (phi @ inverse @ phi.T).diagonal(), rtol=1e-7, atol=1e-10)


def test_directions_of_some_of_the_samples_stand_for_all() -> None:
    model = model_of()
    identity = IdentityProjector().bind(model.layout, "final")
    batch, everything = next(iter(model.train_batches()))[1], list(range(6))

    def rows(share: float, snapshot: str = "final", places: Any = everything) -> Tensor:
        part = (batch[0][places], batch[1][places])
        return SecondFeaturizer(model.module, model.plan, identity, None, snapshot, 1, share)(part, places)

    whole, half = rows(1.0), rows(0.5)
    chosen = half.flatten(1).any(1)
    assert 0 < chosen.sum() < 6
    torch.testing.assert_close(half[chosen], whole[chosen] * 2**0.5)
    torch.testing.assert_close(rows(0.5, places=[4, 2]), half[[4, 2]])
    counts = torch.stack([rows(0.5, f"{i}").flatten(1).any(1) for i in range(200)]).double().mean(0)
    assert ((counts - 0.5).abs() < 0.15).all()


# Stores -----------------------------------------------------------------------------------------------------------


def fitted(folder: Path, method: Any, module: Any = None, **settings: Any) -> Any:
    callback = AttributionCallback(folder, method, log=False, **settings)
    trainer = quiet_trainer(max_epochs=3, callbacks=[callback])
    trainer.fit(module or BlobClassifier(), loader_of(TRAIN, 10))
    return trainer


def scored(trainer: Any, method: Any = None) -> Any:
    return trainer.attribute(method=method, target_dataloaders=loader_of(TARGETS))


def kernels(result: Any) -> list[str]:
    return [found["kernel"] for found in result.scores.provenance["evidence"].values()]


def test_a_run_stores_second_directions_and_goes_on_with_what_it_stored(tmp_path: Path) -> None:
    trainer = fitted(tmp_path / "run", TRAK(SIZE, IdentityProjector()))
    store = FeatureStore.open(tmp_path / "run")
    assert {(snapshot.directions, snapshot.curvature) for snapshot in store.snapshots} == {(1, "rest")}
    key = store.snapshots[1].key
    assert store.shard(key, 0)["second_features"].shape == (30, 1, SIZE)
    first = scored(trainer)
    assert kernels(first) == ["ggn"] * len(store.snapshots)
    path = store._shard_path(key, 0)
    content = path.read_bytes()
    path.write_bytes(content[:-9])
    assert FeatureStore.open(tmp_path / "run").repair() == [path]
    again = scored(trainer, TRAK(SIZE, IdentityProjector(), directions=3))  # of new snapshots
    assert path.read_bytes() == content
    assert torch.equal(again.scores.values, first.scores.values)
    margin = scored(trainer, TRAK(SIZE, IdentityProjector(), kernel="margin"))
    assert kernels(margin) == ["margin"] * len(store.snapshots)
    assert not torch.allclose(margin.scores.values, first.scores.values, rtol=1e-2)


def test_stores_of_both_kinds_are_scored_by_the_kernels_they_have(tmp_path: Path) -> None:
    projector = IdentityProjector()
    trainer = fitted(tmp_path / "old", GradDot(projector))
    fitted(tmp_path / "new", TRAK(projector=projector))
    old = scored(trainer, TRAK(projector=projector))
    assert set(kernels(old)) == {"margin"}
    torch.testing.assert_close(
        old.scores.values, scored(trainer, TRAK(projector=projector, kernel="margin")).scores.values
    )
    with pytest.raises(ValueError, match=r'second directions for `kernel="ggn"`, but those of snapshot .* without'):
        scored(trainer, TRAK(projector=projector, kernel="ggn"))
    merged = FeatureStore.merge([tmp_path / "old", tmp_path / "new"], tmp_path / "merged")
    result = attribute(
        quiet_trainer(),
        model=BlobClassifier(),
        train_dataloaders=loader_of(TRAIN),
        target_dataloaders=loader_of(TARGETS),
        store=merged.path,
        method=TRAK(projector=projector),
    )
    assert sorted(set(kernels(result))) == ["ggn", "margin"]


def test_features_of_few_dimensions_have_directions_of_some_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_attr.features.second_direction._ROWS_A_FEATURE", 1)
    trainer = fitted(tmp_path / "run", TRAK(projector=EigenProjector(8)))
    store = FeatureStore.open(tmp_path / "run")
    for snapshot in store.snapshots:
        rows = store.shard(snapshot.key, 0)["second_features"].flatten(1).any(1)
        assert 0 < rows.sum() < 20  # 8 of 30 on average
        assert len(store._stored(snapshot.key, 0)["second_features"]) == rows.sum()
    assert set(kernels(scored(trainer))) == {"ggn"}


# What has no second direction ---------------------------------------------------------------------------------------


class Loss(BlobClassifier):
    model_output = NegativeLoss(partial(nn.functional.cross_entropy, reduction="none"))


def test_an_output_without_a_second_direction_is_scored_as_before_or_refused(tmp_path: Path) -> None:
    result = scored(fitted(tmp_path / "run", TRAK(8), Loss()))
    assert set(kernels(result)) == {"margin"}
    assert all(snapshot.directions is None for snapshot in FeatureStore.open(tmp_path / "run").snapshots)
    message = r'Expected a model output with a second direction for `kernel="ggn"`, but .* Use `kernel="auto"`'
    with pytest.raises(ValueError, match=message):
        fitted(tmp_path / "refused", TRAK(8, kernel="ggn"), Loss())
    with pytest.raises(ValueError, match=message):
        list(TRAK(exact=True, kernel="ggn").score([SnapshotFeatures.at(model_of(Loss.model_output), {})]))


def test_one_output_has_the_whole_kernel_without_directions() -> None:
    class Line(AttributionMixin, nn.Linear):
        model_output = Regression()

    model = SnapshotModel.of(Line(2, 1), [(torch.randn(6, 2), torch.randn(6))], [(torch.ones(1, 2), torch.ones(1))])
    snapshot = SnapshotFeatures.at(model, {})
    list(TRAK(exact=True, kernel="ggn").score([snapshot]))
    assert snapshot.evidence["kernel"] == "ggn"


@pytest.mark.parametrize("settings", [{"newton_weights": False}, {"loo_correction": True}], ids=str)
def test_kernels_that_have_one_row_a_sample_are_told_apart(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r'`kernel` of TRAK not to be "ggn" with `newton_weights=False`'):
        TRAK(kernel="ggn", **settings)
    assert TRAK(**settings).second_directions("rest") == 0
    with pytest.raises(ValueError, match=r"Expected argument `kernel` of TRAK to be 'auto', 'ggn' or 'margin'"):
        TRAK(kernel="gauss")
