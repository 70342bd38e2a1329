"""Projections that are learned at a snapshot: kept in the store, the same for all who read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import BlobClassifier, Tally, blobs, loader_of, quiet_trainer
from lightning_attr import FeatureStore, attribute
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.errors import CorruptedStoreError, StoreMismatchError
from lightning_attr.features.learned_projection import load_projection
from lightning_attr.methods import LESS, TRAK, DropoutEnsemble, GradCos, GradDot, SoftThreshold
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.projectors import (
    EigenProjector,
    IdentityProjector,
    KroneckerProjector,
    LayerSubset,
    LearnedProjection,
)
from lightning_attr.projectors.eigen import EigenProjection

TRAIN, TARGETS = loader_of(blobs(40), shuffle=True), loader_of(blobs(9, seed=1))


class AdamClassifier(BlobClassifier):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def fitted(folder: Path, method: Any, kind: type[BlobClassifier] = BlobClassifier, **settings: Any) -> Any:
    callback = AttributionCallback(folder, method=method, feature_dtype="float32", **settings)
    trainer = quiet_trainer(max_epochs=3, callbacks=[callback])
    torch.manual_seed(0)
    trainer.fit(kind(), TRAIN)
    return trainer


def scores(trainer: Any, **settings: Any) -> Tensor:
    return trainer.attribute(target_dataloaders=TARGETS, **settings).scores.values


def test_with_room_for_all_coordinates_scores_are_those_of_whole_gradients(tmp_path: Path) -> None:
    eigen = scores(fitted(tmp_path / "eigen", GradDot(EigenProjector(1000))))
    whole = scores(fitted(tmp_path / "whole", GradDot(IdentityProjector())))
    torch.testing.assert_close(eigen, whole, rtol=1e-4, atol=1e-4)


def test_training_is_untouched(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = BlobClassifier()
    trainer = quiet_trainer(max_epochs=3)
    trainer.fit(plain, TRAIN)
    state = torch.get_rng_state()
    watched = fitted(tmp_path, TRAK(projector=EigenProjector(12)))
    assert torch.equal(torch.get_rng_state(), state)
    for own, other in zip(watched.lightning_module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(own, other)


def test_the_best_coordinates_beat_random_ones(tmp_path: Path) -> None:
    projectors = {"eigen": EigenProjector(20), "random": KroneckerProjector(20), "all": IdentityProjector()}
    found = {
        name: scores(fitted(tmp_path / name, TRAK(projector=projector))).flatten()
        for name, projector in projectors.items()
    }
    agreement = {name: torch.corrcoef(torch.stack([found[name], found["all"]]))[0, 1] for name in ("eigen", "random")}
    assert agreement["eigen"] > agreement["random"] + 0.05


@pytest.mark.parametrize("per_layer", [False, True])
def test_another_process_reads_what_was_learned(tmp_path: Path, per_layer: bool) -> None:
    trainer = fitted(tmp_path, TRAK(projector=EigenProjector(12), per_layer=per_layer))
    own = scores(trainer)
    store = FeatureStore.open(tmp_path)
    assert all(snapshot.basis is not None for snapshot in store.snapshots)
    again = attribute(
        quiet_trainer(),
        model=BlobClassifier(seed=5),
        train_dataloaders=TRAIN,
        target_dataloaders=TARGETS,
        store=tmp_path,
        method=TRAK(projector=EigenProjector(12), per_layer=per_layer),
    )
    torch.testing.assert_close(again.scores.values, own)


def test_attribute_learns_where_only_weights_are_stored(tmp_path: Path) -> None:
    beside = scores(fitted(tmp_path / "beside", TRAK(projector=EigenProjector(12))))
    later = fitted(tmp_path / "later", TRAK(projector=EigenProjector(12)), featurize=False)
    torch.testing.assert_close(scores(later), beside, rtol=1e-4, atol=1e-5)


def test_chosen_layers_alone(tmp_path: Path) -> None:
    trainer = fitted(tmp_path, GradDot(LayerSubset(EigenProjector(1000), ["network.2"])))
    whole = fitted(tmp_path / "whole", GradDot(LayerSubset(IdentityProjector(), ["network.2"])))
    torch.testing.assert_close(scores(trainer), scores(whole), rtol=1e-4, atol=1e-4)


def test_a_basis_that_is_gone_or_of_another_snapshot(tmp_path: Path) -> None:
    trainer = fitted(tmp_path, TRAK(projector=EigenProjector(12)))
    first, second = (tmp_path / s.folder / "basis.safetensors" for s in FeatureStore.open(tmp_path).snapshots[:2])
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    with pytest.raises((CorruptedStoreError, StoreMismatchError), match=r"basis\.safetensors"):
        scores(trainer)
    first.unlink()
    with pytest.raises(CorruptedStoreError, match=r"basis\.safetensors.*missing"):
        scores(trainer)
    first.write_bytes(kept)
    assert scores(trainer).isfinite().all()


@pytest.mark.parametrize("change", [lambda t: t.flatten(), lambda t: t[:0], lambda t: t * torch.nan])
def test_a_basis_that_makes_no_sense_is_told_with_its_place(tmp_path: Path, change: Any) -> None:
    fitted(tmp_path, TRAK(projector=EigenProjector(12)))
    store = FeatureStore.open(tmp_path)
    key = store.snapshots[0].key
    basis = store.basis(key)
    assert basis is not None
    name = next(name for name in basis if name != "chosen")
    store.add_basis(key, {**basis, name: change(basis[name])})
    projection = EigenProjector(12).bind(ParameterLayout.of(BlobClassifier()), key)
    with pytest.raises(CorruptedStoreError, match=rf"{key}/basis\.safetensors is no basis .*set_aside\(\['{key}'\]\)"):
        load_projection(projection, store, key)


def test_the_default_learns_and_gives_way_where_it_cannot(tmp_path: Path) -> None:
    assert TRAK(12).projector_config == EigenProjector(12).config
    trainer = fitted(tmp_path, TRAK(12))
    assert all(snapshot.basis is not None for snapshot in FeatureStore.open(tmp_path).snapshots)
    assert scores(trainer).isfinite().all()
    assert DropoutEnsemble(TRAK(12, seed=3)).method.projector_config == KroneckerProjector(12, seed=3).config


def test_runs_are_merged_with_what_they_learned(tmp_path: Path) -> None:
    trainers = [fitted(tmp_path / str(run), TRAK(12)) for run in range(2)]
    own = sum(scores(trainer, method=TRAK(12, balanced=False)) for trainer in trainers) / 2
    FeatureStore.merge([tmp_path / "0", tmp_path / "1"], tmp_path / "merged")
    merged = scores(trainers[1], store=tmp_path / "merged", method=TRAK(12, balanced=False))
    torch.testing.assert_close(merged, own)


def test_a_module_is_set_up_once_a_snapshot(tmp_path: Path) -> None:
    noted = Tally()

    class Bank(BlobClassifier):
        def attribution_setup(self, samples: Any, snapshot: str) -> None:
            noted.append(snapshot)

    fitted(tmp_path / "store", TRAK(12), kind=Bank)
    keys = [key for key in noted if key]
    assert len(keys) == len(set(keys)) == len(FeatureStore.open(tmp_path / "store").snapshots)


def test_a_rehearsal_is_of_the_form_of_what_is_learned() -> None:
    layout = ParameterLayout({"a.weight": (30, 20), "a.bias": (30,), "b.weight": (5, 30)})
    learned, rehearsed = (EigenProjector(40).bind(layout, "final") for _ in range(2))
    assert isinstance(rehearsed, LearnedProjection)
    rehearsed.rehearse()
    learned.load(rehearsed.basis)
    assert set(rehearsed.layers) == {"a", "b"}
    gradients = {name: torch.randn(3, *shape) for name, shape in layout.shapes.items()}
    features = torch.zeros(3, rehearsed.dim)
    with rehearsed.filling(features) as add:
        add(gradients)
    assert features.any(0).all()


def test_the_start_learns_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learned: list[int] = []
    learn = EigenProjection.learn
    monkeypatch.setattr(EigenProjection, "learn", lambda self, run: (learned.append(1), learn(self, run)))
    fitted(tmp_path, TRAK(projector=EigenProjector(12)), snapshots=[2], featurize=True)
    assert len(learned) == 1  # at the snapshot


@pytest.mark.parametrize("first", [GradCos(), SoftThreshold(GradCos(), keep=3), None], ids=["plain", "wrapped", "own"])
def test_methods_without_a_projector_of_their_own_read_what_there_is(tmp_path: Path, first: Any) -> None:
    trainer = fitted(tmp_path, None)
    scores(trainer, method=first)
    cosines = scores(trainer, method=GradCos())
    torch.testing.assert_close(cosines, scores(trainer, method=GradCos(EigenProjector(256))))
    torch.testing.assert_close(scores(trainer), scores(trainer, method=TRAK()))
    with pytest.raises(StoreMismatchError, match="give the method the store's projection, or no projector"):
        scores(trainer, method=GradCos(KroneckerProjector(64)))


@pytest.mark.parametrize("n", [1, 3])
def test_fewer_samples_than_features_lose_nothing(tmp_path: Path, n: int) -> None:
    """All directions of the training gradients are kept, which is all that inner products with them see."""
    train = loader_of(blobs(n))
    found = []
    for name, projector in (("eigen", EigenProjector(20)), ("whole", IdentityProjector())):
        callback = AttributionCallback(tmp_path / name, method=GradDot(projector), feature_dtype="float32")
        trainer = quiet_trainer(max_epochs=2, callbacks=[callback])
        torch.manual_seed(0)
        trainer.fit(BlobClassifier(), train)
        found.append(scores(trainer))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_methods_that_change_gradients_before_refuse(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="directions of an optimizer that learns nothing"):
        fitted(tmp_path, LESS(EigenProjector(12)), kind=AdamClassifier)
    with pytest.raises(ValueError, match="DropoutEnsemble that learns nothing"):
        attribute(
            quiet_trainer(),
            model=BlobClassifier(),
            train_dataloaders=TRAIN,
            targets="train",
            method=DropoutEnsemble(TRAK(projector=EigenProjector(12))),
        )
