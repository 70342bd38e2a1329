"""Modules, Trainers, datamodules and callbacks of `lightning` and of `pytorch_lightning` give the same results."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cases import blobs, loader_of, quiet_trainer
from lightning_attr import AttributionMixin, AttributionTrainer, attribute
from lightning_attr.attribution.strategies import check_strategy, divides
from lightning_attr.callbacks import AttributionCallback, AttributionMonitor
from lightning_attr.callbacks.progress import progress
from lightning_attr.errors import AttributionError
from lightning_attr.evaluation import retrain_lds, retrain_loo, retrain_without
from lightning_attr.methods import TRAK, GradDot
from lightning_attr.objectives.objective import check_module
from lightning_attr.user_code.lightning_names import as_lightning_module, both, overrides, own

pl = pytest.importorskip("pytorch_lightning")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(pytorch_)?lightning.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning:(pytorch_)?lightning.*"),
    pytest.mark.filterwarnings("ignore::lightning_fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard.*"),  # tensorboard's own use of numpy
]

TRAIN, TARGETS = blobs(16), blobs(5, seed=1)
METHOD = TRAK(proj_dim=16)


def classes_of(package: Any, parts: Any) -> SimpleNamespace:
    """A module without and with the mixin, and a datamodule, of the classes of one package; `parts` has the rest."""

    class Part(package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))

        def forward(self, x: Tensor) -> Tensor:
            assert self.trainer is not None
            return self.network(x)

    class Plain(package.LightningModule):
        def __init__(self, learning_rate: float = 0.1) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.part = Part()

        def forward(self, x: Tensor) -> Tensor:
            return self.part(x)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = F.cross_entropy(self(batch[0]), batch[1])
            self.log("loss", loss)
            assert self.trainer.strategy is not None
            for logger in self.loggers:
                assert logger.experiment is not None
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=self.hparams["learning_rate"])

    class Mixed(AttributionMixin, Plain):
        pass

    class Data(package.LightningDataModule):
        moved = 0

        def train_dataloader(self) -> Any:
            return loader_of(TRAIN, shuffle=True)

        def test_dataloader(self) -> Any:
            return loader_of(TARGETS)

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            self.moved += 1
            return batch

    return SimpleNamespace(package=package, parts=parts, Plain=Plain, Mixed=Mixed, Data=Data)


WORLDS = {"lightning": classes_of(L, L.pytorch), "pytorch_lightning": classes_of(pl, pl)}


@pytest.fixture(params=WORLDS)
def world(request: pytest.FixtureRequest) -> Any:
    return WORLDS[request.param]


def fit(world: Any, kind: str = "Mixed", path: str | None = "store", **settings: Any) -> Any:
    """A trainer of a world after two epochs."""
    torch.manual_seed(3)
    callbacks = [] if path is None else [AttributionCallback(path, method=METHOD)]
    given = {"max_epochs": 2, "callbacks": callbacks, **settings}
    trainer = quiet_trainer(world.package.Trainer, **given)
    trainer.fit(getattr(world, kind)(), datamodule=world.Data())
    return trainer


# Fit and attribute ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Plain", "Mixed"])
def test_training_is_untouched(world: Any, kind: str) -> None:
    states, streams = [], []
    for path in (None, "store"):
        trainer = fit(world, kind, path, logger=True)
        states.append({name: value.clone() for name, value in trainer.lightning_module.state_dict().items()})
        streams.append(torch.get_rng_state())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert torch.equal(*streams)


@pytest.mark.parametrize("kind", ["Plain", "Mixed"])
def test_both_worlds_give_the_same_scores(kind: str) -> None:
    found = []
    for name, world in WORLDS.items():
        trainer = fit(world, kind, path=name)
        before = trainer.datamodule, trainer.callbacks, trainer.predict_loop, trainer.state
        found.append(trainer.attribute())
        assert found[-1].scores.shape == (16, 5)
        assert trainer.datamodule.moved > 0
        after = trainer.datamodule, trainer.callbacks, trainer.predict_loop, trainer.state
        assert all(one is other for one, other in zip(before, after, strict=True))
        assert trainer.lightning_module.trainer is trainer
        assert trainer.lightning_module.part.trainer is trainer
    assert torch.equal(found[0].scores.values, found[1].scores.values)
    assert torch.equal(found[0].self_influence, found[1].self_influence)


def test_exact_gradients_of_the_training_loss_are_autograds(world: Any) -> None:
    torch.manual_seed(0)
    module = world.Plain()
    trainer = quiet_trainer(world.package.Trainer)
    data = {"train_dataloaders": loader_of(TRAIN), "target_dataloaders": loader_of(TARGETS)}
    found = attribute(trainer, model=module, method=GradDot(exact=True), **data).scores.values

    def gradients(dataset: Any) -> Tensor:
        losses = [F.cross_entropy(module.part.network(x[None]), y[None]) for x, y in dataset]
        rows = [torch.autograd.grad(loss, list(module.parameters())) for loss in losses]
        return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])

    torch.testing.assert_close(found, gradients(TRAIN) @ gradients(TARGETS).T, rtol=1e-4, atol=1e-5)


def test_a_datamodule_of_the_other_world_gives_the_data() -> None:
    torch.manual_seed(0)
    for one, other in (WORLDS.values(), reversed(WORLDS.values())):
        module, trainer = one.Mixed(), quiet_trainer(one.package.Trainer)
        scores = [attribute(trainer, w.Data(), model=module, method=METHOD).scores.values for w in (one, other)]
        assert torch.equal(*scores)


def test_pickled_steps_come_back(world: Any) -> None:
    trainer = quiet_trainer(world.package.Trainer)
    kind = as_lightning_module(Doubles, trainer)
    assert as_lightning_module(Doubles, trainer) is kind
    assert issubclass(kind, world.package.LightningModule)
    again = pickle.loads(pickle.dumps(kind(3.0)))
    assert type(again) is kind
    assert trainer.predict(again, loader_of(torch.ones(1)))[0].tolist() == [3.0]


class Doubles(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def predict_step(self, batch: Tensor) -> Tensor:
        return self.factor * batch


class Spawned(AttributionMixin, pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.slow
def test_spawned_processes_attribute(tmp_path: Path) -> None:
    code = (
        "import cases, test_lightning_names as t, pytorch_lightning as pl, torch\n"
        "cases.leave_group_at_exit()\n"
        "if __name__ == '__main__':\n"
        "    data = dict(train_dataloaders=t.loader_of(t.TRAIN), target_dataloaders=t.loader_of(t.TARGETS))\n"
        "    torch.manual_seed(0)\n"
        "    model, found = t.Spawned(), []\n"
        "    for more in ({}, {'strategy': 'ddp_spawn', 'devices': 2}):\n"
        "        trainer = t.quiet_trainer(pl.Trainer, **more)\n"
        "        found.append(t.attribute(trainer, model=model, method=t.METHOD, **data).scores.values)\n"
        "    torch.testing.assert_close(*found)\n"
    )
    (tmp_path / "script.py").write_text(code)
    subprocess.run([sys.executable, "script.py"], env=environment(), check=True, timeout=300)


# Retraining -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vectorise", [True, False])
def test_both_worlds_retrain_alike(tmp_path: Path, vectorise: bool) -> None:
    found = []
    for name, world in WORLDS.items():
        make_trainer = partial(quiet_trainer, world.package.Trainer, max_epochs=2)
        given = {"num_subsets": 3, "seeds": 1, "progress": False, "vectorise": vectorise}
        found.append(retrain_lds(world.Mixed, make_trainer, world.Data, dirpath=tmp_path / name, **given))
    assert torch.equal(found[0].masks, found[1].masks)
    assert torch.equal(found[0].outputs, found[1].outputs)


def test_single_samples_and_sets_are_left_out(world: Any, tmp_path: Path) -> None:
    make_trainer, data = partial(quiet_trainer, world.package.Trainer, max_epochs=1), world.Data()
    given = {"seeds": 1, "progress": False}
    loo = retrain_loo(world.Mixed, make_trainer, data, dirpath=tmp_path / "loo", indices=[2, 5], **given)
    sets = retrain_without(world.Mixed, make_trainer, data, index_sets=[[2], [5]], dirpath=tmp_path / "sets", **given)
    assert loo.complete
    assert sets.complete


def test_retraining_refuses_parts_of_two_worlds(tmp_path: Path) -> None:
    one, other = WORLDS.values()
    make_trainer = partial(quiet_trainer, L.Trainer, max_epochs=1)
    for module, data in ((other.Mixed, one.Data), (one.Mixed, other.Data)):
        with pytest.raises(TypeError, match=r"come from one package.*`lightning`.*`pytorch_lightning`"):
            retrain_lds(module, make_trainer, data, dirpath=tmp_path / "truth", num_subsets=1)
    assert not (tmp_path / "truth").exists()


def test_arguments_of_retraining_are_known_in_both_worlds(world: Any, tmp_path: Path) -> None:
    make_trainer = partial(quiet_trainer, world.package.Trainer, max_epochs=1)
    with pytest.raises(TypeError, match=r"`module` of .+ to be a function"):
        retrain_lds(world.Mixed(), make_trainer, world.Data, dirpath=tmp_path, num_subsets=1)
    with pytest.raises(TypeError, match="`trainer` to return a Trainer, but got Mixed"):
        retrain_lds(world.Mixed, world.Mixed, world.Data, dirpath=tmp_path, num_subsets=1)


# What asks for classes ------------------------------------------------------------------------------------------------


def test_trainer_and_module_of_two_worlds_are_refused() -> None:
    here, other = WORLDS.values()
    loaders = {"train_dataloaders": loader_of(TRAIN), "targets": "train"}
    message = r"Trainer \(AttributionTrainer\) is one of `lightning` and Mixed.*`pytorch_lightning`.*"
    line = r"`trainer = pytorch_lightning.Trainer\(..., callbacks=\[AttributionCallback\(\)\]\)`"
    with pytest.raises(TypeError, match=message + line):
        quiet_trainer().attribute(model=other.Mixed(), **loaders)
    with pytest.raises(TypeError, match=message + line):
        quiet_trainer(max_epochs=1).fit(other.Mixed(), loader_of(TRAIN))
    with pytest.raises(TypeError, match=r"Trainer and Data to come from one package"):
        quiet_trainer(max_epochs=1).fit(here.Mixed(), datamodule=other.Data())
    with pytest.raises(TypeError, match=r"is one of `pytorch_lightning` and Plain.*`lightning`.*= lightning.Trainer"):
        attribute(quiet_trainer(pl.Trainer), model=here.Plain(), **loaders)


def test_attribution_trainer_fits_as_lightnings_does() -> None:
    states = []
    for kind in (L.Trainer, AttributionTrainer):
        torch.manual_seed(1)
        trainer = quiet_trainer(kind, max_epochs=1)
        trainer.fit(WORLDS["lightning"].Plain(), datamodule=WORLDS["lightning"].Data())
        states.append(trainer.lightning_module.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_modules_without_a_training_step_are_told_so(world: Any) -> None:
    check_module(world.Plain())
    with pytest.raises(TypeError, match="LightningModule with a `training_step`, but it is neither"):
        check_module(world.package.LightningModule())


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_sharding_strategies_are_refused(world: Any, name: str) -> None:
    strategy = object.__new__(getattr(world.parts.strategies, name))  # to make one takes a GPU
    with pytest.raises(AttributionError, match=f"{name} shards them"):
        check_strategy(strategy)


def test_strategies_that_divide_modules_are_known(world: Any) -> None:
    strategy = world.parts.strategies.ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)
    assert divides(strategy)
    with pytest.raises(AttributionError, match="tensor_parallel_size=1, but it is 2"):
        check_strategy(strategy)


def test_classes_are_found_under_both_names() -> None:
    assert both(L.Trainer) == (L.Trainer, pl.Trainer)
    assert own(L.Callback, quiet_trainer(pl.Trainer)) is pl.Callback
    assert own(L.Callback, WORLDS["lightning"].Mixed()) is L.Callback
    for world in WORLDS.values():
        assert overrides("train_dataloader", world.Data())
        assert not overrides("val_dataloader", world.Data())
        assert overrides("training_step", world.Plain())
        assert isinstance(AttributionMonitor(), world.package.Callback)


def test_a_single_callback_needs_no_list(world: Any) -> None:
    trainer = fit(world, callbacks=AttributionCallback("single", method=METHOD))
    assert trainer.attribute().scores.shape == (16, 5)


@pytest.mark.parametrize("loggers", WORLDS)
def test_monitor_logs_to_loggers_of_both_worlds(world: Any, loggers: str, tmp_path: Path) -> None:
    kinds = WORLDS[loggers].parts.loggers
    callbacks = [AttributionMonitor(k=2), AttributionCallback("store", method=METHOD)]
    logs = [kinds.CSVLogger(tmp_path / "csv"), kinds.TensorBoardLogger(tmp_path / "board")]
    fit(world, callbacks=callbacks, logger=logs)
    assert len(list((tmp_path / "csv").rglob("attribution/suspicious_samples-*.csv"))) == 2
    assert list((tmp_path / "board").rglob("events.out.*"))
    assert not list((tmp_path / "board").rglob("*.csv"))  # TensorBoard has it as text


@pytest.mark.parametrize("name", ["TQDMProgressBar", "RichProgressBar"])
def test_progress_is_shown_in_the_bars_of_both_worlds(
    world: Any, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = []

    class Shows(world.package.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            with progress(trainer, "Looking closely", 1) as advance:
                advance()
                if name == "RichProgressBar":
                    shown.extend(task.description for task in trainer.progress_bar_callback.progress.tasks)

    fit(world, path=None, callbacks=[getattr(world.parts.callbacks, name)(), Shows()], enable_progress_bar=True)
    assert "Looking closely" in (shown if name == "RichProgressBar" else capsys.readouterr().out)


def test_command_line_reads_the_callback_by_its_class_path(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    cli = pytest.importorskip(f"{world.parts.__name__}.cli", exc_type=ImportError)
    (tmp_path / "config.yaml").write_text(
        "seed_everything: 1\ntrainer:\n  max_epochs: 1\n  accelerator: cpu\n  logger: false\n"
        "  enable_checkpointing: false\n  enable_progress_bar: false\n  enable_model_summary: false\n  callbacks:\n"
        "    - class_path: lightning_attr.callbacks.AttributionCallback\n"
        "      init_args:\n        dirpath: store\n"
        "        method: {class_path: lightning_attr.methods.TRAK, init_args: {proj_dim: 16}}\n"
    )
    arguments = ["fit", f"--config={tmp_path}/config.yaml", "--model.learning_rate=0.2"]
    for kind in (world.package.Trainer, *([AttributionTrainer] if world.package is L else [])):
        made = cli.LightningCLI(world.Mixed, world.Data, trainer_class=kind, args=arguments, save_config_callback=None)
        assert made.trainer.attribute(made.datamodule).scores.shape == (16, 5)


def environment() -> dict[str, str]:
    """Other processes find the files of the tests."""
    tests = os.pathsep.join(map(str, Path(__file__).parents[:2]))
    paths = [tests, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_the_other_name_is_never_imported() -> None:
    code = (
        "import sys, lightning_attr, lightning_attr.callbacks, lightning_attr.evaluation\n"
        "from lightning_attr.callbacks import AttributionCallback, AttributionMonitor\n"
        "AttributionCallback(), AttributionMonitor()\n"
        "assert 'pytorch_lightning' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=environment(), timeout=120)
