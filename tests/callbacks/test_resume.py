"""Killed, resumed, run again: the store ends up as after an unbroken run, and never holds two runs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from cases import BlobClassifier, blobs, loader_of, quiet_trainer
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.errors import StoreMismatchError
from lightning_attr.features.featurizer import Featurizer
from lightning_attr.files.io import read_tensors
from lightning_attr.methods import TRAK
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.projectors import KroneckerProjector
from lightning_attr.store.feature_store import FeatureStore

pytestmark = [
    # Only the checkpoints of a validation need validation data.
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    # Lightning's own, told to pytest a second time, under our name, by `pytest.warns`.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
    # A resumed run here does without the callback that wrote the checkpoint.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
]

KEY = AttributionCallback().state_key
ROWS = 1040  # three shards of 512 rows at most

METHOD = TRAK(projector=KroneckerProjector(8), kernel="margin")  # one pass a sample: they are counted


def run(
    folder: Path, *, epochs: int = 4, schedule: Any = "all", callbacks: Any = (), ckpt: Any = None, **other: Any
) -> Any:
    """A training of 3 steps per epoch, always the same unless told otherwise."""
    seed, rate, val = other.pop("seed", 0), other.pop("learning_rate", 0.1), other.pop("val", None)
    callback = AttributionCallback(folder, METHOD, schedule, batch_size=128, log=False, **other.pop("own", {}))
    trainer = quiet_trainer(
        L.Trainer,
        max_epochs=epochs,
        limit_train_batches=3,
        callbacks=[callback, *callbacks],
        enable_checkpointing=bool(callbacks),
        **other,
    )
    torch.manual_seed(3)
    loader = loader_of(blobs(ROWS), batch_size=32, shuffle=False)
    trainer.fit(BlobClassifier(seed=seed, learning_rate=rate), loader, val, ckpt_path=ckpt)
    return callback


def kill_at(snapshot: int, batch: int) -> None:
    """End this process without notice when it comes to a batch (9 a snapshot), or to the manifest after the last."""
    seen = [-1]  # the probe before training is a batch as well
    original, write_shard = Featurizer.__call__, FeatureStore.write_shard

    def call(self: Featurizer, *args: Any) -> Any:
        if seen[0] == 9 * snapshot + batch:
            os.kill(os.getpid(), signal.SIGKILL)
        seen[0] += 1
        return original(self, *args)

    def write(self: FeatureStore, key: str, shard: int, columns: Any) -> None:
        if batch == 9 and seen[0] == 9 * snapshot + 9:
            FeatureStore._save = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
        write_shard(self, key, shard, columns)

    Featurizer.__call__ = call  # type: ignore[method-assign]
    FeatureStore.write_shard = write  # type: ignore[method-assign]


def files(root: Path) -> list[Path]:
    """Files of snapshots that are in use."""
    return [path for path in root.rglob("*.safetensors") if not {"abandoned", "journal"} & set(path.parts)]


def journalled(store: FeatureStore) -> list[tuple[int, list[list[int]], Any]]:
    """What a journal says of each step; random streams may go on differently in a resumed run."""
    journal = store.journal()
    assert journal is not None
    return [(step.global_step, [rows.tolist() for rows in step.rows], step.groups) for step in journal.steps()]


def assert_same_stores(a: Path, b: Path) -> None:
    """Equal manifests, equal files, equal arrays."""
    first, second = FeatureStore.open(a), FeatureStore.open(b)
    assert first.manifest == second.manifest
    names, others = ({path.relative_to(root) for path in files(root)} for root in (a, b))
    assert names == others
    assert names
    for name in names:
        left, right = read_tensors(a / name), read_tensors(b / name)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left)
    assert journalled(first) == journalled(second)
    assert not list(b.rglob("*.tmp"))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "store"
    run(folder)
    return folder


# Snapshot and batch: before any shard, within and between shards, after the last batch, after the last shard is
# written but before it is entered; in the first, a middle and the last snapshot.
KILLS = [(0, 0), (0, 5), (1, 4), (2, 8), (1, 9), (3, 9)]


@pytest.mark.slow
@pytest.mark.parametrize(("snapshot", "batch"), KILLS)
def test_killed_and_run_again(tmp_path: Path, unbroken: Path, snapshot: int, batch: int) -> None:
    script = (
        "import sys, pathlib, warnings, torch; sys.path[:0] = sys.argv[3:5]; torch.set_num_threads(1)\n"
        "warnings.simplefilter('ignore')\n"
        "import test_resume\n"
        f"test_resume.kill_at({snapshot}, {batch})\n"
        "test_resume.run(pathlib.Path(sys.argv[1]))\n"
    )
    here = Path(__file__).parent
    command = [sys.executable, "-c", script, str(tmp_path / "store"), "", str(here), str(here.parent)]
    killed = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    broken = FeatureStore.open(tmp_path / "store")
    assert len(broken.snapshots) == snapshot + 1
    # A shard is written beside the batches of the next: the last full one may have been on its way.
    full = 2 if batch == 9 else batch // 4
    assert len(broken.snapshots[-1].shards) in {full, full - 1}
    run(tmp_path / "store")
    # What a writer that was killed left behind, and nothing else.
    assert all(path.suffix == ".tmp" for path in FeatureStore.open(tmp_path / "store").repair())
    assert_same_stores(unbroken, tmp_path / "store")
    assert not (tmp_path / "store" / "abandoned").exists()


def test_only_what_is_missing_is_computed_again(
    tmp_path: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same as above within one process: an exception in the middle, then again from the start."""
    rows: list[int] = []
    original = Featurizer.__call__

    def record(self: Featurizer, batch: Any, wanted: Any, out: Any = None) -> Any:
        rows.extend(wanted)
        if fail and len(rows) > ROWS + 600:
            raise KeyError("stop")
        return original(self, batch, wanted)

    monkeypatch.setattr(Featurizer, "__call__", record)
    fail = True
    with pytest.raises(KeyError, match="stop"):
        run(tmp_path, own={"on_error": "raise"})
    fail = False
    rows.clear()
    run(tmp_path)
    assert len(rows) == 4 + (ROWS - 512) + 2 * ROWS  # the probe; what the second snapshot lacked; two more
    assert_same_stores(unbroken, tmp_path)


