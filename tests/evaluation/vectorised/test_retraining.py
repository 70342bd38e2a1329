"""Many subsets at once: what one at a time gives, or one at a time."""

from __future__ import annotations

import json
import logging
import os
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from evaluation.retraining_cases import N_TARGET, Data, Plain, double, trainer
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanMetric

from cases import child
from lightning_attr.errors import AttributionError
from lightning_attr.evaluation import GroundTruth, retrain_lds, retrain_loo, retrain_without
from lightning_attr.evaluation.ground_truth import Records
from lightning_attr.evaluation.vectorised import retraining as vectorised
from lightning_attr.evaluation.vectorised import stacked_models as stacked

quick = {"progress": False, "seeds": 2}


def both(folder: Path, *parts: Any, retrain: Any = retrain_lds, **settings: Any) -> tuple[GroundTruth, GroundTruth]:
    """The same ground truth, one at a time and many at once."""
    settings = {"num_subsets": 3, **quick, **settings} if retrain is retrain_lds else {**quick, **settings}
    one = retrain(*parts, dirpath=folder / "one", **settings)
    many = retrain(*parts, dirpath=folder / "many", **{"vectorise": True, **settings})
    assert many.complete
    return one, many


def assert_close(one: GroundTruth, many: GroundTruth, tolerance: float = 1e-10) -> None:
    assert one.outputs.dtype == (torch.float64 if tolerance < 1e-8 else torch.float32)
    torch.testing.assert_close(many.outputs, one.outputs, rtol=tolerance, atol=tolerance)
    assert torch.equal(one.masks, many.masks)
    assert torch.equal(one.seeds, many.seeds)


def details(folder: Path) -> list[dict[str, str]]:
    """What the file of each retraining tells, in the order of the plan."""
    found = []
    for retraining in Records(folder).plan:
        with safe_open(folder / "runs" / f"{retraining.name}.safetensors", "pt") as file:
            found.append(json.loads(file.metadata()["lightning_attr"]))
    return found


def at_once(folder: Path) -> list[int]:
    return [int(record.get("at_once", 1)) for record in details(folder)]


# The same results -----------------------------------------------------------------------------------------------------


def scheduled(kind: Any, interval: str, **settings: Any) -> Callable[[Any], Any]:
    def make(parameters: Any) -> Any:
        optimizer = SGD(parameters, lr=0.1, momentum=0.9)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": kind(optimizer, **settings), "interval": interval},
        }

    return make


def two_groups(parameters: Any) -> Any:
    parameters = list(parameters)
    return AdamW([{"params": parameters[:1], "lr": 0.1}, {"params": parameters[1:], "weight_decay": 0.3}], lr=0.02)


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(SGD, lr=0.1),
        partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
        partial(SGD, lr=0.1, momentum=0.9, nesterov=True, fused=True),
        partial(Adam, lr=0.05, weight_decay=0.1),
        partial(Adam, lr=0.05, amsgrad=True),
        partial(AdamW, lr=0.05, weight_decay=0.5),
        two_groups,
        scheduled(OneCycleLR, "step", max_lr=0.5, total_steps=6),
        scheduled(StepLR, "epoch", step_size=1, gamma=0.3),
    ],
)
def test_optimizers_and_schedules(tmp_path: Path, optimizer: Any) -> None:
    assert_close(*both(tmp_path, partial(Plain, optimizer), double, Data))
    assert at_once(tmp_path / "many") == [1, 6, 6, 6, 6, 6]  # five, and the pilot once more
    assert at_once(tmp_path / "one") == [1] * 6
    assert all(record["global_step"] == "6" for record in details(tmp_path / "many"))


def test_float32_is_close(tmp_path: Path) -> None:
    assert_close(*both(tmp_path, partial(Plain, partial(SGD, lr=0.1, momentum=0.9)), trainer, Data), tolerance=1e-5)


@pytest.mark.parametrize(
    ("data", "limits"),
    [
        ({"shuffle": False}, {}),
        ({"drop_last": True}, {}),
        ({"generator": torch.Generator()}, {}),
        pytest.param(
            {"num_workers": 1, "multiprocessing_context": "forkserver"}, {"max_epochs": 2}, marks=pytest.mark.slow
        ),
        ({"batch_size": 3}, {"limit_train_batches": 2}),
        ({"batch_size": 3}, {"limit_train_batches": 0.5}),
        ({"batch_size": 3}, {"max_epochs": -1, "max_steps": 6}),
    ],
)
def test_batches_are_those_of_the_loader(tmp_path: Path, data: dict[str, Any], limits: dict[str, Any]) -> None:
    shared = Data(**data)
    assert_close(*both(tmp_path, Plain, partial(double, **limits), shared))
    assert set(at_once(tmp_path / "many")) == {1, 6}
    assert len(shared.train_dataloader().dataset) == 24


