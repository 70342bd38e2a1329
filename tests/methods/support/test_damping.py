from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor
from truths import truth_of

from lightning_attr.attribution.scoring import score, score_self_influence
from lightning_attr.errors import AttributionError, StoreMismatchError
from lightning_attr.methods import (
    TRAK,
    AttributionMethod,
    DampedMethod,
    ScoreBlock,
    SnapshotFeatures,
    choose_damping,
    in_step,
)
from lightning_attr.methods.projected_influence import ProjectedInfluence
from lightning_attr.methods.support.damping import _held_out, check_damping
from lightning_attr.methods.support.subset_truth import mask_digests
from lightning_attr.metrics import linear_datamodeling_score
from lightning_attr.projectors import IdentityProjector

N, M, K = 48, 40, 6
GRID = [1e-3, 1e-2, 0.1, 0.3, 1.0, 3.0, 10.0]


def _snapshot(seed: int = 0, blocks: int = 3) -> SnapshotFeatures:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -2, K).double()
    features, targets = (torch.randn(size, K, generator=generator).double() * scales for size in (N, M))
    train = {"features": features, "out_to_loss": torch.ones(N).double(), "newton_weight": torch.ones(N).double()}
    rows = torch.arange(N).chunk(blocks)
    parts = [(range(int(r[0]), int(r[-1]) + 1), {name: v[r] for name, v in train.items()}) for r in rows]
    return SnapshotFeatures(lambda: iter(parts), {"features": targets}, target_rows=range(M), n_train=N)


def _scores(method: AttributionMethod, *snapshots: SnapshotFeatures) -> Tensor:
    return torch.cat([block.scores for block in method.score(snapshots)])


