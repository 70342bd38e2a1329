"""The strongest scores: against the whole matrix, block by block, and in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_attr import AttributionResult, ScoreMatrix
from lightning_attr.errors import AttributionError, CorruptedStoreError
from lightning_attr.results.top_scores import TopScores, TopScoresSum, check_topk

N, M, TOP = 29, 5, 6


def _values(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(N, M, generator=torch.Generator().manual_seed(2), dtype=dtype)


def _made(values: Tensor | None = None, step: int = 10, k: int = TOP) -> TopScores:
    values = _values() if values is None else values
    found = TopScoresSum(*values.shape, k)
    for start in range(0, len(values), step):
        rows = range(start, min(start + step, len(values)))
        found.add(rows, slice(3, None), values[start : rows.stop, 3:])
        found.add(rows, slice(0, 3), values[start : rows.stop, :3])
    return found.total()


@pytest.mark.parametrize("step", [1, 4, N])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, TOP, N])
def test_extremes_and_figures_are_those_of_the_whole_matrix(step: int, dtype: torch.dtype, k: int) -> None:
    values = _values(dtype)
    found, whole = _made(values, step, k), ScoreMatrix(values)
    for count in {1, (k + 1) // 2, k}:
        for ours, theirs in ((found.topk(count), whole.topk(count)), (found.bottomk(count), whole.bottomk(count))):
            assert torch.equal(ours[0], theirs[0])
            assert torch.equal(ours[1], theirs[1].float())
    assert found.shape == whole.shape
    torch.testing.assert_close(found.data_value, whole.data_value.float())
    assert found.effective_proponents == pytest.approx(whole.effective_proponents, rel=1e-12)


def test_ties_give_the_right_values_and_rows_that_hold_them() -> None:
    values = torch.randint(3, (N, M)).float()
    indices, extreme = _made(values, step=4, k=10).topk(10)
    assert torch.equal(extreme, values.sort(0, descending=True).values[:10].T)
    for j in range(M):
        assert torch.equal(values[indices[j], j], extreme[j])
        assert indices[j].unique().numel() == 10


def test_targets_without_proponents_count_as_none() -> None:
    assert _made(-torch.ones(N, M)).effective_proponents == 0


@pytest.mark.parametrize("k", [0, -1, TOP + 1])
def test_k_out_of_bounds(k: int) -> None:
    for extreme in (_made().topk, _made().bottomk):
        with pytest.raises(ValueError, match=rf"`k` of TopScores to be an integer from 1 to 6, but got {k}"):
            extreme(k)


@pytest.mark.parametrize("topk", [0, -3, 21, 2.0, "3", True])
def test_bad_topk(topk: Any) -> None:
    with pytest.raises(ValueError, match=r"`topk` of attribute to be an integer from 1 to 20, or None"):
        check_topk(topk, 20)


@pytest.mark.parametrize("topk", [None, 1, 20])
def test_good_topk(topk: Any) -> None:
    check_topk(topk, 20)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite(bad: float) -> None:
    values = _values()
    values[4, 2] = bad
    with pytest.raises(ValueError, match="`scores` to be finite, but got 1 NaN or infinite values"):
        _made(values)


# What a matrix would be needed for --------------------------------------------------------------------------------


def _result(**changes: Any) -> AttributionResult:
    return AttributionResult(**{"scores": _made(), "self_influence": torch.rand(N), "loss": torch.rand(N), **changes})


def test_values_are_not_there() -> None:
    for needs in (lambda: _made().values, _result().plot_scores):
        with pytest.raises(AttributionError, match=r"`topk=6`: .* no matrix of 29 x 5 scores\. Attribute"):
            needs()


def test_proponents_are_drawn_from_what_is_there() -> None:
    images = torch.rand(N, 4, 4)
    _, axes = _result().plot_proponents(images, images, targets=[1, 3], k=2)
    _, expected = _result(scores=ScoreMatrix(_values())).plot_proponents(images, images, targets=[1, 3], k=2)
    assert [ax.get_title() for ax in axes.flat] == [ax.get_title() for ax in expected.flat]
    with pytest.raises(ValueError, match="`k` of TopScores to be an integer from 1 to 6"):
        _result().plot_proponents(images, images, targets=[1], k=7)


# Files ------------------------------------------------------------------------------------------------------------


def test_save_and_load_keep_every_bit(tmp_path: Path) -> None:
    made = _made()
    more = {"train_indices": torch.randperm(N), "target_indices": torch.arange(M) + 7, "provenance": {"method": "TRAK"}}
    scores = TopScores(**{**vars(made), **more})
    scores.save(tmp_path / "new" / "folder")
    found = TopScores.load(str(tmp_path / "new" / "folder"))
    for name, value in vars(scores).items():
        other = getattr(found, name)
        assert torch.equal(other, value) if isinstance(value, Tensor) else other == value
    assert torch.equal(found.topk(2)[0], more["train_indices"][made.topk(2)[0]])


def test_a_result_is_loaded_as_what_it_was_saved(tmp_path: Path) -> None:
    dense = _result(scores=ScoreMatrix(_values()))
    for result in (_result(), dense, _result()):  # each takes the place of the one before
        result.save(tmp_path)
        found = AttributionResult.load(tmp_path)
        assert type(found.scores) is type(result.scores)
        assert found.metrics == result.metrics
        assert torch.equal(found.data_value, result.data_value)
        assert torch.equal(found.scores.topk(3)[0], result.scores.topk(3)[0])


def test_load_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CorruptedStoreError, match=r"holds no scores: scores\.json is missing"):
        TopScores.load(tmp_path)
    _made().save(tmp_path)
    (tmp_path / "top_scores.safetensors").unlink()
    with pytest.raises(CorruptedStoreError, match=r"top_scores\.safetensors is missing\. Save the result again"):
        TopScores.load(tmp_path)