class Various(Plain):
    """A tied and a frozen parameter, a random buffer, a dict as a result, and reports of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3))
        self.network[2].weight = self.network[0].weight
        self.network[3].weight.requires_grad_(False)
        self.register_buffer("noise", torch.randn(4))
        self.mean = MeanMetric()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x + self.noise)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch) / (1 + batch_idx)
        self.log("loss", loss, prog_bar=True)
        self.mean(loss)
        self.log("mean", self.mean)
        return {"loss": loss}


def test_modules_with_more_than_layers(tmp_path: Path) -> None:
    assert_close(*both(tmp_path, Various, double, Data))


class Normalised(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.network.insert(1, nn.BatchNorm1d(6))


def test_running_statistics_of_each_model(tmp_path: Path) -> None:
    one, many = both(tmp_path, Normalised, double, Data, keep_checkpoints=True)
    assert_close(one, many)
    assert at_once(tmp_path / "many")[1] == 6
    for file in sorted((tmp_path / "one" / "checkpoints").iterdir()):
        single = torch.load(file, weights_only=True)
        other = torch.load(tmp_path / "many" / "checkpoints" / file.name, weights_only=True)
        assert single["global_step"] == other["global_step"]
        torch.testing.assert_close(other["state_dict"], single["state_dict"], rtol=1e-10, atol=1e-10)


class WithoutMixin(L.LightningModule):
    """Its outputs are its losses."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.layer(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=0.1)


def test_a_module_without_the_mixin_with_the_training_data_as_targets(tmp_path: Path) -> None:
    one, many = both(tmp_path, WithoutMixin, double, Data, targets="train")
    assert_close(one, many)
    assert one.outputs.shape == (2, 3, 24)


def test_streams_and_environment_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    generator = torch.Generator().manual_seed(5)
    state, python, own = torch.get_rng_state(), random.getstate(), generator.get_state()
    retrain_lds(Plain, trainer, Data(generator=generator), dirpath=tmp_path, num_subsets=3, vectorise=True, **quick)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python
    assert torch.equal(generator.get_state(), own)
    assert os.environ["PL_GLOBAL_SEED"] == "7"


# Which are at once ----------------------------------------------------------------------------------------------------


def test_a_number_at_once(tmp_path: Path) -> None:
    assert_close(*both(tmp_path, Plain, double, Data, num_subsets=4, vectorise=3))
    assert at_once(tmp_path / "many") == [1, 4, 4, 4, 3, 3, 3, 1]  # the pilot is one more, once


def test_only_sets_of_equal_size_are_at_once(tmp_path: Path) -> None:
    one, many = both(tmp_path, Plain, double, Data, retrain=retrain_loo, indices=[3, 9])
    assert_close(one, many)
    assert at_once(tmp_path / "many") == [1, 1, 4, 1, 4, 4]  # the reference is there but twice
    sets = [[1], [2, 3], [4], [5, 6], [7, 8, 9]]
    one, many = both(tmp_path / "b", Plain, double, Data, retrain=retrain_without, index_sets=sets)
    assert_close(one, many)
    assert at_once(tmp_path / "b" / "many") == [1, 1, 1, 4, 4, 1, 1, 4, 4, 4, 4, 1]


def test_memory_bounds_the_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    fitting = stacked.Stack.fitting
    monkeypatch.setattr(stacked.Stack, "fitting", lambda self: found.append(fitting(self)) or found[-1])
    retrain_lds(Plain, double, Data, dirpath=tmp_path / "a", num_subsets=3, vectorise=True, **quick)
    assert found[0] > 1000
    monkeypatch.setattr(stacked, "free_bytes", lambda device: 4 * 9000)
    retrain_lds(Plain, double, Data, dirpath=tmp_path / "b", num_subsets=3, vectorise=True, **quick)
    assert 2 <= found[1] <= 4
    assert max(at_once(tmp_path / "b")) == found[1] + 1
    monkeypatch.setattr(stacked, "free_bytes", lambda device: 4 * 4000)
    with pytest.raises(AttributionError, match=r"two models need [\d,]+ bytes, and 4,000 are to spend"):
        retrain_lds(Plain, double, Data, dirpath=tmp_path / "c", num_subsets=3, vectorise=True, **quick)
    monkeypatch.setattr(stacked, "free_bytes", lambda device: 1000)
    with pytest.raises(AttributionError, match=r"the training data take 576 bytes, and 250 are to spend"):
        retrain_lds(Plain, double, Data, dirpath=tmp_path / "d", num_subsets=3, vectorise=True, **quick)


