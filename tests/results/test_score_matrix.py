"""The score matrix: extremes against a plain sort, blocks of rows, files."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_attr import ScoreMatrix
from lightning_attr.errors import AttributionError, CorruptedStoreError
from lightning_attr.results import score_matrix as scores_module
from lightning_attr.results.score_matrix import zeros

N, M = 23, 4


@pytest.fixture(params=[2**24, 9 * M, 3 * M, 1])
def block_elements(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(scores_module, "_BLOCK_ELEMENTS", request.param)
    return int(request.param)


@pytest.mark.parametrize("k", [1, 2, 5, 22, N])
def test_extremes_equal_a_plain_sort(block_elements: int, k: int) -> None:
    values = torch.randn(N, M)
    train_indices = torch.randperm(1000)[:N]
    scores = ScoreMatrix(values, train_indices)
    order = np.argsort(values.numpy(), axis=0)
    for (indices, extreme), expected in ((scores.topk(k), order[::-1][:k]), (scores.bottomk(k), order[:k])):
        assert indices.shape == extreme.shape == (M, k)
        np.testing.assert_array_equal(indices.numpy(), train_indices.numpy()[expected].T)
        np.testing.assert_array_equal(extreme.numpy(), np.take_along_axis(values.numpy(), expected, 0).T)
        assert (indices.dtype, extreme.dtype) == (torch.int64, torch.float32)


def test_ties_give_the_right_values_and_rows_that_hold_them(block_elements: int) -> None:
    values = torch.randint(3, (N, M)).float()
    indices, extreme = ScoreMatrix(values).topk(10)
    assert torch.equal(extreme, values.sort(0, descending=True).values[:10].T)
    for j in range(M):
        assert torch.equal(values[indices[j], j], extreme[j])
        assert indices[j].unique().numel() == 10


def test_row_blocks_cover_every_row_once_within_the_limit(block_elements: int) -> None:
    values = torch.randn(N, M)
    blocks = list(ScoreMatrix(values).row_blocks())
    assert torch.equal(torch.cat([block for _, block in blocks]), values)
    assert [row for rows, _ in blocks for row in range(rows.start, rows.stop)] == list(range(N))
    assert all(block.numel() <= max(block_elements, M) for _, block in blocks)
    assert len(blocks) == {2**24: 1, 9 * M: 3, 3 * M: 8, 1: N}[block_elements]


@pytest.mark.parametrize("k", [0, -1, N + 1])
def test_k_out_of_bounds(k: int) -> None:
    scores = ScoreMatrix(torch.randn(N, M))
    for extreme in (scores.topk, scores.bottomk):
        with pytest.raises(
            ValueError, match=rf"`k` of ScoreMatrix.* to be an integer from 1 to 23, but got {k}\. There are 23"
        ):
            extreme(k)


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"`values` of .* of shape \(n_train, n_target\), but got .* \(3,\)"):
        ScoreMatrix(torch.zeros(3))
    with pytest.raises(ValueError, match=r"`train_indices` of .* of shape \(3,\), but got .* \(2,\)"):
        ScoreMatrix(torch.zeros(3, 2), torch.arange(2))
    with pytest.raises(ValueError, match=r"`target_indices` of .* of shape \(2,\), but got .* \(2, 1\)"):
        ScoreMatrix(torch.zeros(3, 2), torch.arange(3), torch.zeros(2, 1))


def test_indices_are_those_of_the_whole_data_by_default() -> None:
    scores = ScoreMatrix(torch.zeros(3, 2))
    assert scores.shape == (3, 2)
    assert scores.train_indices.tolist() == [0, 1, 2]
    assert scores.target_indices.tolist() == [0, 1]
    assert scores.train_indices.dtype == torch.int64


PROVENANCE = {
    "method": "TRAK",
    "damping": 0.3,
    "snapshots": ["a", "b"],
    "projector": {"kind": "identity"},
    "none": None,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_save_and_load_keep_every_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.randn(N, M, dtype=dtype)
    values[0, 0] = float("nan")
    scores = ScoreMatrix(values, torch.randperm(N), torch.tensor([4, 9, 2, 7]), PROVENANCE)
    scores.save(tmp_path / "new" / "folder")
    found = ScoreMatrix.load(str(tmp_path / "new" / "folder"))
    assert found.values.dtype == dtype
    assert found.values.numpy().tobytes() == values.numpy().tobytes()
    assert torch.equal(found.train_indices, scores.train_indices)
    assert torch.equal(found.target_indices, scores.target_indices)
    assert found.provenance == PROVENANCE


def test_load_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CorruptedStoreError, match=r"holds no scores: scores\.json is missing"):
        ScoreMatrix.load(tmp_path)
    ScoreMatrix(torch.ones(3, 2)).save(tmp_path)
    (tmp_path / "scores.safetensors").unlink()
    with pytest.raises(CorruptedStoreError, match=r"scores\.safetensors is missing\. Save the result again"):
        ScoreMatrix.load(tmp_path)


def test_small_scores_are_in_memory(tmp_path: Path) -> None:
    made = zeros(3, 2, lambda: pytest.fail("no folder is needed"), torch.float64)
    assert torch.equal(made, torch.zeros(3, 2, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_scores_live_in_a_file_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(scores_module, "_IN_MEMORY", N * M * dtype.itemsize - 1)
    folder = tmp_path / "not" / "there yet"
    one = zeros(N, M, lambda: folder, dtype)
    assert torch.equal(one, torch.zeros(N, M, dtype=dtype))
    one += 1
    two = zeros(N, M, lambda: folder, dtype)  # another process of the run, or the next run
    assert two.sum() == 0
    assert one.sum() == N * M
    files = list(folder.iterdir())
    assert [file.stat().st_size for file in files] == [N * M * dtype.itemsize] * 2
    shutil.rmtree(folder)  # the run is over, its result is not
    assert one.sum() == N * M
    scores = ScoreMatrix(one)
    scores.save(tmp_path / "kept")
    assert torch.equal(ScoreMatrix.load(tmp_path / "kept").values, one)


def test_no_room_for_large_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores_module, "_IN_MEMORY", 0)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1000, 700, 300))
    zeros(15, 5, lambda: tmp_path)
    with pytest.raises(
        AttributionError, match=r"19 training samples for 4 targets need 304 bytes, but .* has 300 free"
    ):
        zeros(19, 4, lambda: tmp_path)


# Other libraries ------------------------------------------------------------------------------------------------------


def test_to_numpy_shares_memory(tmp_path: Path) -> None:
    values = torch.randn(N, M)
    ScoreMatrix(values).save(tmp_path)
    np.testing.assert_array_equal(ScoreMatrix.load(tmp_path).to_numpy(), values.numpy())
    shared = ScoreMatrix(values).to_numpy()
    shared[2, 1] = 7.0
    assert values[2, 1] == 7.0


def test_to_pandas_has_the_indices_as_labels() -> None:
    pytest.importorskip("pandas")
    rows, columns = torch.randperm(100)[:N], torch.randperm(100)[:M]
    scores = ScoreMatrix(torch.randn(N, M), rows, columns)
    frame = scores.to_pandas()
    assert frame.shape == (N, M)
    assert (frame.index.name, frame.columns.name) == ("train_index", "target_index")
    assert frame.loc[int(rows[3]), int(columns[2])] == scores.values[3, 2].item()
    assert frame[int(columns[1])].nlargest(2).index.tolist() == scores.topk(2)[0][1].tolist()
