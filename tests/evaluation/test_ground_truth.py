"""The directory of a ground truth, without any training."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from lightning_attr.errors import AttributionError, CorruptedStoreError, StoreMismatchError
from lightning_attr.evaluation.ground_truth import GroundTruth, Records
from lightning_attr.evaluation.subsets import random_subsets, removals
from lightning_attr.files.io import write_tensors
from lightning_attr.files.sealed_records import seal

PLAN = random_subsets(6, num_subsets=3, alpha=0.5, repeats=2, seed=0)
RECIPE = {"n_train": 6, "n_target": 2, "learning_rate": 0.1}


@pytest.fixture
def records(tmp_path: Path) -> Records:
    return Records.prepare(tmp_path / "truth", PLAN, RECIPE)


def values(subset: int, repeat: int) -> torch.Tensor:
    return torch.tensor([10.0 * subset, float(repeat)])


def test_a_part_can_be_opened_and_nothing_is_mixed_up(records: Records) -> None:
    for one in list(PLAN)[:4]:
        records.write(one, values(one.subset, one.repeat))
    truth = GroundTruth.open(records.dirpath)
    assert truth.finished.tolist() == [[True] * 3, [True, False, False]]
    assert not truth.complete
    for one in list(PLAN)[:4]:
        assert torch.equal(truth.outputs[one.repeat, one.subset], values(one.subset, one.repeat))
        assert truth.seeds[one.repeat, one.subset] == one.seed
    assert truth.outputs[1, 1:].isnan().all()
    assert torch.equal(truth.masks, PLAN.masks)
    assert truth.provenance == RECIPE
    assert [one.name for one in records.unfinished()] == ["subset=1-repeat=1", "subset=2-repeat=1"]


@pytest.mark.parametrize(
    ("given", "kept"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_dtypes(records: Records, given: torch.dtype, kept: torch.dtype) -> None:
    records.write(next(iter(PLAN)), torch.tensor([1.0, 1 / 3], dtype=given))
    found = GroundTruth.open(records.dirpath).outputs
    assert found.dtype == kept
    assert torch.equal(found[0, 0], torch.tensor([1.0, 1 / 3], dtype=given).to(kept))


def test_what_is_finished_cannot_be_claimed(records: Records) -> None:
    one = next(iter(PLAN))
    claim = records.claim(one)
    assert claim is not None
    assert records.claim(one) is None
    records.write(one, values(0, 0))
    claim.release()
    assert records.claim(one) is None
    assert list((records.dirpath / "claims").iterdir()) == []


def test_bad_outputs_are_not_kept(records: Records) -> None:
    one = list(PLAN)[4]
    with pytest.raises(AttributionError, match=r"outputs of subset 1, repeat 1 to have the shape \(2,\).*got \(3,\)"):
        records.write(one, torch.ones(3))
    with pytest.raises(AttributionError, match="subset 1, repeat 1 diverged: the outputs of 1 of 2 targets are NaN or"):
        records.write(one, torch.tensor([1.0, torch.inf]))
    assert not (records.dirpath / "runs").exists()


def test_the_sweep_leaves_what_is_in_use(records: Records) -> None:
    first, second = list(PLAN)[:2]
    records.claim(first)
    records.claim(second)
    records.write(first, values(0, 0))
    young, old = records.dirpath / "runs" / ".a.12.tmp", records.dirpath / "runs" / ".b.12.tmp"
    young.touch()
    old.touch()
    os.utime(old, (0, 0))
    records.sweep()
    assert [file.name for file in (records.dirpath / "claims").iterdir()] == [f"{second.name}.0"]
    assert young.exists()
    assert not old.exists()


def test_another_plan_or_recipe_is_refused(records: Records) -> None:
    assert len(Records.prepare(records.dirpath, PLAN, RECIPE).plan) == 6
    before = {file: file.read_bytes() for file in records.dirpath.iterdir() if file.is_file()}
    for plan, recipe, message in (
        (removals(6, [[1]], repeats=2, seed=0), RECIPE, "kind = 'lds', here it is 'without'"),
        (PLAN, {**RECIPE, "learning_rate": 0.2}, "learning_rate = 0.1, here it is 0.2"),
        (PLAN, {**RECIPE, "momentum": 0.9}, "momentum = None, here it is 0.9"),
        (PLAN, {"n_train": 6, "n_target": 2}, "learning_rate = 0.1, here it is None"),
    ):
        with pytest.raises(StoreMismatchError, match=message):
            Records.prepare(records.dirpath, plan, recipe)
    assert {file: file.read_bytes() for file in records.dirpath.iterdir() if file.is_file()} == before


def test_masks_that_a_killed_process_has_not_written_are_written(records: Records) -> None:
    (records.dirpath / "masks.safetensors").unlink()
    with pytest.raises(CorruptedStoreError, match=r"masks.safetensors is missing"):
        GroundTruth.open(records.dirpath)
    assert torch.equal(Records.prepare(records.dirpath, PLAN, RECIPE).plan.masks, PLAN.masks)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "manifest.json is damaged: Expecting"),
        ("[]", "has the format None"),
        (seal({"format": 2, "plan": {}}), "manifest.json is damaged: plan or recipe is missing"),
    ],
)
def test_damaged_manifests(records: Records, text: str | bytes, message: str) -> None:
    (records.dirpath / "manifest.json").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(CorruptedStoreError, match=message):
        GroundTruth.open(records.dirpath)


def test_finished_retrainings_that_can_not_be_listed_are_not_said_to_be_missing(records: Records) -> None:
    (records.dirpath / "runs").write_text("in the place of the folder")
    for use in (records.unfinished, lambda: GroundTruth.open(records.dirpath)):
        with pytest.raises(CorruptedStoreError, match="runs cannot be listed: "):
            use()


def test_no_sets_of_samples_are_no_ground_truth(records: Records) -> None:
    none, place = torch.zeros(0, 4, dtype=torch.bool), {"kind": "masks", "truth": records.manifest["id"]}
    content = write_tensors(records.dirpath / "masks.safetensors", {"masks": none}, place)
    plan = {**records.manifest["plan"], "masks": content}
    (records.dirpath / "manifest.json").write_bytes(seal({**records.manifest, "plan": plan}))
    with pytest.raises(CorruptedStoreError, match=r"masks\.safetensors holds no sets of samples"):
        GroundTruth.open(records.dirpath)