def test_run_again_after_the_end(tmp_path: Path, unbroken: Path) -> None:
    run(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in files(tmp_path)}
    run(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in files(tmp_path)} == before
    assert_same_stores(unbroken, tmp_path)


def test_another_seed_is_refused(tmp_path: Path, unbroken: Path) -> None:
    before = {path: path.read_bytes() for path in unbroken.rglob("*") if path.is_file()}
    with pytest.raises(
        StoreMismatchError, match=r"holds another training run: it started from other weights.*Choose anoth"
    ):
        run(unbroken, seed=1)
    assert {path: path.read_bytes() for path in unbroken.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("first", "second", "moved"),
    [
        # From the first snapshot on, nothing of the other learning rate stays.
        ({"learning_rate": 0.2}, {}, [0, 1, 2, 3]),
        # Steps of the same size in another direction.
        ({"gradient_clip_val": 0.01}, {}, [0, 1, 2, 3]),
        # Another schedule: what the new one would not have is moved, as are integrals that started elsewhere.
        ({"schedule": "all"}, {"schedule": [2]}, [0, 1, 2, 3]),
        ({"schedule": [2]}, {"schedule": "all"}, [2, 3]),
        ({"learning_rate": 0.2, "schedule": [0, 1]}, {"schedule": [1, 2]}, [0, 1, 3]),
        # A longer and a shorter run.
        ({"epochs": 6}, {}, [4, 5]),
        ({"epochs": 3, "schedule": [0]}, {"schedule": [0]}, [2]),
    ],
)
def test_other_settings_are_never_mixed(tmp_path: Path, first: Any, second: Any, moved: list[int]) -> None:
    run(tmp_path / "store", **first)
    weights = {
        s.key: FeatureStore.open(tmp_path / "store").weights(s.key)
        for s in FeatureStore.open(tmp_path / "store").snapshots
    }
    with pytest.warns(UserWarning, match=r"is written anew from step \d+ on; moved epoch=.* to .*abandoned"):
        run(tmp_path / "store", **second)
    run(tmp_path / "fresh", **second)
    assert_same_stores(tmp_path / "fresh", tmp_path / "store")
    abandoned = sorted((tmp_path / "store" / "abandoned").iterdir())
    assert [folder.name[:10] for folder in abandoned] == [f"epoch={epoch:04d}" for epoch in moved]
    for folder in abandoned:  # nothing is lost
        kept = read_tensors(folder / "weights.safetensors")
        assert all(torch.equal(kept[name], tensor) for name, tensor in weights[folder.name].items())
        assert len(list((folder / "features").iterdir())) == 3


