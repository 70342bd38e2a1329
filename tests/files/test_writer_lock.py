"""One writer at a time: two at once, killed ones, other machines, readers beside them, deleted and foreign stores."""

from __future__ import annotations

import errno
import json
import logging
import os
import platform
import shutil
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from cases import BlobClassifier, blobs, child, loader_of, quiet_trainer, wait_for
from lightning_attr import FeatureStore
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.errors import AttributionError, IncompleteFeaturesError, StoreInUseError, StoreMismatchError
from lightning_attr.files import claims
from lightning_attr.files import writer_lock as writing
from lightning_attr.files.writer_lock import WriterLock
from lightning_attr.methods import TRAK, Influence
from lightning_attr.store.manifest import Fingerprint

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")  # newer Pythons, of `child`

FINGERPRINT = Fingerprint(3, "abc", {"w": (2,)}, {"kind": "identity"})
SNAPSHOT: dict[str, Any] = {"epoch": 0, "global_step": 1, "learning_rate": 0.1}


def made(path: Path, *keys: str) -> FeatureStore:
    store = FeatureStore.create(path, FINGERPRINT)
    for key in keys:
        store.add_snapshot(key, {"w": torch.ones(2)}, **SNAPSHOT)
    return store


def hold(path: Path, file: str) -> None:
    """Write a store until killed."""
    with WriterLock(path):
        (path / file).touch()
        time.sleep(60)


def test_another_process_is_refused_by_name_until_the_writer_is_dead(tmp_path: Path) -> None:
    store = made(tmp_path / "store", "a")
    with child(hold, store.path, "begun") as process:
        wait_for((store.path / "begun").exists)
        refused = rf"is being written by another process: process {process.pid} on {platform.node()} \(.* ago\)\. A"
        for change in (
            lambda: store.add_snapshot("b", {"w": torch.ones(2)}, **SNAPSHOT),
            lambda: store.set_aside(["a"]),
            store.repair,
        ):
            with pytest.raises(StoreInUseError, match=refused):
                change()
        assert FeatureStore.open(store.path).weights("a")["w"].tolist() == [1, 1]  # reading goes on
        process.kill()
        process.join()
        store.add_snapshot("b", {"w": torch.ones(2)}, **SNAPSHOT)
    assert [s.key for s in FeatureStore.open(store.path).snapshots] == ["a", "b"]
    assert list((store.path / "claims").iterdir()) == []


def create(path: Path, ready: Path, result: Path) -> None:
    """Make a store in the instant in which the other process does."""
    while not ready.exists():
        pass
    try:
        result.write_text(FeatureStore.create(path, FINGERPRINT).manifest.id)
    except (StoreInUseError, StoreMismatchError) as error:
        result.write_text(f"refused: {type(error).__name__}")


def test_of_two_that_create_a_store_in_one_instant_one_is_refused(tmp_path: Path) -> None:
    results = [tmp_path / f"result{i}" for i in (0, 1)]
    with (
        child(create, tmp_path / "store", tmp_path / "ready", results[0]) as one,
        child(create, tmp_path / "store", tmp_path / "ready", results[1]) as two,
    ):
        time.sleep(0.3)
        (tmp_path / "ready").touch()
        for process in (one, two):
            process.join()
    found = sorted(result.read_text() for result in results)
    assert found[1].startswith("refused")
    assert FeatureStore.open(tmp_path / "store").manifest.id == found[0]


def test_threads_of_a_process_share_the_right(tmp_path: Path) -> None:
    store = made(tmp_path)
    with WriterLock(tmp_path):
        thread = threading.Thread(target=store.add_snapshot, args=("a", {"w": torch.ones(2)}), kwargs=SNAPSHOT)
        thread.start()
        thread.join()
        assert len(list((tmp_path / "claims").iterdir())) == 1
    assert [s.key for s in store.snapshots] == ["a"]


def plant(path: Path, age: float, **owner: Any) -> Path:
    """The claim of a writer on another machine."""
    file = path / "claims" / "writer.0"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"host": "elsewhere", "pid": 7, **owner}))
    os.utime(file, (time.time() - age, time.time() - age))
    return file


