"""What every method promises, whatever it computes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import method_cases
import pytest
import torch
from method_cases import (
    CASES,
    COPY,
    FLIPPED,
    N_TARGET,
    N_TRAIN,
    TWINS,
    Case,
    record,
    scored,
    target_data,
    training_data,
)
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from lightning_attr import AttributionResult
from lightning_attr.errors import AttributionError

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:You defined a `validation_step`")

NewStore = Callable[[], Path]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("recorded") / "store")


@pytest.fixture
def new_store(recorded: Path, tmp_path: Path) -> NewStore:
    count = iter(range(100))

    def copy() -> Path:
        return shutil.copytree(recorded, tmp_path / f"store-{next(count)}")

    return copy


def enrolled(clause: str) -> pytest.MarkDecorator:
    """Every case but those that are exempt from a clause."""
    cases = [case for case in CASES if clause not in case.except_for]
    assert cases
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-4, what: str = "") -> None:
    atol = tolerance * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=atol, msg=lambda message: f"{what}: {message}")


@enrolled("shape")
def test_shapes_and_dtypes(case: Case, new_store: NewStore) -> None:
    result = scored(case.make(), new_store())
    assert result.scores.values.shape == (N_TRAIN, N_TARGET)
    assert result.self_influence.shape == (N_TRAIN,)
    assert result.scores.values.dtype == result.self_influence.dtype == torch.float32
    assert result.scores.values.isfinite().all()
    assert result.self_influence.isfinite().all()
    assert result.scores.values.std(0).min() > 0
    assert result.loss.shape == result.labels.shape == (N_TRAIN,)
    assert result.scores.provenance["method"] == type(case.make()).__name__


@enrolled("sign")
def test_a_copy_is_the_top_proponent_and_with_a_flipped_label_the_top_opponent(case: Case, new_store: NewStore) -> None:
    scores = scored(case.make(), new_store()).scores
    assert scores.topk(1)[0][0].item() == COPY
    assert scores.bottomk(1)[0][0].item() == FLIPPED


@enrolled("batches")
def test_batches_do_not_matter(case: Case, new_store: NewStore) -> None:
    expected = scored(case.make(), new_store())
    for batch_size, target_batch_size in [(1, 5), (24, 1)]:
        found = scored(case.make(), new_store(), batch_size=batch_size, target_batch_size=target_batch_size)
        close(found.scores.values, expected.scores.values)
        close(found.self_influence, expected.self_influence)


@enrolled("order")
def test_rows_follow_the_order_of_the_data(case: Case, new_store: NewStore) -> None:
    expected = scored(case.make(), new_store())
    order = torch.randperm(N_TRAIN)
    columns = torch.randperm(N_TARGET)
    train, targets = Subset(training_data(), order.tolist()), Subset(target_data(), columns.tolist())
    found = scored(case.make(), new_store(), train=train, targets=targets)
    close(found.scores.values, expected.scores.values[order][:, columns])
    close(found.self_influence, expected.self_influence[order])


@enrolled("twins")
def test_twins_have_equal_scores(case: Case, new_store: NewStore) -> None:
    result = scored(case.make(), new_store())
    first, second = TWINS
    close(result.scores.values[first], result.scores.values[second])
    close(result.self_influence[first], result.self_influence[second])


@enrolled("diagonal")
def test_self_influence_is_the_score_of_a_sample_for_itself(case: Case, new_store: NewStore) -> None:
    result = scored(case.make(), new_store(), targets=training_data())
    close(result.self_influence, result.scores.values.diagonal())


@enrolled("saving")
def test_results_are_saved_and_loaded(case: Case, new_store: NewStore, tmp_path: Path) -> None:
    result = scored(case.make(), new_store())
    result.save(tmp_path / "result")
    loaded = AttributionResult.load(tmp_path / "result")
    assert torch.equal(loaded.scores.values, result.scores.values)
    assert torch.equal(loaded.self_influence, result.self_influence)
    assert loaded.scores.provenance == result.scores.provenance
    assert loaded.metrics == result.metrics


@enrolled("strongest")
def test_the_strongest_alone_are_those_of_all(case: Case, new_store: NewStore) -> None:
    path = new_store()
    everything, few = scored(case.make(), path), scored(case.make(), path, topk=3)
    close(few.scores.topk(3)[1], everything.scores.topk(3)[1])
    close(few.self_influence, everything.self_influence)


@enrolled("NaN")
def test_nan_is_refused(case: Case, new_store: NewStore) -> None:
    x, y = training_data().tensors
    x[11, 2] = float("nan")
    with pytest.raises(AttributionError, match="NaN"):
        scored(case.make(), new_store(), train=TensorDataset(x, y))


@enrolled("resuming")
def test_a_killed_run_is_resumed(case: Case, new_store: NewStore, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = scored(case.make(), new_store())
    count = [0, 0]
    step = method_cases.Classifier.attribution_step

    def mortal(self: Any, batch: Any) -> Any:
        count[0] += 1
        if count[0] == count[1]:
            raise KeyboardInterrupt
        return step(self, batch)

    monkeypatch.setattr(method_cases.Classifier, "attribution_step", mortal)
    scored(case.make(), new_store())
    total = count[0]
    path = new_store()
    for at in (total // 3, 2 * total // 3):
        count[:] = [0, max(1, at)]
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            scored(case.make(), path)
    count[:] = [0, 0]
    found = scored(case.make(), path)
    assert torch.equal(found.scores.values, expected.scores.values)
    assert torch.equal(found.self_influence, expected.self_influence)


@pytest.mark.slow
def test_two_processes_score_as_one(recorded: Path, tmp_path: Path) -> None:
    cases = {i: case for i, case in enumerate(CASES) if "two processes" not in case.except_for}
    for i in cases:
        shutil.copytree(recorded, tmp_path / "two" / str(i))
        shutil.copytree(recorded, tmp_path / "one" / str(i))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MASTER"))}
    here = Path(__file__).parent
    paths = [str(here.parent), *filter(None, [environment.get("PYTHONPATH")])]
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, method_cases.__file__, str(tmp_path / "two"), str(tmp_path / "results")],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-6000:]
    for i, case in cases.items():
        one = scored(case.make(), tmp_path / "one" / str(i))
        for rank in range(2):
            two = AttributionResult.load(tmp_path / "results" / f"{i}-{rank}")
            close(two.scores.values, one.scores.values, what=case.name)
            close(two.self_influence, one.self_influence, what=case.name)
            assert torch.equal(two.loss, one.loss)