@pytest.mark.parametrize("best", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("count", [1, 2])
def test_the_damping_that_predicts_retraining_is_chosen(best: float, count: int) -> None:
    snapshots = [_snapshot(seed) for seed in range(count)]
    truth = truth_of(_scores(TRAK(damping=best), *snapshots))
    choice = choose_damping(TRAK(), [_snapshot(seed) for seed in range(count)], truth)
    assert choice.damping == best
    targets = list(choice.targets)
    for damping, found in zip(GRID, choice.lds, strict=True):  # the slow way
        values = _scores(TRAK(damping=damping), *(_snapshot(seed) for seed in range(count)))[:, targets]
        expected = linear_datamodeling_score(values, truth.masks, truth.outputs[..., targets], bootstrap=0).mean
        assert found == pytest.approx(expected.item(), abs=1e-12)
    assert max(choice.lds) == pytest.approx(1)


def test_auto_scores_as_the_number_does_and_tells_why() -> None:
    truth = truth_of(_scores(TRAK(damping=0.1), _snapshot()), seeds=2, noise=0.01)
    method, snapshot = TRAK(damping="auto", truth=truth), _snapshot()
    method.prepare([snapshot])
    torch.testing.assert_close(_scores(method, snapshot), _scores(TRAK(damping=0.1), _snapshot()), rtol=0, atol=0)
    choice = snapshot.evidence["damping_choice"]
    assert choice["damping"] == 0.1
    assert choice["grid"] == GRID
    assert max(choice["lds"]) == choice["lds"][GRID.index(0.1)]
    assert choice["targets"] == list(_held_out(M))
    assert method.config["damping"] == "auto"
    assert method.config["fitted_on"] == mask_digests(truth.masks)
    assert "truth" not in method.config
    assert "fitted_on" not in TRAK().config
    json.dumps([method.config, snapshot.evidence])


def test_the_choice_is_made_once_for_all_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    truth = truth_of(_scores(TRAK(damping=0.1), _snapshot()))
    monkeypatch.setattr("lightning_attr.attribution.scoring._MOST_TARGETS", 7)
    scores, _ = score(TRAK(damping="auto", truth=truth), [_snapshot()], N)
    expected = _scores(TRAK(damping=0.1), _snapshot()).float()
    torch.testing.assert_close(scores.values.float(), expected, rtol=1e-5, atol=1e-6)


def test_nothing_is_computed_twice_for_another_damping() -> None:
    truth = truth_of(_scores(TRAK(damping=0.1), _snapshot()))
    snapshot, reads = _snapshot(), []
    blocks = snapshot.blocks

    def counted() -> Any:
        reads.append("read")
        return blocks()

    object.__setattr__(snapshot, "blocks", counted)
    choose_damping(TRAK(), [snapshot], truth)
    assert len(reads) == 1 + len(GRID)  # the kernel once, and the scores of each


class Shrunk(AttributionMethod):
    """Any method with an attribute of this name will do."""

    def __init__(self) -> None:
        super().__init__(IdentityProjector())
        self.damping = 0.5

    def score(self, snapshots: Any) -> Any:
        for rows, columns in in_step(snapshots):
            scores = columns[0]["features"] @ snapshots[0].targets["features"].T
            yield ScoreBlock(rows, scores * (scores.abs() > self.damping), scores[:, 0])


def test_a_method_of_your_own() -> None:
    method = Shrunk()
    truth = truth_of(_scores(method, _snapshot()))
    assert choose_damping(method, [_snapshot()], truth, grid=[0.0, 0.25, 0.5]).damping == 0.5
    assert method.damping == 0.5


@pytest.mark.parametrize("method", [TRAK(), TRAK(newton_weights=False), ProjectedInfluence(per_layer=False)])
def test_what_is_kept_of_a_snapshot_serves_every_damping(method: DampedMethod) -> None:
    shared = _snapshot()
    for damping in (0.1, 3.0, 0.1):
        trial: Any = copy.copy(method)
        trial.damping = damping
        assert torch.equal(_scores(trial, shared), _scores(trial, _snapshot()))


def test_of_equal_dampings_the_highest() -> None:
    truth = truth_of(_scores(TRAK(), _snapshot()))
    assert choose_damping(TRAK(), [_snapshot()], truth, grid=[1.0, 1.0 + 1e-12, 100.0]).damping == 1.0 + 1e-12


@pytest.mark.parametrize(
    ("n_target", "step", "first"), [(1, 1, 0), (16, 1, 0), (17, 2, 1), (64, 5, 2), (1000, 11, 5), (20000, 23, 11)]
)
def test_held_out_targets(n_target: int, step: int, first: int) -> None:
    assert _held_out(n_target) == range(first, n_target, step)


def test_self_influence_alone_needs_no_choice() -> None:
    method = TRAK(damping="auto", truth=truth_of(torch.ones(N, M)))
    snapshot = _snapshot()
    nothing = SnapshotFeatures(snapshot.blocks, {"features": torch.zeros(0, K).double()})
    expected = score_self_influence(TRAK(damping=1.0), nothing, N)
    nothing.cache.clear()
    assert torch.equal(score_self_influence(method, nothing, N), expected)


def test_scoring_before_the_choice() -> None:
    method = TRAK(damping="auto", truth=truth_of(torch.ones(N, M)))
    with pytest.raises(ValueError, match='with `damping="auto"` it is still to be chosen: call `prepare`'):
        _scores(method, _snapshot())


@pytest.mark.parametrize(
    ("damping", "truth", "message"),
    [
        ("auto", None, r"`truth` with `damping=\"auto\"`, models retrained on subsets to choose by, but got none"),
        ("best", None, "`damping` of .+ to be a finite number >= 0, or 'auto', but got 'best'"),
        (-1.0, None, "`damping` of .+ to be a finite number >= 0, or 'auto', but got -1.0"),
        (float("nan"), None, "`damping` of .+ to be a finite number >= 0, or 'auto', but got nan"),
        (1.0, truth_of(torch.ones(N, M)), r"`truth` only with `damping=\"auto\"`, but got `damping=1.0`"),
        ("auto", truth_of(torch.ones(N, M), subsets=19), "at least 20 subsets, but it has 19"),
        ("auto", truth_of(torch.ones(N, M), kind="loo"), 'its kind is "loo"'),
    ],
)
def test_bad_arguments(damping: Any, truth: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_damping("TRAK", damping, truth)
    with pytest.raises(ValueError, match=message):
        TRAK(damping=damping, truth=truth)


def test_unfinished_truth() -> None:
    truth = truth_of(torch.ones(N, M))
    truth.outputs[0, 3, 1] = torch.nan
    with pytest.raises(AttributionError, match="to be finished"):
        TRAK(damping="auto", truth=truth)


@pytest.mark.parametrize(
    ("n", "m", "message"),
    [(N + 1, M, "has 49 training samples, and here are 48"), (N, M - 1, "has 39 targets, and here are 40")],
)
def test_truth_of_other_data(n: int, m: int, message: str) -> None:
    with pytest.raises(StoreMismatchError, match=message):
        score(TRAK(damping="auto", truth=truth_of(torch.ones(n, m))), [_snapshot()], N)


def test_an_empty_grid() -> None:
    with pytest.raises(ValueError, match="`grid` to hold at least one damping, but it is empty"):
        choose_damping(TRAK(), [_snapshot()], truth_of(torch.ones(N, M)), grid=[])


def test_truth_that_tells_nothing() -> None:
    truth = truth_of(torch.zeros(N, M))
    with pytest.raises(ValueError, match="its outputs, or the scores, are constant over the subsets"):
        choose_damping(TRAK(), [_snapshot()], truth)
