"""Ground truth by retraining, as users ask for it."""

from __future__ import annotations

import json
import os
import random
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from evaluation.retraining_cases import N_TARGET, N_TRAIN, Data, Deadly, Tiny, lds_of, trainer
from torch.utils.data import IterableDataset, Subset, SubsetRandomSampler, TensorDataset

from cases import child, quiet_trainer
from lightning_attr.errors import AttributionError, CorruptedStoreError, StoreMismatchError
from lightning_attr.evaluation import GroundTruth, retrain_lds, retrain_loo, retrain_without
from lightning_attr.evaluation.ground_truth import Records
from lightning_attr.metrics import linear_datamodeling_score
from lightning_attr.randomness.streams import hashed_seed

quick = {"progress": False, "seeds": 2}


def contents(folder: Path) -> dict[str, bytes]:
    """All files, without those that only say who is at work."""
    files = [file for file in folder.rglob("*") if file.is_file() and not file.name.startswith(".")]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def by_hand(kept: list[int], seed: int) -> torch.Tensor:
    """One retraining as a user would write it: the data set is the subset, the rest is Lightning's."""
    L.seed_everything(seed, verbose=False)
    module, data = Tiny(), Data(shuffle=False)
    data.train = Subset(data.train, kept)
    L.seed_everything(hashed_seed("training", seed, 0) % 2**32, verbose=False)
    trainer().fit(module, datamodule=data)
    x, y = data.targets.tensors
    with torch.no_grad():
        scores = module.eval()(x)
    others = scores.masked_fill(torch.nn.functional.one_hot(y, 3).bool(), -torch.inf)
    return scores.gather(1, y[:, None])[:, 0] - others.logsumexp(1)


def test_outputs_are_those_of_training_by_hand(tmp_path: Path) -> None:
    truth = retrain_lds(
        Tiny, trainer, partial(Data, shuffle=False), dirpath=tmp_path, num_subsets=3, alpha=0.4, **quick
    )
    assert truth.kind == "lds"
    assert truth.complete
    assert truth.masks.shape == (3, N_TRAIN)
    assert truth.masks.sum(1).tolist() == [9, 9, 9]  # 0.4 * 24, rounded down
    assert truth.outputs.shape == (2, 3, N_TARGET)
    for repeat in range(2):
        for subset in range(3):
            expected = by_hand(truth.masks[subset].nonzero().flatten().tolist(), int(truth.seeds[repeat, subset]))
            torch.testing.assert_close(truth.outputs[repeat, subset], expected, rtol=0, atol=1e-6)
    assert len(truth.seeds.unique()) == 6
    score = linear_datamodeling_score(torch.rand(N_TRAIN, N_TARGET), truth.masks, truth.outputs, bootstrap=2)
    assert score.per_target.shape == (N_TARGET,)


def test_random_streams_environment_and_shared_datamodule_stay_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    monkeypatch.delenv("PL_SEED_WORKERS", raising=False)
    generator = torch.Generator().manual_seed(5)
    data = Data(generator=generator)
    state, python, own = torch.get_rng_state(), random.getstate(), generator.get_state()
    shared = retrain_lds(Tiny, trainer, data, dirpath=tmp_path / "a", num_subsets=2, **quick)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python
    assert torch.equal(generator.get_state(), own)
    assert os.environ["PL_GLOBAL_SEED"] == "7"
    assert "PL_SEED_WORKERS" not in os.environ
    assert len(data.train_dataloader().dataset) == N_TRAIN
    new = partial(Data, generator=torch.Generator())
    fresh = retrain_lds(Tiny, trainer, new, dirpath=tmp_path / "b", num_subsets=2, **quick)
    assert torch.equal(shared.outputs, fresh.outputs)