def test_a_writer_elsewhere_that_is_silent_is_taken_over(tmp_path: Path) -> None:
    store = made(tmp_path)
    plant(tmp_path, age=200)
    store.add_snapshot("a", {"w": torch.ones(2)}, **SNAPSHOT)
    assert list((tmp_path / "claims").iterdir()) == []


def test_a_writer_elsewhere_whose_clock_is_ahead_is_waited_for_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(writing, "_STALE_AFTER", 0.3)
    monkeypatch.setattr(writing, "_PAUSE", 0.05)
    store = made(tmp_path)
    plant(tmp_path, age=-1e6)
    with pytest.raises(StoreInUseError, match=r"process 7 on elsewhere \(1000000 s ahead of the clock here\)"):
        WriterLock(tmp_path, patience=False)
    with caplog.at_level(logging.WARNING):
        store.add_snapshot("a", {"w": torch.ones(2)}, **SNAPSHOT)
    assert "sign of life of process 7 on elsewhere" in caplog.text


def test_a_writer_elsewhere_that_gives_a_sign_of_life_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "_PAUSE", 0.05)
    store, file = made(tmp_path), plant(tmp_path, age=100)
    threading.Timer(0.3, os.utime, [file]).start()
    with pytest.raises(StoreInUseError, match="process 7 on elsewhere"):
        store.set_aside([])


def test_another_writer_that_took_over_is_noticed(tmp_path: Path) -> None:
    store = made(tmp_path)
    with WriterLock(tmp_path):
        store.add_snapshot("a", {"w": torch.ones(2)}, **SNAPSHOT)
        (tmp_path / "claims" / "writer.1").write_text(json.dumps({"host": "elsewhere", "pid": 8}))
        with pytest.raises(StoreInUseError, match="process 8 on elsewhere"):
            WriterLock(tmp_path, patience=False)
    assert (tmp_path / "claims" / "writer.1").exists()


def test_what_another_object_entered_is_kept(tmp_path: Path) -> None:
    first, second = made(tmp_path, "a"), FeatureStore.open(tmp_path)
    first.add_snapshot("b", {"w": torch.ones(2)}, **SNAPSHOT)
    second.add_snapshot("c", {"w": torch.ones(2)}, **SNAPSHOT)
    assert [s.key for s in FeatureStore.open(tmp_path).snapshots] == ["a", "b", "c"]


@pytest.mark.parametrize("again", [False, True])
def test_a_store_that_was_deleted_in_use_is_told(tmp_path: Path, again: bool) -> None:
    store = made(tmp_path / "store", "a")
    with WriterLock(store.path):
        shutil.rmtree(store.path)
        if again:
            other = made(tmp_path / "other")
            shutil.copytree(other.path, store.path)
        message = "holds another store than the one that was" if again else "was deleted while it was in use"
        for change in (store.reload, lambda: store.add_snapshot("b", {"w": torch.ones(2)}, **SNAPSHOT)):
            with pytest.raises(StoreMismatchError, match=message):
                change()
    assert again or not store.path.exists()


# Runs and attributions ------------------------------------------------------------------------------------------------


def fitted(path: str | Path, epochs: int = 2, **settings: Any) -> Any:
    callbacks = [AttributionCallback(path, TRAK(8), "all", log=False), *settings.pop("callbacks", ())]
    trainer = quiet_trainer(max_epochs=epochs, callbacks=callbacks)
    torch.manual_seed(0)
    trainer.fit(BlobClassifier(), loader_of(blobs(20)))
    return trainer


