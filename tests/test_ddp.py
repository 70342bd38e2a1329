"""Two processes score as one does, whatever does not divide by two."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from cases import BlobClassifier, blobs, leave_group_at_exit, loader_of, quiet_trainer
from lightning_attr import AttributionResult, FeatureStore, attribute
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.methods import TRAK, GradDot
from lightning_attr.projectors import EigenProjector
from lightning_attr.store import feature_store as store

METHODS = {"newton": TRAK(proj_dim=16), "published": TRAK(proj_dim=16, newton_weights=False)}
METHODS["eigen"] = TRAK(projector=EigenProjector(16))
METHODS["dot"] = GradDot(METHODS["newton"].projector)
MASK = torch.arange(21) % 4 == 0
ROW_OF_NAN = 407  # of 600; not one of the samples that stand for the data set when a module is checked
SPAWNED = ("odd", "part of a store")  # each takes two fresh interpreters

# name -> (training samples, targets, rows a shard, store, method). One process has fewer shards, targets or batches.
RUNS = {
    "odd": (21, 7, 8, None, "newton"),
    "one shard": (21, 7, 512, None, "newton"),
    "one target": (21, 1, 8, None, "newton"),
    "one of all": (1, 1, 512, None, "dot"),
    "published": (21, 7, 8, None, "published"),
    "new store": (21, 7, 8, "new", "newton"),
    "same store": (21, 7, 8, "new", "dot"),
    "full store": (21, 7, 8, "full", "newton"),
    "part of a store": (21, 7, 8, "part", "newton"),
    "snapshots only": (21, 7, 8, "bare", "newton"),
    "learned projection": (21, 7, 8, "learned", "eigen"),
    "strongest": (21, 7, 8, None, "newton"),
}


def run(trainer: Any, name: str, folder: Path) -> AttributionResult:
    train, targets, rows, path, method = RUNS[name]
    with mock.patch.object(store, "_SHARD_ROWS", rows):
        return attribute(
            trainer,
            model=BlobClassifier(),
            train_dataloaders=loader_of(blobs(train), batch_size=4, shuffle=True, drop_last=train > 4),
            target_dataloaders=loader_of(blobs(targets, seed=1), batch_size=2),
            method=METHODS[method],
            store=None if path is None else folder / path,
            noise_mask=MASK[:train],
            topk=10 if name == "strongest" else None,  # the second process has 8 of the 21 samples
        )


def fit_and_attribute(trainer: Any, spawned: bool) -> AttributionResult:
    """Train in two processes, featurizing beside it, then attribute."""
    train = loader_of(blobs(21), batch_size=4, shuffle=True)
    trainer.fit(BlobClassifier(), train)
    # After a spawning strategy the main process knows nothing of the fit's loaders.
    given = {"train_dataloaders": train} if spawned else {}
    return trainer.attribute(target_dataloaders=loader_of(blobs(7, seed=1)), **given)


def main(strategy: str, folder: Path) -> None:
    """What the processes of a strategy run."""
    torch.set_num_threads(1)
    for name in RUNS if strategy == "ddp" else SPAWNED:
        trainer = quiet_trainer(strategy=strategy, devices=2)
        result = run(trainer, name, folder)
        assert trainer.lightning_module is None
        result.save(folder / f"{name}-{trainer.global_rank}")
    callback = AttributionCallback(folder / "fit", method=METHODS["newton"], log=False)
    trainer = quiet_trainer(strategy=strategy, devices=2, max_epochs=2, callbacks=[callback])
    fit_and_attribute(trainer, strategy == "ddp_spawn").save(folder / f"fit-{trainer.global_rank}")


def fail(folder: Path) -> None:
    """A sample that the second process reads is NaN, and none of those that the module is checked on is."""
    data = blobs(600)
    data.tensors[0][ROW_OF_NAN] = float("nan")
    store._SHARD_ROWS = 300
    attribute(
        quiet_trainer(strategy="ddp", devices=2),
        model=BlobClassifier(),
        train_dataloaders=loader_of(data, batch_size=50),
        store=folder / "failed",
    )


def prepare(folder: Path) -> dict[str, AttributionResult]:
    """One process's results, and the stores that two processes are to go on with."""
    expected = {name: run(quiet_trainer(), name, folder) for name in RUNS}
    for name in ("full", "part", "bare"):
        shutil.rmtree(folder / name)
    shutil.copytree(folder / "new", folder / "full")
    shutil.copytree(folder / "new", folder / "part")
    next((folder / "part").rglob("00001.safetensors")).unlink()
    FeatureStore.open(folder / "part").repair()
    with mock.patch.object(store, "_SHARD_ROWS", RUNS["new store"][2]):
        bare = FeatureStore.create(folder / "bare", FeatureStore.open(folder / "new").fingerprint, batch_size=4)
    bare.add_snapshot(
        "current", FeatureStore.open(folder / "new").weights("current"), epoch=0, global_step=0, learning_rate=1.0
    )
    shutil.rmtree(folder / "new")
    return expected


