"""Pilots: short runs from other weights that score together with the recorded run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from pilots.pilot_cases import EPOCHS, Data, Fresh, attribute_with_pilots, recorded
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from cases import BlobClassifier, blobs, child, loader_of, quiet_trainer, wait_for
from lightning_attr import FeatureStore
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.evaluation.subsets import Retraining
from lightning_attr.evaluation.train_one import seed_training
from lightning_attr.files.io import digest
from lightning_attr.methods import LESS, TRAK, GradDot, Influence, TracIn
from lightning_attr.parameters.weights import weights_of
from lightning_attr.pilots import Pilots
from lightning_attr.projectors import IdentityProjector
from lightning_attr.randomness.streams import hashed_seed

pytestmark = pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")


def pilots_of(folder: Path) -> list[Any]:
    return [snapshot for snapshot in FeatureStore.open(folder).snapshots if snapshot.pilot is not None]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run with two pilots, by a method that keeps whole gradients."""
    folder = tmp_path_factory.mktemp("run")
    trainer = recorded(folder, method=TRAK(projector=IdentityProjector()))
    alone = trainer.attribute()
    return folder, trainer, alone, trainer.attribute(pilots=2)


def test_a_pilot_is_a_plain_training_whose_learning_rate_falls_to_zero(run: Any) -> None:
    folder = run[0]
    store = FeatureStore.open(folder)
    for number, snapshot in enumerate(pilots_of(folder)):
        assert (snapshot.key, snapshot.pilot, snapshot.epoch, snapshot.global_step) == (
            *(f"pilot={number:04d}", number, 1),
            10,
        )
        seed = hashed_seed("pilot", store.manifest.run, number) % 2**32
        L.seed_everything(seed, verbose=False)
        loader = Data().train_dataloader()

        class Decayed(Fresh):
            def configure_optimizers(self) -> Any:
                optimizer = super().configure_optimizers()
                return [optimizer], [
                    {"scheduler": LambdaLR(optimizer, lambda step: min(1.0, 2 * (1 - step / 10))), "interval": "step"}
                ]

        module = Decayed(0.2)
        seed_training(loader, Retraining(0, number, seed))
        quiet_trainer(max_epochs=2).fit(module, loader)
        for name, tensor in weights_of(module).items():
            torch.testing.assert_close(store.weights(snapshot.key)[name], tensor)
        rates = [0.2 * min(1.0, 2 * (1 - t / 10)) for t in range(10)]
        assert snapshot.learning_rate == pytest.approx(sum(rates))


def test_scores_are_sums_in_units_of_their_spread(run: Any) -> None:
    folder, trainer, alone, together = run
    keys = [snapshot.key for snapshot in pilots_of(folder)]
    parts = [alone.scores.values.double()]
    for key in keys:
        copy = folder.parent / f"only-{key}"
        shutil.copytree(folder, copy)
        store = FeatureStore.open(copy)
        store.set_aside([snapshot.key for snapshot in store.snapshots if snapshot.key != key])
        parts.append(trainer.attribute(store=copy, pilots=1).scores.values.double())
    shares = torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64)
    weights = shares / torch.stack([part.std(correction=0) for part in parts])
    weights /= weights.sum()
    expected = sum(weight * part for weight, part in zip(weights, parts, strict=True))
    torch.testing.assert_close(together.scores.values.double(), expected, rtol=1e-4, atol=1e-6)
    named = {"run": weights[0], keys[0]: weights[1], keys[1]: weights[2]}
    assert together.scores.provenance["parts"] == pytest.approx({name: float(w) for name, w in named.items()}, rel=1e-4)


def test_the_run_alone_scores_as_before_and_pilots_are_trained_once(run: Any) -> None:
    folder, trainer, alone, together = run
    manifest = (folder / "manifest.json").read_bytes()
    assert torch.equal(trainer.attribute().scores.values, alone.scores.values)
    assert torch.equal(trainer.attribute(pilots=2).scores.values, together.scores.values)
    one = trainer.attribute(pilots=Pilots(1, Fresh))  # the first of the two
    assert list(one.scores.provenance["parts"]) == ["pilot=0000", "run"]
    assert (folder / "manifest.json").read_bytes() == manifest
    top = trainer.attribute(pilots=2, topk=3).scores.topk(3)[1]
    torch.testing.assert_close(top, together.scores.topk(3)[1], rtol=1e-5, atol=1e-6)


