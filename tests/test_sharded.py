"""Modules that two processes hold divided are trained and attributed as one process does it with whole ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from sharded_cases import CASES, Divided, sharding
from torch import Tensor

from cases import leave_group_at_exit, loader_of, quiet_trainer
from lightning_attr import AttributionResult, FeatureStore, attribute
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.methods import TRAK, Influence, RepresentationSimilarity, TracIn
from lightning_attr.projectors import IdentityProjector
from lightning_attr.store import feature_store

METHOD = TracIn(projector=IdentityProjector())
FLOAT64 = "MLP, float64"
METHODS = {  # of the float64 module, beside those of stored features
    "exact": TRAK(exact=True),
    "EK-FAC": Influence(solver="ekfac"),
    "CG": Influence(solver="cg"),
    "similarity": RepresentationSimilarity(),
}
SETTINGS = {"log": False, "featurize": True, "feature_dtype": "float32", "on_error": "raise", "mode": "eval"}


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
    torch.set_num_threads(1)
    feature_store._SHARD_ROWS = 8  # so that each process featurizes some
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


def launch(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run both processes; a hang is a failure."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MASTER"))}
    paths = [str(Path(__file__).parent), *filter(None, [environment.get("PYTHONPATH")])]
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, __file__, str(folder)],
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


if __name__ == "__main__":
    leave_group_at_exit()
    main(Path(sys.argv[1]))