# Resuming from Lightning's checkpoints ------------------------------------------------------------------------------


def keeper(folder: Path, **settings: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **settings)


KEEPERS: dict[str, dict[str, Any]] = {
    "epoch end": {"save_on_train_epoch_end": True},
    "validation end": {"save_on_train_epoch_end": False},  # before the callback's turn
    "some steps": {"every_n_train_steps": 2},  # in the middle of an epoch, and at its end before the callback's turn
}


# Checkpoints within an epoch: Lightning says that it starts in the middle, and we say what we move.
@pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.filterwarnings("ignore:.*is written anew from step")
@pytest.mark.parametrize("schedule", ["all", [1]], ids=str)
@pytest.mark.parametrize("when", KEEPERS)
def test_resumed_from_a_checkpoint(tmp_path: Path, when: str, schedule: Any) -> None:
    """From any checkpoint, into the store of the whole run and into one that ends where the checkpoint was written."""
    val = loader_of(blobs(9, seed=1)) if when == "validation end" else None
    settings: dict[str, Any] = {"schedule": schedule, "val": val}
    whole = tmp_path / "whole"
    run(whole, callbacks=[keeper(tmp_path / "ckpt", **KEEPERS[when])], **settings)
    checkpoints = {int(path.stem.split("=")[1]): path for path in (tmp_path / "ckpt").glob("*.ckpt")}
    assert checkpoints.keys() >= ({4, 6} if when == "some steps" else {6})
    for step, checkpoint in checkpoints.items():
        if step not in {4, 6}:
            continue
        for reached in (12, step, step - 1):
            store = tmp_path / f"{step}-{reached}"
            shutil.copytree(whole, store)
            cut = FeatureStore.open(store)
            cut.set_aside([snapshot.key for snapshot in cut.snapshots if snapshot.global_step > reached])
            if reached < step and torch.load(checkpoint, weights_only=False)["callbacks"][KEY]["recorded"][1] > reached:
                continue  # a checkpoint after a snapshot implies the snapshot
            run(store, ckpt=checkpoint, **settings)
            if step % 3 == 0:
                assert_same_stores(whole, store)
            else:  # Lightning starts the epoch's batches from the first again: other weights from there on
                assert_same_course(whole, store, step)


def assert_same_course(a: Path, b: Path, step: int) -> None:
    """The same snapshots up to a step, and the same moments after it."""
    pairs = list(zip(FeatureStore.open(a).snapshots, FeatureStore.open(b).snapshots, strict=True))
    for left, right in pairs:
        assert (left.key, left.learning_rate) == (right.key, pytest.approx(right.learning_rate))
        assert left == right or left.global_step > step
        assert len(right.shards) == 3
    assert pairs


def test_resumed_while_a_snapshot_was_being_featurized(tmp_path: Path) -> None:
    """The checkpoint after validation is older than this epoch's snapshot, whose features are there in part."""
    val = loader_of(blobs(9, seed=1))
    settings: dict[str, Any] = {"val": val}
    run(tmp_path / "whole", callbacks=[keeper(tmp_path / "ckpt", **KEEPERS["validation end"])], **settings)
    shutil.copytree(tmp_path / "whole", tmp_path / "store")
    store = FeatureStore.open(tmp_path / "store")
    store.set_aside([snapshot.key for snapshot in store.snapshots if snapshot.global_step > 6])
    (tmp_path / "store" / store.snapshots[-1].folder / "features" / "00002.safetensors").unlink()
    store.repair()
    run(tmp_path / "store", ckpt=tmp_path / "ckpt" / "step=6.ckpt", **settings)
    assert_same_stores(tmp_path / "whole", tmp_path / "store")