def test_from_the_store_alone_with_the_same_scores(run: Any, tmp_path: Path) -> None:
    folder, _, _, together = run
    shutil.copytree(folder, tmp_path / "copy")
    store = FeatureStore.open(tmp_path / "copy")
    store.set_aside([snapshot.key for snapshot in store.snapshots if snapshot.pilot is not None])
    module = Fresh(0.2)
    before = {name: tensor.clone() for name, tensor in weights_of(module).items()}
    states = torch.get_rng_state()
    result = quiet_trainer().attribute(Data(), model=module, store=tmp_path / "copy", pilots=2)
    torch.testing.assert_close(result.scores.values, together.scores.values)
    assert torch.equal(torch.get_rng_state(), states)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights_of(module).items())


@pytest.mark.parametrize(
    "method",
    [TRAK(exact=True), GradDot(exact=True), TracIn(exact=True), Influence(damping=0.1)],
    ids=lambda method: type(method).__name__,
)
def test_methods_that_run_the_module(run: Any, method: Any) -> None:
    result = run[1].attribute(pilots=2, method=method)
    assert sum(result.scores.provenance["parts"].values()) == pytest.approx(1.0)
    assert result.scores.values.isfinite().all()
    assert result.scores.provenance["snapshots"][-1].startswith("epoch=0003")


def test_a_pilot_keeps_what_the_method_needs_of_the_optimizer(tmp_path: Path) -> None:
    class Adam(Fresh):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.01)

    trainer = recorded(tmp_path, Adam(), method=LESS(IdentityProjector()), max_epochs=2)
    trainer.attribute(pilots=1)
    (pilot,) = pilots_of(tmp_path)
    assert FeatureStore.open(tmp_path).optimizer_state(pilot.key).moments