def launch(strategy: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the strategy in a process of its own; a hang is a failure."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MASTER"))}
    paths = [str(Path(__file__).parent), *filter(None, [environment.get("PYTHONPATH")])]
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, __file__, strategy, str(folder)],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn"])
def test_two_processes_score_as_one(strategy: str, tmp_path: Path) -> None:
    expected = prepare(tmp_path)
    process = launch(strategy, tmp_path)
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-6000:]
    ranks = 2 if strategy == "ddp" else 1  # a spawning strategy gives the result to its main process
    for name in RUNS if strategy == "ddp" else SPAWNED:
        one = expected[name]
        for rank in range(ranks):
            two = AttributionResult.load(tmp_path / f"{name}-{rank}")
            if name == "strongest":
                assert torch.equal(two.scores.topk(10)[0], one.scores.topk(10)[0])
                torch.testing.assert_close(two.scores.bottomk(10)[1], one.scores.bottomk(10)[1], rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(two.data_value, one.data_value, rtol=1e-5, atol=1e-6)
            else:
                torch.testing.assert_close(two.scores.values, one.scores.values, rtol=1e-5, atol=1e-6, msg=name)
            torch.testing.assert_close(two.self_influence, one.self_influence, rtol=1e-5, atol=1e-6, msg=name)
            assert torch.equal(two.loss, one.loss), name
            assert torch.equal(two.labels, one.labels), name
            assert two.metrics == pytest.approx(one.metrics, abs=1e-5), name
            found, known = (dict(result.scores.provenance) for result in (two, one))
            dimensions, expected_dimensions = found.pop("evidence", {}), known.pop("evidence", {})
            assert found == known, name
            for key, evidence in expected_dimensions.items():  # sums in another order
                own, theirs = dict(dimensions[key]), dict(evidence)  # of one run and all others
                assert own.pop("kernel", None) == theirs.pop("kernel", None), name
                assert own == pytest.approx(theirs, rel=1e-5), name
    full = FeatureStore.open(tmp_path / "full")
    for name in ("new", "part", "bare") if strategy == "ddp" else ["part"]:
        own = FeatureStore.open(tmp_path / name)
        assert not own.missing("current")
        for shard in range(3):
            columns, expected_columns = own.shard("current", shard), full.shard("current", shard)
            assert columns.keys() == expected_columns.keys()
            assert all(torch.equal(columns[column], values) for column, values in expected_columns.items()), name
    check_fit(tmp_path, ranks)


def check_fit(folder: Path, ranks: int) -> None:
    """The store that two processes wrote while training gives one process the same scores."""
    one = attribute(
        quiet_trainer(),
        model=BlobClassifier(seed=3),
        train_dataloaders=loader_of(blobs(21), batch_size=4),
        target_dataloaders=loader_of(blobs(7, seed=1)),
        store=folder / "fit",
    )
    assert len(one.scores.provenance["snapshots"]) == 2
    for rank in range(ranks):
        two = AttributionResult.load(folder / f"fit-{rank}")
        torch.testing.assert_close(two.scores.values, one.scores.values, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_failure_of_one_process_ends_all_and_keeps_what_was_computed(tmp_path: Path) -> None:
    process = launch("failing", tmp_path)
    assert process.returncode != 0
    assert f"Look at dataset[{ROW_OF_NAN}]" in process.stderr
    failed = FeatureStore.open(tmp_path / "failed")
    failed.adopt("current")
    assert 1 in failed.missing("current")


if __name__ in ("__main__", "__mp_main__"):  # the second is what a spawned process calls it
    leave_group_at_exit()

if __name__ == "__main__":
    if sys.argv[1] == "failing":
        fail(Path(sys.argv[2]))
    else:
        main(sys.argv[1], Path(sys.argv[2]))
