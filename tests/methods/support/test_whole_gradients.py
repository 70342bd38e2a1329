"""Exact TracIn: what is multiplied as it comes equals what is stored whole, and gradients one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from cases import BlobClassifier, blobs, loader_of, quiet_trainer
from lightning_attr import AttributionMixin, FeatureStore, attribute
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.features.snapshot_model import SnapshotModel
from lightning_attr.methods import GAS, GradCos, GradDot, SnapshotFeatures, TracIn
from lightning_attr.methods.support.whole_gradients import exact_scores, exact_sum
from lightning_attr.projectors import IdentityProjector, KroneckerProjector

TRAIN, TARGETS = blobs(20), blobs(6, seed=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exact") / "run"
    trainer = quiet_trainer(max_epochs=3, callbacks=[AttributionCallback(folder, TracIn(exact=True))])
    trainer.fit(BlobClassifier(), loader_of(TRAIN, 10))
    return folder


def scored(run: Path, method: TracIn, tmp_path: Path, batch_size: int = 8, **settings: Any) -> Any:
    store = FeatureStore.merge([run], tmp_path / type(method).__name__ / f"{method.exact}")
    loaders = [loader_of(data, batch_size) for data in (TRAIN, TARGETS)]
    arguments = {"train_dataloaders": loaders[0], "target_dataloaders": loaders[1], "store": store.path}
    trainer = quiet_trainer(precision="64-true")
    return attribute(trainer, model=BlobClassifier(), method=method, **arguments, **settings)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (TracIn, {}),
        (TracIn, {"weights": "lr"}),
        (TracIn, {"weights": (1.0, -0.5, 2.0)}),
        (TracIn, {"normalize": "layer"}),
        (GAS, {}),
        (GAS, {"layerwise": True, "weights": "uniform"}),
        (GradDot, {}),
        (GradCos, {}),
    ],
    ids=str,
)
def test_it_equals_the_method_on_stored_whole_gradients(
    run: Path, tmp_path: Path, kind: Any, settings: dict[str, Any]
) -> None:
    exact, stored = (
        scored(run, kind(**arguments, **settings), tmp_path)
        for arguments in ({"exact": True}, {"projector": IdentityProjector()})
    )
    # What is stored is rounded to half precision.
    atol = 2e-3 * stored.scores.values.abs().max().item()
    torch.testing.assert_close(exact.scores.values, stored.scores.values, rtol=2e-3, atol=atol)
    torch.testing.assert_close(exact.self_influence, stored.self_influence, rtol=5e-3, atol=1e-6)


def test_the_callback_stores_weights_only(run: Path) -> None:
    store = FeatureStore.open(run)
    assert len(store.snapshots) == 3
    assert not any(snapshot.shards for snapshot in store.snapshots)


def test_only_the_best_are_kept_in_tiles_of_targets(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = scored(run, TracIn(exact=True), tmp_path / "whole")
    monkeypatch.setattr("lightning_attr.attribution.scoring._MOST_TARGETS", 4)
    best = scored(run, TracIn(exact=True), tmp_path / "best", topk=3)
    expected, rows = whole.scores.values.topk(3, 0)
    indices, values = best.scores.topk(3)
    torch.testing.assert_close(values, expected.T, rtol=1e-5, atol=1e-7)
    assert torch.equal(indices, rows.T)
    torch.testing.assert_close(best.self_influence, whole.self_influence)


def test_a_target_function_may_use_layers_in_other_ways(tmp_path: Path, run: Path) -> None:
    """The head is called twice for a target, so that its gradient is no outer product there."""

    def twice(module: Any, batch: Any) -> Tensor:
        return (module(batch[0]) + module(batch[0] / 2))[:, 0]

    exact, stored = (
        scored(run, method, tmp_path, target_function=twice)
        for method in (TracIn(exact=True), TracIn(IdentityProjector()))
    )
    atol = 2e-3 * stored.scores.values.abs().max().item()
    torch.testing.assert_close(exact.scores.values, stored.scores.values, rtol=2e-3, atol=atol)


class Noisy(AttributionMixin, L.LightningModule):
    """Its output is the mean over two draws of noise, whose gradient is a sum of two outer products."""

    attribution_draws = 2

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer = nn.Linear(4, 3)

    def attribution_batch(self, batch: Any, draw: Any) -> Any:
        return batch[0] + draw.normal(4).to(batch[0]), batch[1]

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_means_of_draws_are_kept_whole() -> None:
    results = [
        attribute(
            quiet_trainer(precision="64-true"),
            model=Noisy(),
            train_dataloaders=loader_of(TRAIN),
            target_dataloaders=loader_of(TARGETS),
            method=method,
        )
        for method in (GradDot(exact=True), GradDot(IdentityProjector()))
    ]
    torch.testing.assert_close(results[0].scores.values, results[1].scores.values, rtol=1e-5, atol=1e-7)


class Line(AttributionMixin, nn.Linear):
    """A linear classifier."""


def test_a_gradient_of_zeros_has_no_direction() -> None:
    line = Line(2, 2).double().eval()
    batch = (torch.tensor([[0.0, 0.0], [1.0, 2.0]]).double(), torch.tensor([0, 1]))
    line.bias.requires_grad_(False)
    model = SnapshotModel.of(line, [batch], [batch])
    (block,) = exact_scores(SnapshotFeatures.at(model, {}), normalize=True)
    torch.testing.assert_close(block.scores, torch.tensor([[0.0, 0.0], [0.0, 1.0]]).double())
    assert block.self_influence.tolist() == pytest.approx([0, 1])


def test_snapshots_add_up() -> None:
    batches = [(torch.randn(3, 2).double(), torch.tensor([0, 1, 1])) for _ in range(2)]
    found = [
        SnapshotFeatures.at(SnapshotModel.of(Line(2, 2).double().eval(), batches, batches[:1]), {}) for _ in range(2)
    ]
    single = [list(exact_scores(snapshot)) for snapshot in found]
    total = list(exact_sum(found, [2.0, -1.0]))
    assert [block.rows for block in total] == [range(3), range(3, 6)]
    for first, second, both in zip(*single, total, strict=True):
        torch.testing.assert_close(both.scores, 2 * first.scores - second.scores)
        torch.testing.assert_close(both.self_influence, 2 * first.self_influence - second.self_influence)


@pytest.mark.parametrize("arguments", [{"projector": KroneckerProjector()}, {"preconditioner": "adam"}], ids=list)
def test_what_would_be_ignored_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="`exact` to come without `projector` and `preconditioner`"):
        TracIn(**arguments, exact=True)