def test_a_schedule_of_the_users_own_is_for_the_length_of_the_pilot(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    class Scheduled(Fresh):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            steps = int(self.trainer.estimated_stepping_batches)
            seen.append((steps, self.trainer.max_epochs))
            schedule = LambdaLR(optimizer, lambda step: 1 - step / steps)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    trainer = recorded(tmp_path, Scheduled(0.2))
    trainer.attribute(pilots=1)
    assert seen == [(20, 4), (10, 2)]
    assert pilots_of(tmp_path)[0].learning_rate == pytest.approx(0.2 * sum(1 - t / 10 for t in range(10)))


@pytest.mark.slow
def test_killed_in_a_pilot_nothing_is_lost_or_doubled(tmp_path: Path) -> None:
    recorded(tmp_path / "run", max_epochs=EPOCHS)
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    expected = quiet_trainer().attribute(Data(), model=Fresh(0.2), store=tmp_path / "whole", pilots=2)
    side = tmp_path / "side"
    with child(attribute_with_pilots, str(tmp_path / "run"), str(side)) as process:
        wait_for(lambda: side.exists() and len(side.read_text()) > 13)  # in the second pilot, of 10 batches
        process.kill()
        process.join()
    done = [snapshot.key for snapshot in pilots_of(tmp_path / "run")]
    assert done[:1] == ["pilot=0000"]
    result = quiet_trainer().attribute(Data(), model=Fresh(0.2), store=tmp_path / "run", pilots=2)
    assert torch.equal(result.scores.values, expected.scores.values)
    assert [snapshot.key for snapshot in pilots_of(tmp_path / "run")] == ["pilot=0000", "pilot=0001"]


def test_a_run_goes_on_beside_its_pilots(tmp_path: Path) -> None:
    trainer = recorded(tmp_path / "store", max_epochs=3)
    trainer.attribute(pilots=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = quiet_trainer(max_epochs=5, callbacks=[AttributionCallback(tmp_path / "store", TRAK(16), log=False)])
    again.fit(Fresh(0.2), datamodule=Data(), ckpt_path=tmp_path / "a.ckpt")
    assert [snapshot.key for snapshot in pilots_of(tmp_path / "store")] == ["pilot=0000"]
    assert "parts" in again.attribute(pilots=1).scores.provenance


def test_merged_stores_bring_their_pilots_and_count_as_one_run_each(tmp_path: Path) -> None:
    for name in "ab":
        L.seed_everything(ord(name), verbose=False)
        callback = AttributionCallback(tmp_path / name, TRAK(16), log=False)
        trainer = quiet_trainer(max_epochs=3, callbacks=[callback])
        trainer.fit(Fresh(0.2), datamodule=Data())
        trainer.attribute(pilots=1)
    FeatureStore.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "both")
    result = trainer.attribute(store=tmp_path / "both", pilots=3)
    parts = result.scores.provenance["parts"]
    assert list(parts) == ["run0/pilot=0000", "run1/pilot=0000", "pilot=0001", "run0", "run1"]
    contents = [snapshot.weights for snapshot in pilots_of(tmp_path / "both")]
    assert len(set(contents)) == 3


def test_hooks_of_the_datamodule_and_its_own_loader_stay(tmp_path: Path) -> None:
    calls: list[str] = []

    class Hooked(Data):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            calls.append("hook")
            return batch

    datamodule = Hooked()
    trainer = quiet_trainer(max_epochs=2, callbacks=[AttributionCallback(tmp_path, TRAK(16), log=False)])
    trainer.fit(Fresh(0.2), datamodule=datamodule)
    trainer.attribute()
    before = len(calls)
    trainer.attribute(pilots=1)
    assert len(calls) > before + 4  # the pilot's own batches, beside those of its features
    assert datamodule.trainer is trainer
    assert "train_dataloader" not in vars(datamodule)


def test_loaders_without_a_datamodule(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    loader = loader_of(blobs(20), shuffle=True, generator=generator)
    trainer = quiet_trainer(max_epochs=2, callbacks=[AttributionCallback(tmp_path, TRAK(16), log=False)])
    trainer.fit(Fresh(0.2), loader)
    state = generator.get_state()
    trainer.attribute(target_dataloaders=loader_of(blobs(3, seed=1)), pilots=2)
    assert torch.equal(generator.get_state(), state)
    assert len({snapshot.weights for snapshot in pilots_of(tmp_path)}) == 2


def test_the_store_says_how_the_run_was_trained(run: Any) -> None:
    training = FeatureStore.open(run[0]).manifest.training
    assert training is not None
    assert (training["precision"], training["gradient_clip_val"]) == ("32-true", None)


def test_the_users_own_functions(tmp_path: Path) -> None:
    trainer = recorded(tmp_path, BlobClassifier(seed=1))
    made: list[int] = []

    def make_trainer(epochs: int) -> Any:
        made.append(epochs)
        return quiet_trainer(L.Trainer, max_epochs=epochs)

    trainer.attribute(pilots=Pilots(1, lambda: BlobClassifier(seed=2), make_trainer, epochs=3))
    assert made == [3]
    assert [snapshot.epoch for snapshot in pilots_of(tmp_path)] == [2]


@pytest.mark.slow
def test_several_processes_score_with_pilots_that_are_there(run: Any) -> None:
    folder, _, _, together = run
    trainer = quiet_trainer(strategy="ddp_spawn", devices=2)
    result = trainer.attribute(Data(), model=Fresh(0.2), store=folder, pilots=2)
    torch.testing.assert_close(result.scores.values, together.scores.values, rtol=1e-4, atol=1e-6)
    assert result.scores.provenance["parts"] == pytest.approx(together.scores.provenance["parts"])


def test_weights_have_digests_of_their_own(run: Any) -> None:
    contents = [snapshot.weights for snapshot in FeatureStore.open(run[0]).snapshots]
    assert len(set(contents)) == len(contents)
    weights: dict[str, Tensor] = FeatureStore.open(run[0]).weights("pilot=0000")
    assert digest(weights) in contents