def test_resumed_with_another_schedule(tmp_path: Path) -> None:
    """The snapshot of the checkpoint's step is there, but its learning rate is integrated since another one."""
    settings: dict[str, Any] = {"val": loader_of(blobs(9, seed=1)), "schedule": [0, 2]}
    run(tmp_path / "whole", callbacks=[keeper(tmp_path / "ckpt", **KEEPERS["validation end"])], **settings)
    run(tmp_path / "store", val=settings["val"])
    with pytest.warns(UserWarning, match=r"is written anew from step \d+ on; moved epoch="):
        run(tmp_path / "store", ckpt=tmp_path / "ckpt" / "step=9.ckpt", **settings)
    assert_same_stores(tmp_path / "whole", tmp_path / "store")


def test_resumed_into_another_run(tmp_path: Path) -> None:
    """The store of another run, or of the same one trained anew in another way, does not take this one's snapshots."""
    settings: dict[str, Any] = {}
    run(tmp_path / "own", callbacks=[keeper(tmp_path / "ckpt", **KEEPERS["epoch end"])], **settings)
    for name, other in (("seed", {"seed": 1}), ("rate", {"learning_rate": 0.2})):
        run(tmp_path / name, **other, **settings)
        before = (tmp_path / name / "manifest.json").read_bytes()
        with pytest.raises(StoreMismatchError, match=r"snapshot of step 6, after which this checkpoint was written"):
            run(tmp_path / name, ckpt=tmp_path / "ckpt" / "step=6.ckpt", **settings)
        assert (tmp_path / name / "manifest.json").read_bytes() == before


def test_resumed_into_a_new_directory(tmp_path: Path) -> None:
    settings: dict[str, Any] = {}
    run(tmp_path / "own", callbacks=[keeper(tmp_path / "ckpt", **KEEPERS["epoch end"])], **settings)
    run(tmp_path / "new", ckpt=tmp_path / "ckpt" / "step=6.ckpt", **settings)
    whole, rest = FeatureStore.open(tmp_path / "own").snapshots, FeatureStore.open(tmp_path / "new").snapshots
    assert [(s.key, s.weights, s.learning_rate) for s in rest] == [
        (s.key, s.weights, s.learning_rate) for s in whole[2:]
    ]


def test_callback_added_on_resuming(tmp_path: Path) -> None:
    """A checkpoint that knows nothing of the callback."""
    trainer = quiet_trainer(L.Trainer, max_epochs=2, enable_checkpointing=True, limit_train_batches=3)
    trainer.fit(BlobClassifier(), loader_of(blobs(ROWS), batch_size=32))
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    callback = run(tmp_path / "store", ckpt=tmp_path / "plain.ckpt")
    assert [snapshot.epoch for snapshot in callback.store.snapshots] == [2, 3]
    assert [snapshot.learning_rate for snapshot in callback.store.snapshots] == pytest.approx([0.3, 0.3])


def test_a_checkpoint_of_an_earlier_version_has_one_learning_rate(tmp_path: Path) -> None:
    callback = run(tmp_path / "store", epochs=1)
    state = {name: value for name, value in callback.state_dict().items() if name != "rates"} | {"learning_rate": 0.25}
    twin = AttributionCallback()
    twin.load_state_dict(state)
    model = BlobClassifier()
    for _ in range(2):
        model(torch.randn(2, 4)).sum().backward()
        twin._run.rates.add(torch.optim.SGD(model.parameters(), lr=0.5), model, _)
    assert twin._run.rates.of(ParameterLayout.of(model)) == (1.25, None)
    twin._run.rates.clear()
    assert twin._run.rates.of(ParameterLayout.of(model)) == (0.0, None)


def test_state_dict(tmp_path: Path) -> None:
    callback = run(tmp_path / "store", epochs=1)
    callback._run.rates.common = 0.25
    twin = AttributionCallback()
    twin.load_state_dict(callback.state_dict())
    assert twin.state_dict() == callback.state_dict()
    assert twin.store_path == tmp_path / "store"
    assert AttributionCallback("elsewhere").store_path == Path("elsewhere")
    elsewhere = AttributionCallback("elsewhere")
    elsewhere.load_state_dict(callback.state_dict())
    assert elsewhere.store_path == Path("elsewhere")
    torch.save(callback.state_dict(), tmp_path / "state")
    twin.load_state_dict(torch.load(tmp_path / "state", weights_only=True))  # plain values, as Lightning may ask for
    assert twin.state_dict() == callback.state_dict()
