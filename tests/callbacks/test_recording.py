"""A run and the store that it finds: begun, continued, refused, and rid of what the run does not come to again."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_attr.callbacks.recording import Recording, announce, give_up
from lightning_attr.errors import StoreMismatchError
from lightning_attr.files.io import digest
from lightning_attr.store.feature_store import FeatureStore
from lightning_attr.store.manifest import Fingerprint

FINGERPRINT = Fingerprint(10, "abc", {"w": (2,)}, {"kind": "identity"})


def weights(step: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((2,), float(step))}


def begin(path: Path, recording: Recording | None = None, **changes: Any) -> FeatureStore:
    settings = {"batch_size": 4, "started": "start", "feature_dtype": "float16", **changes}
    (recording or Recording()).begin(path, settings.pop("fingerprint", FINGERPRINT), **settings)
    return FeatureStore.open(path)


def add(store: FeatureStore, recording: Recording, step: int, **changes: Any) -> Recording:
    values = {"epoch": step - 1, "global_step": step, "learning_rate": 0.1, "weights": weights(step), **changes}
    recording.add(store, f"step={step}", **values)
    return Recording(values["epoch"], step, digest(values["weights"]))


def recorded(path: Path, steps: int = 3) -> tuple[FeatureStore, list[Recording]]:
    store, recordings = begin(path), [Recording()]
    for step in range(1, steps + 1):
        recordings.append(add(store, recordings[-1], step))
    return store, recordings


def keys(path: Path) -> list[str]:
    return [snapshot.key for snapshot in FeatureStore.open(path).snapshots]


def test_a_new_store_knows_what_it_is_for(tmp_path: Path) -> None:
    store = begin(tmp_path, feature_dtype="bfloat16")
    assert (store.fingerprint, store.manifest.run) == (FINGERPRINT, "start")
    assert store.manifest.feature_dtype == "bfloat16"
    assert store.manifest.shard_rows % 4 == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"started": "other"}, "another training run: it started from other weights"),
        ({"fingerprint": Fingerprint(11, None, {"w": (2,)}, None)}, "10 samples, but this one has 11"),
        ({"feature_dtype": "float32"}, "keeps features in float16, but here `feature_dtype` is 'float32'"),
        (
            {"started": None, "recording": Recording(4, 5, "of no snapshot")},
            "another training run: the snapshot of step 5, after which this checkpoint was written, is not in it",
        ),
    ],
)
def test_the_store_of_another_run_is_refused_and_stays(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    recorded(tmp_path)
    before = (tmp_path / "manifest.json").read_bytes()
    with pytest.raises(StoreMismatchError, match=message):
        begin(tmp_path, **changes)
    assert (tmp_path / "manifest.json").read_bytes() == before


def test_the_same_run_again_keeps_its_snapshots(tmp_path: Path) -> None:
    recorded(tmp_path)
    store, recording = begin(tmp_path), Recording()
    for step in (1, 2, 3):
        recording = add(store, recording, step)
    assert keys(tmp_path) == ["step=1", "step=2", "step=3"]
    assert not (tmp_path / "abandoned").exists()


@pytest.mark.parametrize("changes", [{"weights": weights(9)}, {"learning_rate": 0.2}])
def test_another_course_sets_the_rest_aside(tmp_path: Path, changes: dict[str, Any]) -> None:
    store, recordings = recorded(tmp_path)
    assert [snapshot.key for snapshot in recordings[1].ahead(store)] == ["step=2", "step=3"]
    with pytest.warns(UserWarning, match="is written anew from step 2 on; moved step=2, step=3 to"):
        add(store, recordings[1], 2, **changes)
    assert keys(tmp_path) == ["step=1", "step=2"]
    assert sorted(folder.name for folder in (tmp_path / "abandoned").iterdir()) == ["step=2", "step=3"]


def test_resuming_keeps_what_lies_ahead_as_long_as_it_is_what_the_run_records_again(tmp_path: Path) -> None:
    _, recordings = recorded(tmp_path, steps=4)
    store = begin(tmp_path, recordings[1], started=None)
    recording = add(store, recordings[1], 2)
    assert keys(tmp_path) == ["step=1", "step=2", "step=3", "step=4"]
    with pytest.warns(UserWarning, match="is written anew from step 3 on; moved step=3, step=4 to"):
        add(store, recording, 3, weights=weights(9))
    assert keys(tmp_path) == ["step=1", "step=2", "step=3"]


def test_nothing_is_given_up_in_silence(tmp_path: Path) -> None:
    store, _ = recorded(tmp_path, steps=1)
    give_up(store, [])
    assert keys(tmp_path) == ["step=1"]


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({"bytes_a_row": 400_000, "weight_bytes": 1_000_000, "snapshots": 3}, "features of 10 .* at 3 .* 15.00 MB"),
        ({"bytes_a_row": 400_000, "weight_bytes": 0, "snapshots": None}, "features of 10 .* each snapshot, .* 4.00 MB"),
        ({"bytes_a_row": 0, "weight_bytes": 2_000_000, "snapshots": 2}, "keeps the weights at 2 .* 4.00 MB"),
    ],
)
def test_what_will_be_written_is_said(
    tmp_path: Path, sizes: dict[str, Any], text: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        announce(begin(tmp_path), **sizes)
    (record,) = (record for record in caplog.records if "Attribution keeps" in record.getMessage())
    assert re.search(text, record.getMessage())