def test_order_and_restarts_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with a shared datamodule whose loader keeps a generator."""
    whole = retrain_lds(
        Tiny, trainer, Data(generator=torch.Generator()), dirpath=tmp_path / "a", num_subsets=3, **quick
    )
    unfinished = Records.unfinished
    monkeypatch.setattr(Records, "unfinished", lambda self: unfinished(self)[::-1])
    again = retrain_lds(
        Tiny, trainer, Data(generator=torch.Generator()), dirpath=tmp_path / "b", num_subsets=3, **quick
    )
    assert torch.equal(whole.outputs, again.outputs)
    monkeypatch.undo()
    removed = tmp_path / "b" / "runs" / "subset=1-repeat=0.safetensors"
    removed.unlink()
    before = contents(tmp_path / "b")
    partly = GroundTruth.open(tmp_path / "b")
    assert partly.finished.tolist() == [[True, False, True], [True, True, True]]
    assert not partly.complete
    retrain_lds(Tiny, trainer, Data(generator=torch.Generator()), dirpath=tmp_path / "b", num_subsets=3, **quick)
    after = contents(tmp_path / "b")
    assert after.keys() - before.keys() == {"runs/subset=1-repeat=0.safetensors"}
    assert all(after[name] == before[name] for name in before)  # the others were not written again
    assert torch.equal(GroundTruth.open(tmp_path / "b").outputs, whole.outputs)


def test_leave_one_out_has_a_reference_and_common_random_numbers(tmp_path: Path) -> None:
    truth = retrain_loo(Tiny, trainer, Data, dirpath=tmp_path, indices=torch.tensor([3, 20]), **quick)
    assert truth.kind == "loo"
    assert truth.removed == [[3], [20]]
    assert truth.masks[0].all()
    assert truth.seeds[:, 0].tolist() == truth.seeds[:, 1].tolist() == truth.seeds[:, 2].tolist()
    assert truth.seeds[0, 0] != truth.seeds[1, 0]
    assert torch.equal(truth.effects, truth.outputs[:, :1] - truth.outputs[:, 1:])
    assert truth.effects.shape == (2, 2, N_TARGET)
    assert torch.equal(truth.reference, truth.outputs[:, 0])
    # Far less noise than between seeds.
    assert truth.effects.abs().mean() < 0.5 * (truth.outputs[0] - truth.outputs[1]).abs().mean()


def test_sets_are_removed_and_checkpoints_kept(tmp_path: Path) -> None:
    truth = retrain_without(
        Tiny, trainer, Data, dirpath=tmp_path, index_sets=[[1, 2], range(10)], keep_checkpoints=True, progress=False
    )
    assert truth.kind == "without"
    assert truth.removed == [[1, 2], list(range(10))]
    assert truth.outputs.shape == (3, 3, N_TARGET)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 9
    module = Tiny.load_from_checkpoint(tmp_path / "checkpoints" / "subset=2-repeat=1.ckpt").eval()
    with torch.no_grad():
        expected = module.functional_output({}, {}, Data().targets.tensors)
    torch.testing.assert_close(truth.outputs[1, 2], expected)


def test_lds_has_no_reference(tmp_path: Path) -> None:
    truth = retrain_lds(Tiny, trainer, Data, dirpath=tmp_path, num_subsets=1, **quick)
    for name in ("reference", "effects", "removed"):
        with pytest.raises(AttributionError, match=f"`{name}` compares with a model trained on the full set"):
            getattr(truth, name)


class WithoutMixin(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_module_without_the_mixin_gives_its_negative_loss(tmp_path: Path) -> None:
    truth = retrain_lds(
        WithoutMixin, trainer, Data, dirpath=tmp_path, num_subsets=1, keep_checkpoints=True, targets="train", **quick
    )
    assert truth.outputs.shape == (2, 1, N_TRAIN)  # all training samples, not the subset
    weights = torch.load(tmp_path / "checkpoints" / "subset=0-repeat=0.ckpt", weights_only=True)["state_dict"]
    x, y = Data().train.tensors
    scores = x @ weights["layer.weight"].T + weights["layer.bias"]
    torch.testing.assert_close(truth.outputs[0, 0], -torch.nn.functional.cross_entropy(scores, y, reduction="none"))


def test_the_module_may_have_the_loaders(tmp_path: Path) -> None:
    class WithLoaders(Tiny):
        def train_dataloader(self) -> Any:
            return [Data(batch_size=6).train_dataloader()]

        def training_step(self, batch: Any) -> torch.Tensor:
            return super().training_step(batch[0])

        def validation_step(self, batch: Any) -> None: ...

        def val_dataloader(self) -> Any:
            return Data().test_dataloader()

    truth = retrain_lds(WithLoaders, trainer, dirpath=tmp_path, num_subsets=2, targets="val", **quick)
    assert truth.outputs.shape == (2, 2, N_TARGET)


@pytest.mark.parametrize(("precision", "dtype"), [("64-true", torch.float64), ("bf16-mixed", torch.float32)])
def test_the_trainers_precision_is_used(tmp_path: Path, precision: str, dtype: torch.dtype) -> None:
    make = partial(trainer, precision=precision)
    truth = retrain_lds(Tiny, make, Data, dirpath=tmp_path / "a", num_subsets=1, **quick)
    assert truth.outputs.dtype == dtype
    full = retrain_lds(Tiny, trainer, Data, dirpath=tmp_path / "b", num_subsets=1, **quick)
    assert not torch.equal(truth.outputs, full.outputs.to(dtype))
    torch.testing.assert_close(truth.outputs, full.outputs.to(dtype), rtol=0.05, atol=0.05)


@pytest.mark.slow
def test_workers_of_the_loader_are_kept(tmp_path: Path) -> None:
    """What they draw differs from what the process itself would, in torch; here it is the same each time."""
    context = {"num_workers": 1, "multiprocessing_context": "forkserver", "persistent_workers": True}
    shared = Data(**context)
    first, second = (
        retrain_lds(Tiny, trainer, shared, dirpath=tmp_path / str(number), num_subsets=1, progress=False, seeds=1)
        for number in range(2)
    )
    assert torch.equal(first.outputs, second.outputs)


def test_progress_is_shown_and_the_trainers_are_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    loud = partial(L.Trainer, max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    retrain_lds(Tiny, loud, Data, dirpath=tmp_path, num_subsets=2, seeds=1)
    printed = "".join(capfd.readouterr())
    assert "Retraining: 100%" in printed
    assert "2/2" in printed
    assert "Epoch" not in printed
    assert "Trainer" not in printed
    assert "Params" not in printed


# Several processes, and processes that die ----------------------------------------------------------------------------


def starts(side_file: Path) -> Counter[str]:
    return Counter(side_file.read_text().split()) if side_file.exists() else Counter()


@pytest.mark.slow
def test_two_workers_give_what_one_gives(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    one = retrain_lds(Tiny, trainer, Data, dirpath=tmp_path / "one", num_subsets=4, **quick)
    module = partial(Tiny, str(tmp_path / "side"))
    two = retrain_lds(module, trainer, Data, dirpath=tmp_path / "two", num_subsets=4, num_workers=2, **quick)
    assert torch.equal(one.outputs, two.outputs)
    assert len(starts(tmp_path / "side")) == 8
    assert set(starts(tmp_path / "side").values()) == {1}


@pytest.mark.slow
def test_two_scripts_share_a_directory(tmp_path: Path) -> None:
    arguments = (str(tmp_path / "truth"), str(tmp_path / "side"), 10)
    with child(lds_of, *arguments) as first, child(lds_of, *arguments) as second:
        first.join(120)
        second.join(120)
        assert (first.exitcode, second.exitcode) == (0, 0)
    assert len(starts(tmp_path / "side")) == 20
    assert set(starts(tmp_path / "side").values()) == {1}
    assert GroundTruth.open(tmp_path / "truth").complete
    assert not [file for file in (tmp_path / "truth" / "claims").iterdir() if not file.name.startswith(".")]


@pytest.mark.slow
def test_killed_at_random_points_the_files_are_those_of_an_uninterrupted_run(tmp_path: Path) -> None:
    """20 kills; what was finished is never trained again, and what was in flight once more for each kill at most."""
    num_subsets, side_file, folder = 60, tmp_path / "side", tmp_path / "killed"
    whole = retrain_lds(Tiny, trainer, Data, dirpath=tmp_path / "whole", num_subsets=num_subsets, **quick)
    delays = random.Random(0)
    kills = []
    for _ in range(20):
        begun = sum(starts(side_file).values())
        with child(lds_of, str(folder), str(side_file), num_subsets) as process:
            while process.is_alive() and sum(starts(side_file).values()) == begun:
                time.sleep(0.002)
            time.sleep(delays.uniform(0, 0.08))
            assert process.is_alive(), "all was finished before the last kill"
            process.kill()
            process.join()
        kills.append((set(contents(folder)), starts(side_file)))
    truth = retrain_lds(partial(Tiny, str(side_file)), trainer, Data, dirpath=folder, num_subsets=num_subsets, **quick)
    assert torch.equal(truth.outputs, whole.outputs)
    assert contents(folder).keys() == contents(tmp_path / "whole").keys()
    final = starts(side_file)
    assert len(final) == 2 * num_subsets
    assert sum(final.values()) <= 2 * num_subsets + len(kills)
    seeds = {one.name: str(hashed_seed("training", one.seed, 0) % 2**32) for one in Records(folder).plan}
    assert set(seeds.values()) == set(final)
    for files, started in kills:
        for name, seed in seeds.items():
            if f"runs/{name}.safetensors" in files:
                assert final[seed] == started[seed]


@pytest.mark.slow
def test_a_worker_that_fails_tells_why(tmp_path: Path) -> None:
    module = partial(Tiny, learning_rate=float("inf"))
    with pytest.raises(AttributionError, match=r"subset \d, repeat 0 diverged: its parameter"):
        retrain_lds(module, trainer, Data, dirpath=tmp_path, num_subsets=4, num_workers=2, **quick)


@pytest.mark.slow
def test_a_worker_that_is_killed_is_told(tmp_path: Path) -> None:
    with pytest.raises(AttributionError, match="A process that retrained was killed"):
        retrain_lds(Deadly, trainer, Data, dirpath=tmp_path, num_workers=2, **quick)


# Bad input ------------------------------------------------------------------------------------------------------------


def test_functions_that_cannot_be_pickled_cannot_go_to_workers(tmp_path: Path) -> None:
    with pytest.raises(AttributionError, match=r"they cannot be pickled .* start the same script several times"):
        retrain_lds(lambda: Tiny(), trainer, Data, dirpath=tmp_path, num_workers=2, **quick)


def one_module() -> Any:
    module = Tiny()
    return lambda: module


def one_network() -> Any:
    network = Tiny().network

    def make() -> Tiny:
        module = Tiny()
        module.network = network
        return module

    return make


def one_trainer() -> Any:
    found = trainer()
    return lambda: found


def one_callback() -> Any:
    callback = L.pytorch.callbacks.EarlyStopping("loss")
    return lambda: trainer(callbacks=[callback])


def seeded() -> Tiny:
    torch.manual_seed(0)
    return Tiny()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"module": one_module()}, AttributionError, "`module` returned the same Tiny twice"),
        ({"module": one_network()}, AttributionError, r"with the parameter `network.0.weight` of an earlier one"),
        ({"module": seeded}, AttributionError, "`module` sets the seed of torch's random numbers itself"),
        ({"module": Tiny()}, TypeError, "`module` of .+ that makes a new one .* but got an object of class Tiny"),
        ({"module": lambda: 3}, TypeError, "`module` to return a LightningModule, but got int"),
        ({"module": L.LightningModule}, TypeError, "or to be a LightningModule with a `training_step`"),
        ({"trainer": one_trainer()}, AttributionError, "`trainer` returned the same Trainer twice"),
        ({"trainer": one_callback()}, AttributionError, "a Trainer with the EarlyStopping of an earlier one"),
        ({"trainer": quiet_trainer()}, TypeError, "`trainer` of .+ function .* an object of class AttributionTrainer"),
        ({"trainer": quiet_trainer}, AttributionError, "its max_epochs is None and its max_steps is -1"),
        ({"trainer": partial(trainer, max_epochs=-1)}, AttributionError, "its max_epochs is -1"),
        ({"trainer": partial(trainer, devices=2)}, AttributionError, "for one device, but it has 2 on 1 node"),
        ({"trainer": partial(trainer, overfit_batches=2)}, AttributionError, "but it has overfit_batches=2"),
        ({"trainer": Tiny}, TypeError, "`trainer` to return a Trainer, but got Tiny"),
        ({"datamodule": 3}, TypeError, "`datamodule` of .+ to be a function"),
        ({"datamodule": Tiny}, TypeError, "`datamodule` to return a LightningDataModule, but got Tiny"),
        ({"datamodule": None}, ValueError, "Expected training data to attribute to, but found none"),
        ({"targets": "val"}, ValueError, "neither datamodule nor module defines `val_dataloader`"),
        ({"targets": "every"}, ValueError, "`targets` of .+ to be 'auto'"),
        ({"alpha": 0.0}, ValueError, r"`alpha` of .+ to be a number in \(0, 1\), but got 0.0"),
        ({"alpha": 1.0}, ValueError, r"`alpha` of .+ to be a number in \(0, 1\), but got 1.0"),
        ({"alpha": 0.04}, ValueError, "0.04 of 24 training samples is less than one: a subset would be empty"),
        ({"num_subsets": 0}, ValueError, "`num_subsets` of .+ to be an integer >= 1, but got 0"),
        ({"seeds": 0}, ValueError, "`seeds` of .+ to be an integer >= 1, but got 0"),
        ({"seeds": [1, 2]}, ValueError, r"`seeds` of .+ to be an integer >= 1, but got \[1, 2\]"),
        ({"num_workers": 0}, ValueError, "`num_workers` of .+ to be an integer >= 1, but got 0"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(
    tmp_path: Path, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {"module": Tiny, "trainer": trainer, "datamodule": Data, "num_subsets": 2, **quick, **arguments}
    with pytest.raises(error, match=message):
        retrain_lds(dirpath=tmp_path / "truth", **given)
    assert not (tmp_path / "truth").exists()


@pytest.mark.parametrize(
    ("index_sets", "message"),
    [
        ([], "`index_sets` to hold at least one set"),
        ([[1], []], r"`index_sets\[1\]` to name at least one training sample, but it is empty"),
        ([range(N_TRAIN)], r"`index_sets\[0\]` to leave some .* but it removes all 24"),
        ([[1, 24]], "indices from 0 to 23, but got 24"),
        ([[-1]], "indices from 0 to 23, but got -1"),
        ([[1, 2, 1]], "to name each training sample once, but 1 is there twice"),
        ([torch.ones(24, dtype=torch.bool)], "but got a tensor of torch.bool"),
    ],
)
def test_bad_indices_are_refused(tmp_path: Path, index_sets: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        retrain_without(Tiny, trainer, Data, dirpath=tmp_path / "truth", index_sets=index_sets, **quick)
    if len(index_sets) == 1 and len(index_sets[0]) < N_TRAIN:
        with pytest.raises(ValueError, match=message):
            retrain_loo(Tiny, trainer, Data, dirpath=tmp_path / "truth", indices=index_sets[0], **quick)
    assert not (tmp_path / "truth").exists()


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(Data().train)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: Data(train=Stream(), shuffle=None), "map-style data set for the training data, but Stream is an Iter"),
        (lambda: Data(sampler=SubsetRandomSampler([1, 2]), shuffle=None), "its sampler is a SubsetRandomSampler"),
    ],
)
def test_training_data_without_indices_are_refused(tmp_path: Path, data: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        retrain_lds(Tiny, trainer, data, dirpath=tmp_path / "truth", num_subsets=2, **quick)
    assert not (tmp_path / "truth").exists()


def changed(data: TensorDataset, row: int) -> TensorDataset:
    x, y = data.tensors
    x = x.clone()
    x[row] += 1
    return TensorDataset(x, y)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_subsets": 3}, r"its subsets differ \(`num_subsets`, `alpha`"),
        ({"alpha": 0.3}, "its subsets differ"),
        ({"seeds": 1}, "it has repeats = 2, here it is 1"),
        ({"seed": 1}, "it has seed = 0, here it is 1"),
        ({"targets": "train"}, "it has targets = 'auto', here it is 'train'"),
        ({"module": partial(Tiny, learning_rate=0.2)}, r"hyperparameters = .*0.1\}, here it is .*0.2\}"),
        ({"trainer": partial(trainer, max_epochs=3)}, "it has max_epochs = 2, here it is 3"),
        ({"datamodule": partial(Data, batch_size=4)}, "it has batch_size = 8, here it is 4"),
        ({"datamodule": lambda: Data(train=changed(Data().train, 0))}, "its training samples differ"),
        ({"datamodule": lambda: Data(train=Subset(Data().train, range(20)))}, "it has n_train = 24, here it is 20"),
        ({"datamodule": lambda: Data(targets=changed(Data().targets, 2))}, "its targets differ"),
        ({"datamodule": lambda: Data(targets=Subset(Data().targets, [1]))}, "it has n_target = 5, here it is 1"),
    ],
)
def test_ground_truth_of_something_else_is_refused_and_stays(
    truth_folder: Path, arguments: dict[str, Any], message: str
) -> None:
    given = {"module": Tiny, "trainer": trainer, "datamodule": Data, "num_subsets": 2, **quick, **arguments}
    before = contents(truth_folder)
    with pytest.raises(StoreMismatchError, match=message) as caught:
        retrain_lds(dirpath=truth_folder, **given)
    assert "nothing in it was changed" in str(caught.value)
    assert contents(truth_folder) == before


def test_another_kind_of_ground_truth_is_refused(truth_folder: Path) -> None:
    with pytest.raises(StoreMismatchError, match="it has kind = 'lds', here it is 'loo'"):
        retrain_loo(Tiny, trainer, Data, dirpath=truth_folder, indices=[1], **quick)


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("truth")
    retrain_lds(Tiny, trainer, Data, dirpath=folder, num_subsets=2, **quick)
    return folder


@pytest.fixture
def truth_folder(made_once: Path) -> Path:
    return made_once


def test_a_directory_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(AttributionError, match=r"holds other files and no manifest.json"):
        retrain_lds(Tiny, trainer, Data, dirpath=tmp_path, num_subsets=2, **quick)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(CorruptedStoreError, match="holds no ground truth"):
        GroundTruth.open(tmp_path)


class FailsLater(Data):
    """Finds other data in its third and later uses: one is for the checks, one for the first retraining."""

    uses = 0

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def setup(self, stage: str) -> None:
        if stage == "fit":
            FailsLater.uses += 1
        if FailsLater.uses > 2 and self.what == "train":
            self.train = changed(self.train, 0)
        if FailsLater.uses > 2 and self.what == "length":
            self.train = Subset(self.train, range(20))
        if FailsLater.uses > 2 and self.what == "targets":
            self.targets = changed(self.targets, 0)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("train", "The training data of subset 1, repeat 0 are not .* 24 samples were expected, and 24 found, which"),
        ("length", "The training data of subset 1, repeat 0 are not .* 24 samples were expected, and 20 found"),
        ("targets", "The target data of subset 1, repeat 0 are not those of the retrainings before"),
    ],
)
def test_data_that_change_between_retrainings_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, message: str
) -> None:
    monkeypatch.setattr(FailsLater, "uses", 0)
    with pytest.raises(StoreMismatchError, match=message):
        retrain_lds(Tiny, trainer, partial(FailsLater, what), dirpath=tmp_path, num_subsets=2, **quick)
    assert [file.name for file in (tmp_path / "runs").iterdir()] == ["subset=0-repeat=0.safetensors"]


def test_a_random_split_without_a_seed_is_refused(tmp_path: Path) -> None:
    class Split(Data):
        def setup(self, stage: str) -> None:
            self.train, _ = torch.utils.data.random_split(Data().train, [20, 4])

    with pytest.raises(StoreMismatchError, match="a random split needs a fixed seed"):
        retrain_lds(Tiny, trainer, Split, dirpath=tmp_path, num_subsets=2, **quick)


class DivergesFor(Tiny):
    """The second training ends badly."""

    made = 0

    def __init__(self, how: str) -> None:
        super().__init__()
        DivergesFor.made += 1
        self.how = how if DivergesFor.made == 4 else ""  # two are for the checks

    def on_train_end(self) -> None:
        with torch.no_grad():
            if self.how == "weights":
                self.network[0].weight[0, 0] = torch.nan
            elif self.how == "outputs":
                self.network[3].bias.fill_(3e38)
                self.network[3].bias[0] = -3e38

    def on_fit_start(self) -> None:
        if self.how == "steps":
            self.trainer.should_stop = True
            self.trainer.limit_train_batches = 0


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("weights", "The retraining of subset 1, repeat 0 diverged: its parameter `network.0.weight` holds NaN or Inf"),
        ("outputs", "The retraining of subset 1, repeat 0 diverged: "),
        ("steps", "The retraining of subset 1, repeat 0 took 0 optimizer steps"),
    ],
)
def test_a_failed_retraining_is_named_and_the_others_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, message: str
) -> None:
    monkeypatch.setattr(DivergesFor, "made", 0)
    with pytest.raises(AttributionError, match=message):
        retrain_lds(partial(DivergesFor, how), trainer, Data, dirpath=tmp_path, num_subsets=2, **quick)
    assert [file.name for file in (tmp_path / "runs").iterdir()] == ["subset=0-repeat=0.safetensors"]
    assert not [file for file in (tmp_path / "claims").iterdir() if not file.name.startswith(".")]
    truth = retrain_lds(partial(DivergesFor, ""), trainer, Data, dirpath=tmp_path, num_subsets=2, **quick)
    assert truth.complete


def test_a_subset_smaller_than_a_batch_with_drop_last_takes_no_steps(tmp_path: Path) -> None:
    data = partial(Data, batch_size=16, drop_last=True)
    with pytest.raises(
        AttributionError, match=r"subset 0, repeat 0 would take 0 .* its 12 samples do not fill a batch of 16"
    ):
        retrain_lds(Tiny, trainer, data, dirpath=tmp_path, num_subsets=2, **quick)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    retrain_lds(Tiny, trainer, Data, dirpath=tmp_path, num_subsets=1, **quick)
    path = tmp_path / "runs" / "subset=0-repeat=1.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CorruptedStoreError, match=r"repeat=1.safetensors is damaged.*Delete it and run again"):
        GroundTruth.open(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 9}))
    with pytest.raises(CorruptedStoreError, match="has the format 9, but this version of lightning_attr reads 2"):
        GroundTruth.open(tmp_path)


def test_a_lightning_cli_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jsonargparse")
    monkeypatch.setattr("sys.argv", ["script"])
    from lightning.pytorch.cli import LightningCLI

    (tmp_path / "config.yaml").write_text(
        "seed_everything: 3\n"
        "trainer: {max_epochs: 1, logger: false, enable_checkpointing: false, accelerator: cpu}\n"
        "model: {learning_rate: 0.3}\n"
    )

    def cli(*more: str) -> Any:
        arguments = [f"--config={tmp_path}/config.yaml", *more]
        return LightningCLI(Tiny, Data, run=False, args=arguments, save_config_callback=None)

    def truth_of(*more: str) -> GroundTruth:
        parts = [lambda: cli(*more).model, lambda: cli(*more).trainer, lambda: cli(*more).datamodule]
        return retrain_lds(*parts, dirpath=tmp_path / "truth", num_subsets=1, **quick)

    with pytest.raises(AttributionError, match="`--seed_everything=false`"):
        truth_of()
    assert truth_of("--seed_everything=false").provenance["hyperparameters"] == {"learning_rate": 0.3}