# Where it is not possible ---------------------------------------------------------------------------------------------


class Dropped(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.network.append(nn.Dropout(0.1))


class Draws(Plain):
    def training_step(self, batch: Any) -> Any:
        return super().training_step(batch) * random.uniform(1, 1 + 1e-13)


class Branches(Plain):
    def training_step(self, batch: Any) -> Any:
        loss = super().training_step(batch)
        return 2 * loss if loss > 1 else loss


class Warms(Plain):
    def training_step(self, batch: Any) -> Any:
        return super().training_step(batch) * (1 + self.global_step)


class Hooked(Plain):
    def on_train_batch_end(self, *args: Any) -> None: ...


class Stops(Plain):
    def training_step(self, batch: Any) -> Any:
        self.trainer.should_stop = True
        return super().training_step(batch)


class Validates(Plain):
    def validation_step(self, batch: Any) -> None: ...


class ValidatesData(Data):
    def val_dataloader(self) -> Any:
        return self.test_dataloader()


class Transfers(Data):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch


class Noisy(Dataset[Any]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, row: int) -> Any:
        x, y = Data().train[row]
        return x + 0.1 * torch.randn(4), y


class Own(DataLoader[Any]): ...


class LoaderInside(Data):
    def train_dataloader(self) -> Any:
        return Own(self.train, batch_size=8)


def joined(samples: list[Any]) -> Any:
    x, y = torch.utils.data.default_collate(samples)
    return x - x.mean(0), y


def described(samples: list[Any]) -> Any:
    return [*torch.utils.data.default_collate(samples), "a batch"]


def plateau(parameters: Any) -> Any:
    optimizer = SGD(parameters, lr=0.1)
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": ReduceLROnPlateau(optimizer), "monitor": "loss"},
    }


class Logs(Plain):
    def training_step(self, batch: Any) -> Any:
        loss = super().training_step(batch)
        self.log("loss", loss)
        return loss


class Watches(L.Callback): ...


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"module": Dropped}, r"`training_step` of Dropped does not run under torch.func.vmap: .*random operation"),
    ({"module": Draws}, "its training step draws random numbers"),
    ({"module": Branches}, "`training_step` of Branches does not run under torch.func.vmap: .*data-dependent"),
    ({"module": Warms}, r"after 1 of 4 steps the weights of subset 0, repeat 0 differ .* by \d.* more than 1e-04"),
    ({"module": Hooked}, "Hooked overrides `on_train_batch_end`, which may change training"),
    ({"module": Stops}, "training was stopped before its end"),
    ({"module": Validates, "datamodule": ValidatesData}, "give it limit_val_batches=0"),
    ({"module": partial(Plain, partial(torch.optim.LBFGS, max_iter=1))}, "the optimizer is LBFGS, and not one of SGD"),
    ({"module": partial(Logs, plateau)}, "the learning rate depends on a metric"),
    ({"trainer": partial(trainer, callbacks=[Watches()])}, "the Trainer has the callback Watches"),
    ({"trainer": partial(trainer, accumulate_grad_batches=2)}, "accumulate_grad_batches=2"),
    ({"trainer": partial(trainer, gradient_clip_val=0.1)}, "gradient_clip_val=0.1"),
    ({"trainer": partial(trainer, precision="bf16-mixed")}, "precision is bf16-mixed, and not 32-true or 64-true"),
    ({"trainer": partial(trainer, reload_dataloaders_every_n_epochs=1)}, "reloads its data"),
    ({"datamodule": Transfers}, "Transfers overrides `on_after_batch_transfer`, which may change samples"),
    ({"datamodule": LoaderInside}, "the training loader is a Own, and not torch's DataLoader"),
    ({"datamodule": partial(Data, Noisy())}, "training samples are random"),
    ({"datamodule": partial(Data, collate_fn=joined)}, "makes of a sample depends on the others in the batch"),
    ({"datamodule": partial(Data, collate_fn=described)}, "a batch holds more than tensors whose first dimension"),
]


