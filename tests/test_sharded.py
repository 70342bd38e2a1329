"""Modules that two processes hold divided are trained and attributed as one process does it with whole ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sharded_cases import CASES, ON_CPUS, Divided, sharding
from torch import Tensor

from cases import leave_group_at_exit, loader_of, quiet_trainer
from lightning_attr import AttributionResult, FeatureStore, attribute
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.methods import TRAK, Influence, RepresentationSimilarity, TracIn
from lightning_attr.projectors import IdentityProjector
from lightning_attr.store import feature_store
from lightning_attr.store.shard_writer import ShardWriter

pytestmark = ON_CPUS

METHOD = TracIn(projector=IdentityProjector())
FLOAT64 = "MLP, float64"
METHODS = {  # of the float64 module, beside those of stored features
    "exact": TRAK(exact=True),
    "EK-FAC": Influence(solver="ekfac"),
    "CG": Influence(solver="cg"),
    "similarity": RepresentationSimilarity(),
}
SETTINGS = {
    "log": False,
    "batch_size": 4,
    "featurize": True,
    "feature_dtype": "float32",
    "on_error": "raise",
    "mode": "eval",
}


def trained(name: str, callbacks: list[Any]) -> tuple[Any, Divided]:
    """Train in two processes, with validations in between that gather parameters and let them lie."""
    trainer = quiet_trainer(
        accelerator="cpu", devices=2, strategy=sharding(2), max_epochs=2, callbacks=callbacks, gradient_clip_val=1.0
    )
    module = CASES[name]()
    L.seed_everything(1)
    go_on(trainer, module)
    return trainer, module


def go_on(trainer: Any, module: Divided) -> list[Tensor]:
    """Train up to the last epoch; give what this process has of parameters and moments in the end."""
    trainer.fit(module, loader_of(module.data(21), batch_size=4, shuffle=True), loader_of(module.data(6)))
    states = [value for state in trainer.optimizers[0].state.values() for value in state.values()]
    return [getattr(one, "_local_tensor", one).detach().clone() for one in (*module.parameters(), *states)]


def main(folder: Path) -> None:
    """What two processes run: training, attribution, more of the training, attribution of all."""
    for name in CASES:
        ends = []
        for callbacks in ([], [AttributionCallback(folder / name, METHOD, **SETTINGS)]):
            trainer, module = trained(name, callbacks)
            targets = loader_of(module.data(7, seed=1))
            if callbacks:
                trainer.attribute(target_dataloaders=targets)
            trainer.fit_loop.max_epochs = 3
            ends.append(go_on(trainer, module))
        torch.save(all(map(torch.equal, *ends)), folder / f"{name}-same-{trainer.global_rank}")
        trainer.attribute(target_dataloaders=targets).save(folder / f"{name}-{trainer.global_rank}")
        for kind, method in METHODS.items() if name == FLOAT64 else ():
            trainer.attribute(target_dataloaders=targets, method=method).save(folder / f"{kind}-{trainer.global_rank}")


def recorded(folder: Path, epochs: int, count: int = 2, **settings: Any) -> tuple[Any, list[Tensor]]:
    """Train the MLP, recording; give the callback, and what this process has of the parameters in the end."""
    callback = AttributionCallback(folder, METHOD, **{**SETTINGS, "on_error": "warn"})
    kept = ModelCheckpoint(folder / "checkpoints", filename="{epoch}", save_top_k=-1)
    trainer = quiet_trainer(
        accelerator="cpu", devices=count, strategy=sharding(count), max_epochs=epochs, callbacks=[callback, kept],
        enable_checkpointing=True,
    )  # fmt: skip
    module = CASES["MLP"]()
    L.seed_everything(1)
    trainer.fit(module, loader_of(module.data(40), batch_size=4), **settings)
    return callback, [p.to_local().detach().clone() for p in module.parameters()]


def interrupted(folder: Path) -> None:
    """What two processes run: a run, the same in two parts, and one in which the second process has no disk."""
    whole, expected = recorded(folder / "whole", 3)
    recorded(folder / "parts", 2)
    parts, found = recorded(folder / "parts", 3, ckpt_path=str(folder / "parts" / "checkpoints" / "epoch=1.ckpt"))
    assert all(map(torch.equal, found, expected))
    assert parts.stopped is None
    assert [one.weights for one in parts.store.snapshots] == [one.weights for one in whole.store.snapshots]
    with mock.patch.object(ShardWriter, "add", full_disk if os.environ["LOCAL_RANK"] == "1" else ShardWriter.add):
        full, found = recorded(folder / "full", 3)
    assert all(map(torch.equal, found, expected))  # the training goes on
    assert "No space left" in full.stopped.cause
    assert full.stopped.epoch == 0


def full_disk(*_: Any) -> None:
    raise OSError("No space left on device")


def killed(folder: Path) -> None:
    """What two processes run, of which the second is killed while it featurizes."""
    if os.environ.get("LOCAL_RANK") == "1":
        ShardWriter.add = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    recorded(folder / "killed", 3)


def resumed(folder: Path) -> None:
    """The same run again."""
    recorded(folder / "killed", 3)


TASKS = {"main": main, "interrupted": interrupted, "killed": killed, "resumed": resumed}


def launch(folder: Path, task: str = "main") -> subprocess.CompletedProcess[str]:
    """Run both processes; a hang is a failure."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MASTER"))}
    paths = [str(Path(__file__).parent), *filter(None, [environment.get("PYTHONPATH")])]
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, __file__, task, str(folder)],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def alone(name: str, store: Path, **settings: Any) -> AttributionResult:
    """What one process makes of a store, with a module fresh from its constructor."""
    module = CASES[name]()
    return attribute(
        quiet_trainer(accelerator="cpu"),
        model=module,
        train_dataloaders=loader_of(module.data(21), batch_size=5),
        target_dataloaders=loader_of(module.data(7, seed=1)),
        store=store,
        **settings,
    )


