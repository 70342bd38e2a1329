"""The leaderboard's arithmetic, on outputs that are linear in what is removed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import leaderboard
import leaderboard_rows
import leaderboard_text
from leaderboard_text import FEW, LENGTH, N_REPORT, N_TRAIN, N_TUNE


class LinearBank:
    """Models whose outputs are sums of the effects of what they were trained on."""

    def __init__(self, effects: Tensor) -> None:
        self.effects = effects

    def outputs(self, kept: Tensor, seed: int) -> Tensor:
        return kept.double() @ self.effects


@pytest.fixture
def effects() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N_TRAIN, N_TUNE + N_REPORT, generator=generator, dtype=torch.float64)


def test_true_effects_predict_each_removal(effects: Tensor) -> None:
    kept = leaderboard_text.random_removals(30, FEW, 1)
    assert (~kept).sum(1).tolist() == [FEW] * 30
    truths = {"lds": (kept, LinearBank(effects).outputs(kept, 0))}
    found = leaderboard.judge(effects, truths, leaderboard.REPORT)["lds"]
    assert found[0] == pytest.approx(1.0)
    assert leaderboard.judge(-effects, truths, leaderboard.REPORT)["lds"][0] == pytest.approx(-1.0)


def test_a_query_loses_the_effects_of_its_own_proponents(effects: Tensor) -> None:
    bank = LinearBank(effects)
    whole = bank.outputs(torch.ones(1, N_TRAIN), 0)[0]
    rises = leaderboard.loss_rises(effects, bank, whole)
    own = effects[:, N_TUNE : N_TUNE + leaderboard.ASKED]
    torch.testing.assert_close(rises, own.topk(FEW, dim=0).values.sum(0))
    mean, low, high = leaderboard.interval(rises)
    assert low < mean < high
    assert mean == pytest.approx(rises.mean().item())


def test_bm25_is_its_formula() -> None:
    scores = leaderboard_rows.bm25(None)
    train, query = leaderboard_text.load().train, leaderboard_rows.queries()[3].tolist()
    expected = 0.0
    for token in set(query):
        holding = sum(token in chunk for chunk in train.tolist())
        count = train[7].tolist().count(token)
        expected += math.log(1 + (N_TRAIN - holding + 0.5) / (holding + 0.5)) * count * 2.5 / (count + 1.5)
    assert scores[7, 3].item() == pytest.approx(expected, rel=1e-5)


def test_batches_hold_every_chunk_once_an_epoch() -> None:
    rows = leaderboard_text.batches(0)
    assert len(rows) == leaderboard_text.STEPS
    epochs = torch.tensor(rows).view(leaderboard_text.EPOCHS, -1)
    assert (epochs.sort(1).values == torch.arange(N_TRAIN)).all()
    assert leaderboard_text.load().train.shape == (N_TRAIN, LENGTH)