def new_callbacks(parts: dict[str, Any]) -> dict[str, Any]:
    """A callback is to be new in each Trainer."""
    make = parts["trainer"]
    if "callbacks" not in getattr(make, "keywords", {}):
        return parts
    return {**parts, "trainer": lambda: trainer(callbacks=[Watches()])}


@pytest.mark.parametrize(("parts", "message"), REFUSALS)
def test_what_can_not_be_at_once_is_one_at_a_time(
    tmp_path: Path, parts: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    def made() -> tuple[Any, ...]:
        given = new_callbacks({"module": Plain, "trainer": trainer, "datamodule": Data, **parts})
        return given["module"], given["trainer"], given["datamodule"]

    with pytest.raises(AttributionError, match=f"Many retrainings at once were asked for, but .*{message}.*auto"):
        retrain_lds(*made(), dirpath=tmp_path / "many", num_subsets=2, vectorise=True, **quick)
    assert GroundTruth.open(tmp_path / "many").finished.sum() == 1
    assert not [file for file in (tmp_path / "many" / "claims").iterdir() if not file.name.startswith(".")]
    with caplog.at_level(logging.WARNING, "lightning_attr"):
        many = retrain_lds(*made(), dirpath=tmp_path / "auto", num_subsets=2, vectorise="auto", **quick)
    assert caplog.records[0].getMessage().startswith("Retraining one at a time: ")
    assert at_once(tmp_path / "auto") == [1] * 4
    one = retrain_lds(*made(), dirpath=tmp_path / "one", num_subsets=2, **quick)
    assert torch.equal(one.outputs, many.outputs)


@pytest.mark.slow
def test_persistent_workers_are_refused(tmp_path: Path) -> None:
    data = Data(num_workers=1, persistent_workers=True, multiprocessing_context="forkserver")
    with pytest.raises(AttributionError, match="persistent_workers=True, which draws other random numbers"):
        retrain_lds(Plain, trainer, data, dirpath=tmp_path, num_subsets=2, vectorise=True, **quick)


def test_two_optimizers_by_hand_are_refused(tmp_path: Path) -> None:
    class ByHand(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any) -> None:
            first, second = self.optimizers()
            self.manual_backward(super().training_step(batch))
            first.step()
            second.step()

        def configure_optimizers(self) -> Any:
            return [SGD(self.network[0].parameters(), 0.1), SGD(self.network[2].parameters(), 0.1)]

    with pytest.raises(AttributionError, match="optimizes by hand"):
        retrain_lds(ByHand, trainer, Data, dirpath=tmp_path, num_subsets=2, vectorise=True, **quick)


def test_a_model_with_other_outputs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should weights agree by the pilot's check, and outputs not."""
    outputs_at = stacked.outputs_at
    monkeypatch.setattr(stacked, "outputs_at", lambda *arguments: 1.01 * outputs_at(*arguments))
    with pytest.raises(AttributionError, match=r"the outputs of subset 0, repeat 0 differ .* by 1.0e-02 of their norm"):
        retrain_lds(Plain, trainer, Data, dirpath=tmp_path, num_subsets=2, vectorise=True, **quick)


@pytest.mark.parametrize("vectorise", [0, 1, -3, "always", None, 2.0])
def test_bad_arguments(tmp_path: Path, vectorise: Any) -> None:
    with pytest.raises(ValueError, match=r"`vectorise` of .* to be .*an integer >= 2.*, but got "):
        retrain_lds(Plain, trainer, Data, dirpath=tmp_path / "truth", vectorise=vectorise, **quick)
    assert not (tmp_path / "truth").exists()


# Several processes, and processes that die ----------------------------------------------------------------------------


class FailsError(Exception): ...


def test_what_is_finished_stays_and_the_rest_is_done_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = retrain_lds(Plain, double, Data, dirpath=tmp_path / "one", num_subsets=5, **quick)
    folder, train_stack, calls = tmp_path / "many", vectorised._train_stack, []

    def failing(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise FailsError
        train_stack(*arguments)

    monkeypatch.setattr(vectorised, "_train_stack", failing)
    with pytest.raises(FailsError):
        retrain_lds(Plain, double, Data, dirpath=folder, num_subsets=5, vectorise=3, **quick)
    before = {file: file.read_bytes() for file in (folder / "runs").iterdir()}
    assert len(before) == 4
    assert not [file for file in (folder / "claims").iterdir() if not file.name.startswith(".")]
    again = retrain_lds(Plain, double, Data, dirpath=folder, num_subsets=5, vectorise="auto", **quick)
    assert_close(one, again)
    assert all(file.read_bytes() == content for file, content in before.items())
    assert at_once(folder) == [1, 4, 4, 4, 1, 6, 6, 6, 6, 6]


def test_what_another_process_has_is_left_to_it(tmp_path: Path) -> None:
    retrain_lds(Plain, double, Data, dirpath=tmp_path, num_subsets=5, **quick)
    records = Records(tmp_path)
    plan = list(records.plan)
    outputs = GroundTruth.open(tmp_path).outputs
    for one in plan:
        records.path(one).unlink()
    taken = records.claim(plan[3])
    assert taken is not None
    train = vectorised.VectorisedRetraining(
        vectorised.LightningRetraining(Plain, double, Data, recipe=records.recipe), True
    )
    train.train_groups(records, False, lambda: None, lambda: False)
    assert records.unfinished() == [plan[3]]
    taken.release()
    fourth = outputs[0, 3].clone()
    found = GroundTruth.open(tmp_path).outputs
    assert found[0, 3].isnan().all()
    found[0, 3] = fourth
    torch.testing.assert_close(found, outputs, rtol=1e-10, atol=1e-10)


class Explodes(Plain):
    """Diverges where a weight is below a limit."""

    limit = 0.0

    def training_step(self, batch: Any) -> Any:
        loss = super().training_step(batch)
        return loss * torch.where(self.network[2].weight[0, 0] < self.limit, torch.inf, 1.0)


def test_a_model_that_diverges_is_named_and_the_others_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    firsts: list[float] = []
    for retraining in retrain_plan():
        L.seed_everything(retraining.seed, verbose=False)
        firsts.append(Plain().network[2].weight[0, 0].item())
    worst = min(range(len(firsts)), key=firsts.__getitem__)
    assert worst > 0
    name = str(retrain_plan()[worst])
    monkeypatch.setattr(Explodes, "limit", firsts[worst] + 1e-6)
    module = partial(Explodes, partial(SGD, lr=1e-7))
    with pytest.raises(AttributionError, match=f"The retraining of {name} diverged: its parameter `network"):
        retrain_lds(module, trainer, Data, dirpath=tmp_path, num_subsets=4, vectorise=True, **quick)
    assert GroundTruth.open(tmp_path).finished.sum() == 7


def retrain_plan() -> list[Any]:
    from lightning_attr.evaluation.subsets import random_subsets

    return list(random_subsets(24, num_subsets=4, alpha=0.5, repeats=2, seed=0))


def many_of(folder: str) -> None:
    """What a test runs in a process of its own."""
    torch.set_num_threads(1)
    retrain_lds(Plain, double, Data, dirpath=folder, num_subsets=100, vectorise=4, **quick)


@pytest.mark.slow
def test_killed_at_random_points(tmp_path: Path) -> None:
    folder, delays = tmp_path / "many", random.Random(0)
    whole = retrain_lds(Plain, double, Data, dirpath=tmp_path / "one", num_subsets=100, vectorise=True, **quick)
    finished: dict[Path, bytes] = {}
    for _ in range(5):
        with child(many_of, str(folder)) as process:
            while process.is_alive() and len(list(folder.glob("runs/*.safetensors"))) == len(finished):
                time.sleep(0.002)
            time.sleep(delays.uniform(0, 0.2))
            assert process.is_alive(), "all was finished before the last kill"
            process.kill()
            process.join()
        assert all(file.read_bytes() == content for file, content in finished.items())
        finished = {file: file.read_bytes() for file in folder.glob("runs/*.safetensors")}
    again = retrain_lds(Plain, double, Data, dirpath=folder, num_subsets=100, vectorise=True, **quick)
    assert_close(whole, again)
    assert all(file.read_bytes() == content for file, content in finished.items())


@pytest.mark.slow
def test_two_workers(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    one = retrain_lds(Plain, double, Data, dirpath=tmp_path / "one", num_subsets=10, **quick)
    settings = {"vectorise": 4, "num_workers": 2, **quick}
    many = retrain_lds(Plain, double, Data, dirpath=tmp_path / "many", num_subsets=10, **settings)
    assert_close(one, many)
    assert sum(count > 1 for count in at_once(tmp_path / "many")) >= 10
    assert many.outputs.shape == (2, 10, N_TARGET)
