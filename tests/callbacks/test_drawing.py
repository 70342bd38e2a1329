"""Rows that training never draws: known where the loader tells, without influence, and never among the proponents."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Sampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from cases import BlobClassifier, blobs, loader_of, quiet_trainer
from lightning_attr import AttributionResult
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.data.exposure import drawable_rows, from_bitmap, to_bitmap
from lightning_attr.methods import GAS, TRAK, GradDot, Influence, TracIn
from lightning_attr.projectors import IdentityProjector
from lightning_attr.store.feature_store import FeatureStore

N, M = 20, 6
EVEN = list(range(0, N, 2))


class Even(Sampler[int]):
    """A split of one's own, shuffled."""

    def __init__(self) -> None:
        self.order = list(EVEN)
        self.passes = 0

    def __len__(self) -> int:
        return len(EVEN)

    def __iter__(self) -> Iterator[int]:
        self.passes += 1
        self.order.sort(key=lambda i: hash((i, self.passes)))
        return iter(self.order)


class Random(Even):
    """Other rows each time."""

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(N)[:10].tolist())


class Endless(Even):
    def __iter__(self) -> Iterator[int]:
        while True:
            yield from EVEN


class Curriculum(Even):
    """Other rows in later epochs."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(range(4 * (self.epoch + 1)))


@pytest.mark.parametrize(
    ("settings", "batches", "expected"),
    [
        ({}, float("inf"), range(N)),
        ({"shuffle": True}, 1, range(N)),
        ({}, 2, range(12)),
        ({"drop_last": True}, float("inf"), range(18)),
        ({"sampler": SubsetRandomSampler(EVEN)}, 1, EVEN),
        ({"sampler": WeightedRandomSampler([1.0, 0.0] * 10, 8)}, float("inf"), EVEN),
        ({"batch_sampler": BatchSampler(SubsetRandomSampler(EVEN), 4, drop_last=False)}, float("inf"), EVEN),
        ({"batch_sampler": [[0, 2], [4]]}, float("inf"), [0, 2, 4]),
        ({"batch_sampler": [[0, 2], [4]]}, 1, [0, 2]),
        ({"sampler": EVEN}, float("inf"), EVEN),
        ({"sampler": EVEN}, 1, EVEN[:6]),
        ({"sampler": Even()}, float("inf"), EVEN),
        ({"sampler": Random()}, float("inf"), None),
        ({"sampler": Endless()}, float("inf"), None),
        ({"sampler": Curriculum()}, float("inf"), None),
        ({"sampler": ["a", "b"]}, float("inf"), None),
    ],
    ids=lambda value: "",
)
def test_what_loaders_tell(settings: dict[str, Any], batches: float, expected: Any) -> None:
    size = {} if "batch_sampler" in settings else {"batch_size": 6}
    found = drawable_rows(DataLoader(blobs(N), **size, **settings), batches)
    assert (found is None) == (expected is None)
    assert found is None or found.nonzero().flatten().tolist() == list(expected)


def test_asking_changes_nothing() -> None:
    sampler, state = Even(), torch.get_rng_state()
    order = list(sampler.order)
    drawable_rows(DataLoader(blobs(N), sampler=sampler))
    drawable_rows(DataLoader(blobs(N), sampler=Random()))
    assert (sampler.passes, sampler.order) == (0, order)
    assert torch.equal(torch.get_rng_state(), state)


def test_masks_are_written_and_read() -> None:
    mask = torch.rand(19) > 0.5
    assert torch.equal(from_bitmap(to_bitmap(mask), 19), mask)


def fit(folder: Path, loader: Any, **settings: Any) -> Any:
    own = {"method": TRAK(projector=IdentityProjector()), "snapshots": "all", "feature_dtype": "float32"}
    limits = {name: settings.pop(name) for name in ("limit_train_batches", "overfit_batches") if name in settings}
    trainer = quiet_trainer(max_epochs=2, callbacks=[AttributionCallback(folder, **{**own, **settings})], **limits)
    trainer.fit(BlobClassifier(), loader)
    return trainer


@pytest.mark.parametrize(
    "method",
    [
        TRAK(projector=IdentityProjector(), kernel="margin"),  # the other draws directions by row
        TracIn(IdentityProjector()),
        TracIn(exact=True),
        GAS(exact=True),
        GradDot(exact=True),
    ],
    ids=lambda method: type(method).__name__,
)
def test_scores_are_those_of_the_rows_alone(tmp_path: Path, method: Any) -> None:
    """Training on every other row of a data set is training on the data set of every other row."""
    split = fit(tmp_path / "split", loader_of(blobs(N), sampler=EVEN))
    alone = fit(tmp_path / "alone", loader_of(Subset(blobs(N), EVEN)))
    found, expected = (
        trainer.attribute(target_dataloaders=loader_of(blobs(M, seed=1)), method=method) for trainer in (split, alone)
    )
    assert found.trained_on is not None
    assert expected.trained_on is None
    assert found.trained_on.nonzero().flatten().tolist() == EVEN
    scale = expected.scores.values.abs().max().item()
    torch.testing.assert_close(found.scores.values[EVEN], expected.scores.values, rtol=1e-4, atol=1e-5 * scale)
    torch.testing.assert_close(found.self_influence[EVEN], expected.self_influence, rtol=1e-4, atol=1e-5)
    assert not found.scores.values[1::2].any()
    assert not found.self_influence[1::2].any()
    for name, value in expected.metrics.items():
        assert found.metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name


def test_never_among_the_proponents(tmp_path: Path) -> None:
    trainer = fit(tmp_path / "store", loader_of(blobs(N), sampler=SubsetRandomSampler(EVEN)))
    result = trainer.attribute(target_dataloaders=loader_of(blobs(M, seed=1)))
    for rows, _ in (result.scores.topk(10), result.scores.bottomk(10)):
        assert set(rows.flatten().tolist()) == set(EVEN)
    with pytest.raises(ValueError, match=r"There are 10 training samples that training drew"):
        result.scores.topk(11)
    for by in ("data_value", "self_influence"):
        assert result.select(1.0, by=by).tolist() == EVEN
    short = trainer.attribute(target_dataloaders=loader_of(blobs(M, seed=1)), topk=15)
    for end in ("topk", "bottomk"):
        assert torch.equal(getattr(short.scores, end)(10)[0], getattr(result.scores, end)(10)[0])
    assert torch.equal(short.trained_on, result.trained_on)

    for saved in (result, short):
        saved.save(tmp_path / "result")
        loaded = AttributionResult.load(tmp_path / "result")
        assert torch.equal(loaded.trained_on, saved.trained_on)
        assert torch.equal(loaded.scores.topk(10)[0], saved.scores.topk(10)[0])


@pytest.mark.parametrize(
    ("settings", "loader", "rows"),
    [
        ({"limit_train_batches": 2}, {}, 16),
        ({"limit_train_batches": 2}, {"shuffle": True}, N),
        ({"overfit_batches": 1}, {"shuffle": True}, 8),
        ({}, {"drop_last": True}, 16),
        ({}, {"drop_last": True, "shuffle": True}, N),
    ],
    ids=lambda value: "",
)
@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled train")
def test_limits_of_the_trainer(tmp_path: Path, settings: Any, loader: Any, rows: int) -> None:
    trainer = fit(tmp_path, loader_of(blobs(N), **loader), **settings)
    result = trainer.attribute(targets="train", method=Influence("empirical_fisher", damping=0.1))
    drawn = torch.arange(N) < rows
    if rows == N:  # all can be drawn: the journal knows which were
        drawn = result.exposure > 0
    assert (result.trained_on is None) == bool(drawn.all())
    assert result.trained_on is None or torch.equal(result.trained_on, drawn)
    assert torch.equal(result.scores.values.any(1), drawn)


def test_runs_of_other_rows_are_not_merged(tmp_path: Path) -> None:
    fit(tmp_path / "a", loader_of(blobs(N), sampler=EVEN))
    fit(tmp_path / "b", loader_of(blobs(N), sampler=EVEN[1:]))
    with pytest.raises(Exception, match="of a run that could draw other training samples"):
        FeatureStore.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")


@pytest.mark.parametrize(("method", "told"), [(Influence(solver="kfac"), True), (GradDot(exact=True), False)])
def test_methods_that_learn_of_all_rows_say_so(
    tmp_path: Path, method: Any, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = fit(tmp_path, loader_of(blobs(N), sampler=EVEN))
    trainer.attribute(target_dataloaders=loader_of(blobs(M, seed=1)), method=method)
    said = f"runs the module on all {N} training samples: the {N - len(EVEN)} that training never draws get scores of"
    assert (said in caplog.text) == told