def test_a_run_beside_another_is_refused_before_it_trains(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    with child(hold, tmp_path / "store", "begun") as process:
        wait_for((tmp_path / "store" / "begun").exists)
        with pytest.raises(StoreInUseError, match=f"process {process.pid} on"):
            fitted(tmp_path / "store")
    fitted(tmp_path / "store")
    assert list((tmp_path / "store" / "claims").iterdir()) == []


def test_a_run_that_changes_its_directory_has_one_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lightning as L

    class Mover(L.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            folder = tmp_path / f"epoch{trainer.current_epoch}"
            folder.mkdir()
            monkeypatch.chdir(folder)

    monkeypatch.chdir(tmp_path)
    trainer = fitted("store", callbacks=[Mover()])
    assert len(FeatureStore.open(tmp_path / "store").snapshots) == 2
    assert trainer.attribute(targets="train").scores.shape == (20, 20)
    assert not list((tmp_path / "epoch1").iterdir())


def test_a_store_is_attributed_while_another_process_writes_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = fitted(tmp_path / "store")
    whole = trainer.attribute(targets="train")
    shutil.copytree(tmp_path / "store", tmp_path / "part")
    store = FeatureStore.open(tmp_path / "part")
    last = store.path / store.snapshots[1].folder / "features" / "00000.safetensors"
    last.unlink()
    store.repair()
    shutil.copytree(store.path, tmp_path / "none")
    (tmp_path / "none" / store.snapshots[0].folder / "features" / "00000.safetensors").unlink()
    FeatureStore.open(tmp_path / "none").repair()
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with ExitStack() as stack:
        for name in ("store", "part", "none"):
            stack.enter_context(child(hold, tmp_path / name, "begun"))
        for name in ("store", "part", "none"):
            wait_for((tmp_path / name / "begun").exists)
        beside = trainer.attribute(targets="train", store=tmp_path / "store", method=TRAK(8))
        assert torch.equal(beside.scores.values, whole.scores.values)
        with caplog.at_level(logging.WARNING):
            first = trainer.attribute(targets="train", store=tmp_path / "part", method=TRAK(8))
        assert first.scores.provenance["snapshots"] == [store.snapshots[0].key]
        assert f"Scores are without {store.snapshots[1].key}: features are missing there" in caplog.text
        with pytest.raises(IncompleteFeaturesError, match=r"No snapshot of .* has the features .* is being written by"):
            trainer.attribute(targets="train", store=tmp_path / "none", method=TRAK(8))
    after = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file() and "claims" not in file.parts}
    assert {file: content for file, content in after.items() if file.name != "begun"} == before


def test_a_store_that_may_only_be_read_is_attributed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = fitted(tmp_path / "store")
    expected = {}
    for method in (TRAK(8), Influence(solver="ekfac")):
        shutil.copytree(tmp_path / "store", tmp_path / "copy")
        expected[method] = trainer.attribute(targets="train", store=tmp_path / "copy", method=method).scores.values
        shutil.rmtree(tmp_path / "copy")
    own = Path.mkdir, Path.replace, Path.open

    def refuse(call: Any) -> Any:
        def refusing(self: Path, *args: Any, **kwargs: Any) -> Any:
            writes = call is not own[2] or any(letter in str(args[:1]) for letter in "wx+a")
            if writes and (tmp_path / "store") in (self.absolute(), *self.absolute().parents):
                raise OSError(errno.EROFS, "Read-only file system")
            return call(self, *args, **kwargs)

        return refusing

    for name, call in zip(("mkdir", "replace", "open"), own, strict=True):
        monkeypatch.setattr(Path, name, refuse(call))
    before = sorted(tmp_path.rglob("*"))
    for method, values in expected.items():
        found = trainer.attribute(targets="train", store=tmp_path / "store", method=method)
        assert torch.equal(found.scores.values, values)
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(AttributionError, match=r"(cannot be written|Could not write) .*Read-only file system"):
        FeatureStore.open(tmp_path / "store").set_aside([])


# Claims of ground truth -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["[]", "3", '{"host": 3, "pid": "x"}', "[" * 100_000, '{"pid": -1}', "\0"])
def test_a_claim_of_nonsense_is_nobodys(tmp_path: Path, content: str) -> None:
    own = claims.Claims(tmp_path, stale_after=50)
    (tmp_path / "a.0").write_text(content.replace('"pid": -1', f'"host": "{platform.node()}", "pid": -1'))
    (tmp_path / "a.lock").touch()
    os.utime(tmp_path / "a.0", (0, 0))
    assert "process" in str(own.owner("a"))
    assert own.take("a") is not None


def test_a_claim_from_the_future_is_void_when_nothing_is_heard_for_long_enough(tmp_path: Path) -> None:
    own = claims.Claims(tmp_path, stale_after=0.2)
    (tmp_path / "a.0").write_text(json.dumps({"host": "elsewhere", "pid": 7}))
    os.utime(tmp_path / "a.0", (time.time() + 1e6,) * 2)
    assert own.take("a") is None
    time.sleep(0.3)
    assert own.take("a") is not None