@pytest.mark.slow
def test_two_processes_with_divided_modules_are_as_one(tmp_path: Path) -> None:
    process = launch(tmp_path)
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-6000:]
    for name in CASES:
        tight = {"rtol": 1e-10, "atol": 1e-12} if name == FLOAT64 else {"rtol": 1e-5, "atol": 1e-6}
        own = FeatureStore.open(tmp_path / name)
        bare = FeatureStore.create(
            tmp_path / f"{name} alone", own.fingerprint, batch_size=4, feature_dtype=own.manifest.feature_dtype
        )
        for snapshot in own.snapshots:
            bare.add_snapshot(
                snapshot.key, own.weights(snapshot.key), epoch=snapshot.epoch, global_step=snapshot.global_step,
                learning_rate=snapshot.learning_rate, trainable=snapshot.trainable, rates=snapshot.rates,
            )  # fmt: skip
        one = alone(name, bare.path, method=METHOD)
        bare.reload()
        for rank in range(2):
            assert torch.load(tmp_path / f"{name}-same-{rank}"), f"{name}: training was disturbed"
            two = AttributionResult.load(tmp_path / f"{name}-{rank}")
            torch.testing.assert_close(two.scores.values, one.scores.values, msg=name, **tight)
            torch.testing.assert_close(two.self_influence, one.self_influence, msg=name, **tight)
        for snapshot in own.snapshots:
            for column in bare.shard(snapshot.key, 0):
                found, expected = own.column(snapshot.key, column), bare.column(snapshot.key, column)
                torch.testing.assert_close(found, expected, msg=f"{name}: {column}", **tight)
    for kind, method in METHODS.items():
        one = alone(FLOAT64, tmp_path / FLOAT64, method=method)
        for rank in range(2):
            two = AttributionResult.load(tmp_path / f"{kind}-{rank}")
            torch.testing.assert_close(two.scores.values, one.scores.values, msg=kind, rtol=1e-5, atol=1e-8)
            torch.testing.assert_close(two.self_influence, one.self_influence, msg=kind, rtol=1e-5, atol=1e-8)


@pytest.mark.slow
def test_runs_of_two_processes_that_end_early(tmp_path: Path) -> None:
    process = launch(tmp_path, "interrupted")
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-6000:]
    process = launch(tmp_path, "killed")  # and ends: the other one does not wait for ever
    assert process.returncode != 0
    again = launch(tmp_path, "resumed")
    assert again.returncode == 0, again.stdout[-4000:] + again.stderr[-6000:]
    whole, killed_one = (FeatureStore.open(tmp_path / name) for name in ("whole", "killed"))
    for snapshot in whole.snapshots:
        assert not killed_one.missing(snapshot.key)
        assert torch.equal(killed_one.column(snapshot.key, "features"), whole.column(snapshot.key, "features"))


if __name__ == "__main__":
    leave_group_at_exit()
    torch.set_num_threads(1)
    feature_store._SHARD_ROWS = 8  # so that each process featurizes some
    TASKS[sys.argv[1]](Path(sys.argv[2]))
