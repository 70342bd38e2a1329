"""What TRAK() chooses where nobody did: how many features, and whether training computes them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from cases import BlobClassifier, blobs, loader_of, quiet_trainer
from lightning_attr import FeatureStore, attribute
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.methods import TRAK, GradDot, SnapshotFeatures
from lightning_attr.methods.choice import choice_of, choose_features, settled
from lightning_attr.projectors import KroneckerProjector

TARGETS = blobs(6, seed=1)


@pytest.mark.parametrize(
    ("n_train", "numel", "proj_dim", "late"),
    [
        (1437, 10_090, 1024, True),
        (1437, 17_226, 1024, True),
        (5000, 7_850, 1024, True),
        (5000, 109_386, 2048, True),
        (5000, 4_800_000, 2048, False),
        (100, 10**9, 512, False),  # no more than a few features per sample
        (40, 67, 256, True),
        (10**6, 17_226, 1024, False),
        (1, 0, 256, True),
    ],
)
def test_sizes_decide(n_train: int, numel: int, proj_dim: int, late: bool) -> None:
    choice = choose_features(n_train, numel)
    assert (choice.proj_dim, choice.late) == (proj_dim, late)
    assert f"{proj_dim:,} features for {numel:,} parameters and {n_train:,} training samples" in choice.reason


@pytest.mark.parametrize(
    "method", [TRAK(64), TRAK(projector=KroneckerProjector(64)), TRAK(exact=True), GradDot()], ids=str
)
def test_what_was_said_is_left_alone(method: Any) -> None:
    assert settled(method, 1437, 10_090) is method
    assert choice_of(method) is None
    assert "choice" not in method.config


def test_a_choice_is_made_once_and_leaves_the_method_as_it_was() -> None:
    method = TRAK(seed=3, damping=0.5)
    first = settled(method, 1437, 10_090)
    assert settled(first, 10**6, 10**9) is first
    assert (first.projector.proj_dim, first.projector.seed, first.config["damping"]) == (1024, 3, 0.5)  # type: ignore[union-attr]
    assert method.projector.proj_dim == 2048  # type: ignore[union-attr]
    assert "choice" not in method.config


def recorded(folder: Path, **settings: Any) -> tuple[Any, AttributionCallback]:
    logger = settings.pop("logger", False)
    callback = AttributionCallback(folder, **settings)
    trainer = quiet_trainer(max_epochs=3, callbacks=[callback], logger=logger)
    trainer.fit(BlobClassifier(), loader_of(blobs(20)))
    return trainer, callback


@pytest.mark.parametrize(
    ("settings", "computed"),
    [
        ({}, False),
        ({"featurize": True}, True),
        ({"featurize": False}, False),
        ({"method": TRAK(64)}, True),
        ({"method": GradDot()}, True),
        ({"method": TRAK(exact=True)}, False),
    ],
    ids=str,
)
def test_features_of_small_data_wait_until_they_are_wanted(
    settings: dict[str, Any], computed: bool, tmp_path: Path
) -> None:
    _, callback = recorded(tmp_path, **settings)
    store = FeatureStore.open(tmp_path)
    assert [not store.missing(snapshot.key) for snapshot in store.snapshots] == 3 * [computed]
    assert callback.featurize == computed


def test_scores_are_those_of_features_computed_while_training(tmp_path: Path) -> None:
    runs = [recorded(tmp_path / f"{featurize}", featurize=featurize)[0] for featurize in (None, True)]
    late, early = (trainer.attribute(target_dataloaders=loader_of(TARGETS)) for trainer in runs)
    torch.testing.assert_close(late.scores.values, early.scores.values, rtol=2e-3, atol=1e-4)
    assert not FeatureStore.open(tmp_path / "None").missing("epoch=0002-step=000009")  # and are kept now


def test_what_is_shown_while_training_is_computed_there(tmp_path: Path) -> None:
    _, callback = recorded(tmp_path / "store", logger=CSVLogger(tmp_path))
    assert callback.featurize
    assert callback.self_influence is not None
    _, silent = recorded(tmp_path / "silent", logger=CSVLogger(tmp_path), log=False)
    assert not silent.featurize


def test_other_methods_read_the_same_store(tmp_path: Path) -> None:
    recorded(tmp_path)
    loaders = {"train_dataloaders": loader_of(blobs(20)), "target_dataloaders": loader_of(TARGETS)}
    for method in (TRAK(exact=True), GradDot(exact=True), GradDot()):
        found = attribute(quiet_trainer(), model=BlobClassifier(), store=tmp_path, method=method, **loaders)
        assert found.scores.shape == (20, 6)


def test_the_choice_is_said_and_on_record(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        trainer, _ = recorded(tmp_path)
    said = "256 features for 67 parameters and 20 training samples, computed when they are wanted"
    assert f"TRAK takes {said}." in caplog.text
    result = trainer.attribute(target_dataloaders=loader_of(TARGETS))
    assert result.scores.provenance["choice"] == said


def test_a_run_that_is_resumed_chooses_the_same(tmp_path: Path) -> None:
    recorded(tmp_path)
    trainer, callback = recorded(tmp_path, featurize=True)  # the same run again
    assert callback.featurize
    assert len(trainer.attribute(target_dataloaders=loader_of(TARGETS)).scores.provenance["snapshots"]) == 3


def test_the_ridge_is_that_of_all_features_however_many_were_chosen() -> None:
    torch.manual_seed(0)
    train = {"features": torch.randn(300, 8), "out_to_loss": torch.rand(300), "newton_weight": torch.rand(300)}
    given = SnapshotFeatures.of(train, {"features": torch.randn(4, 8)})
    chosen = settled(TRAK(sampling=False), 300, 10_000)
    assert chosen.damping_at(given) == 8 / 2048  # type: ignore[attr-defined]
    (block,) = chosen.score([given])
    phi, weights = train["features"].double(), train["newton_weight"].double()
    kernel = phi.T @ (weights[:, None] * phi)
    ridge = kernel.trace() / 2048 * torch.eye(8).double()
    solved = torch.linalg.solve(kernel + ridge, given.targets["features"].T.double())
    expected = train["out_to_loss"][:, None] * (phi @ solved)
    torch.testing.assert_close(block.scores, expected.float(), rtol=1e-4, atol=1e-6)
    assert TRAK(8).damping_at(given) == 1.0
