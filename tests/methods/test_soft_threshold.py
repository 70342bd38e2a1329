from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from truths import truth_of

from lightning_attr import AttributionResult
from lightning_attr.attribution.scoring import score
from lightning_attr.errors import AttributionError, StoreMismatchError
from lightning_attr.evaluation import evaluate
from lightning_attr.methods import TRAK, GradDot, SnapshotFeatures, SoftThreshold, TracIn, soft_threshold
from lightning_attr.methods.support.subset_truth import mask_digests
from lightning_attr.metrics import linear_datamodeling_score
from lightning_attr.results.score_matrix import ScoreMatrix

N, M = 64, 5


def _scores() -> Tensor:
    return torch.randn(N, M, generator=torch.Generator().manual_seed(1)).double()


def _snapshot(blocks: int = 1) -> SnapshotFeatures:
    """Grad-Dot's scores at it are those of `_scores`."""
    train = {"features": _scores(), "out_to_loss": torch.ones(N).double()}
    snapshot = SnapshotFeatures.of(train, {"features": torch.eye(M).double()})
    rows = torch.arange(N).chunk(blocks)
    parts = [(range(int(r[0]), int(r[-1]) + 1), {name: v[r] for name, v in train.items()}) for r in rows]
    object.__setattr__(snapshot, "blocks", lambda: iter(parts))
    return snapshot


def _slow(values: Tensor, threshold: float) -> Tensor:
    return values.sign() * (values.abs() - threshold).clamp(min=0)


# The function -----------------------------------------------------------------------------------------------------


def test_zero_is_the_identity() -> None:
    scores = _scores()
    assert torch.equal(soft_threshold(ScoreMatrix(scores), 0).values, scores)


@pytest.mark.parametrize("threshold", [0.3, 100.0, torch.tensor(0.3)])
def test_one_threshold_for_all(threshold: Any) -> None:
    found = soft_threshold(ScoreMatrix(_scores()), threshold)
    torch.testing.assert_close(found.values, _slow(_scores(), float(threshold)), rtol=0, atol=1e-15)
    assert found.provenance["soft_threshold"] == pytest.approx(float(threshold))


def test_a_threshold_for_each_target() -> None:
    thresholds = torch.tensor([0.0, 0.1, 0.5, 1.0, 9.0]).double()
    found = soft_threshold(ScoreMatrix(_scores(), provenance={"method": "TRAK"}), thresholds)
    for j, threshold in enumerate(thresholds):
        torch.testing.assert_close(found.values[:, j], _slow(_scores()[:, j], threshold.item()), rtol=0, atol=1e-15)
    assert found.provenance == {"method": "TRAK", "soft_threshold": thresholds.tolist()}


@pytest.mark.parametrize("keep", [1, 7, N - 1, N, 10 * N])
def test_so_many_scores_are_kept(keep: int) -> None:
    found = soft_threshold(ScoreMatrix(_scores()), keep=keep)
    assert (found.values != 0).sum(0).tolist() == [min(keep, N)] * M
    for j in range(M):
        strongest = _scores()[:, j].abs().argsort(descending=True)[:keep]
        assert (found.values[strongest, j] != 0).all()
        torch.testing.assert_close(
            found.values[:, j], _slow(_scores()[:, j], found.provenance["soft_threshold"][j]), rtol=0, atol=1e-15
        )


def _sparse() -> tuple[Tensor, Tensor]:
    """Few true scores, and what an attribution finds of them under noise."""
    generator = torch.Generator().manual_seed(2)
    true = torch.zeros(N, M).double()
    for j in range(M):
        rows = torch.randperm(N, generator=generator)[:4]
        true[rows, j] = torch.tensor([4.0, 5.0, -6.0, 7.0]).double()
    return true, true + 3 * torch.rand(N, M, generator=generator).double()


def test_the_best_threshold_on_held_out_subsets_is_chosen() -> None:
    true, noisy = _sparse()
    truth, reported = truth_of(true, subsets=60), truth_of(true, subsets=60, seed=1)
    found = soft_threshold(ScoreMatrix(noisy), truth=truth)
    best = linear_datamodeling_score(found.values, truth.masks, truth.outputs, bootstrap=0).per_target
    sizes = noisy.abs().sort(0, descending=True).values
    for j in range(M):  # the slow way: every candidate, one after the other
        candidates = [0.0, *(sizes[N >> halving, j].item() for halving in range(1, 7))]
        scores = []
        for t in candidates:
            column, outputs = _slow(noisy[:, j : j + 1], t), truth.outputs[..., j : j + 1]
            scores.append(linear_datamodeling_score(column, truth.masks, outputs, bootstrap=0).mean.item())
        assert found.provenance["soft_threshold"][j] == pytest.approx(candidates[scores.index(max(scores))])
        assert best[j].item() == pytest.approx(max(scores))
    before, after = (
        linear_datamodeling_score(values, reported.masks, reported.outputs, bootstrap=0).mean.item()
        for values in (noisy, found.values)
    )
    assert after > before + 0.1


def test_what_was_fitted_on_is_told() -> None:
    truth = truth_of(_scores())
    found = soft_threshold(ScoreMatrix(_scores(), provenance={"fitted_on": ["before"]}), truth=truth)
    assert found.provenance["fitted_on"] == ["before", *mask_digests(truth.masks)]


def test_an_evaluation_refuses_what_was_fitted_on() -> None:
    truth, reported = truth_of(_scores()), truth_of(_scores(), seed=1)
    scores = soft_threshold(ScoreMatrix(_scores()), truth=truth)
    result = AttributionResult(scores, torch.ones(N), torch.ones(N))
    with pytest.raises(AttributionError, match="fitted"):
        evaluate(result, truth, bootstrap=0)
    assert evaluate(result, reported, bootstrap=0).metrics["lds"] > 0.5


def test_rows_and_columns_of_the_scores_may_be_in_another_order() -> None:
    true, noisy = _sparse()
    truth = truth_of(true)
    expected = soft_threshold(ScoreMatrix(noisy), truth=truth)
    rows, columns = torch.randperm(N), torch.randperm(M)
    found = soft_threshold(ScoreMatrix(noisy[rows][:, columns], rows, columns), truth=truth)
    torch.testing.assert_close(found.values, expected.values[rows][:, columns])


def test_a_target_whose_outputs_never_change_keeps_its_scores() -> None:
    truth = truth_of(_scores())
    truth.outputs[..., 2] = 1.0
    found = soft_threshold(ScoreMatrix(_scores()), truth=truth)
    assert found.provenance["soft_threshold"][2] == 0
    assert torch.equal(found.values[:, 2], _scores()[:, 2])


# The method -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{"threshold": 0.4}, {"keep": 9}, {"truth": truth_of(_sparse()[0])}])
@pytest.mark.parametrize("blocks", [1, 5])
def test_the_method_is_the_function_of_the_scores(arguments: dict[str, Any], blocks: int) -> None:
    snapshot = _snapshot(blocks)
    method = SoftThreshold(GradDot(), **arguments)
    method.prepare([snapshot])
    found = list(method.score([snapshot]))
    expected = soft_threshold(ScoreMatrix(_scores()), **arguments)
    assert len(found) == blocks
    torch.testing.assert_close(torch.cat([block.scores for block in found]), expected.values, rtol=0, atol=1e-15)
    assert method.config.get("fitted_on") == expected.provenance.get("fitted_on")
    assert method.config["of"] == GradDot().config
    if "threshold" not in arguments:
        assert snapshot.evidence["soft_threshold"] == expected.provenance["soft_threshold"]


def test_many_targets_are_scored_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    truth = truth_of(_sparse()[0])
    expected = soft_threshold(ScoreMatrix(_scores()), truth=truth)
    monkeypatch.setattr("lightning_attr.attribution.scoring._MOST_TARGETS", 2)
    snapshot = _snapshot()
    for _ in range(2):
        scores, _ = score(SoftThreshold(GradDot(), truth=truth), [snapshot], N)
        torch.testing.assert_close(scores.values.double(), expected.values, rtol=1e-6, atol=1e-6)
        assert snapshot.evidence["soft_threshold"] == expected.provenance["soft_threshold"]


def test_self_influence() -> None:
    (plain,) = GradDot().score([_snapshot()])
    (one,) = SoftThreshold(GradDot(), 0.5).score([_snapshot()])
    torch.testing.assert_close(one.self_influence, _slow(plain.self_influence, 0.5), rtol=0, atol=1e-15)
    for arguments in ({"keep": 3}, {"truth": truth_of(_scores())}):
        (chosen,) = SoftThreshold(GradDot(), **arguments).score([_snapshot()])
        assert torch.equal(chosen.self_influence, plain.self_influence)


@pytest.mark.parametrize("arguments", [{"threshold": 0.4}, {"keep": 9}, {"truth": truth_of(_scores())}])
def test_self_influence_without_targets(arguments: dict[str, Any]) -> None:
    train = {"features": _scores(), "out_to_loss": torch.ones(N).double()}
    snapshot = SnapshotFeatures(lambda: iter([(range(N), train)]), {"features": torch.zeros(0, M).double()})
    (block,) = SoftThreshold(GradDot(), **arguments).score([snapshot])
    assert block.scores.shape == (N, 0)
    assert block.self_influence.shape == (N,)


def test_it_asks_for_what_its_method_asks_for() -> None:
    inner = TRAK(proj_dim=7)
    method = SoftThreshold(inner, keep=2)
    assert method.projector is inner.projector
    assert method.select([1, 2, 3]) == [1, 2, 3]
    assert SoftThreshold(GradDot(), keep=2).select([1, 2, 3]) == [3]
    adam = TracIn(preconditioner="adam")
    assert SoftThreshold(adam, keep=2).needs_optimizer_state
    assert SoftThreshold(adam, keep=2).projector_config == adam.projector_config != TracIn().projector_config


# Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of the arguments `threshold`, `keep` and `truth`, but got none"),
        ({"threshold": 1.0, "keep": 2}, "but got `threshold` and `keep`"),
        ({"threshold": -1.0}, "`threshold` of .+ to be a finite number >= 0, but got -1.0"),
        ({"threshold": float("nan")}, "`threshold` of .+ to be a finite number >= 0, but got nan"),
        ({"keep": 0}, "`keep` of .+ to be an integer >= 1, but got 0"),
        ({"truth": truth_of(torch.ones(N, M), subsets=19)}, "at least 20 subsets, but it has 19"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        soft_threshold(ScoreMatrix(_scores()), **arguments)
    with pytest.raises(ValueError, match=message):
        SoftThreshold(GradDot(), **arguments)


def test_thresholds_of_the_wrong_number() -> None:
    with pytest.raises(ValueError, match=r"of the shape \(5,\), one a target, but got \(4,\)"):
        soft_threshold(ScoreMatrix(_scores()), torch.ones(4))


@pytest.mark.parametrize(("n", "m"), [(N + 1, M), (N, M + 1)])
def test_truth_of_other_data(n: int, m: int) -> None:
    truth = truth_of(torch.ones(n, m))
    with pytest.raises(StoreMismatchError, match="`truth` to be of the data at hand"):
        soft_threshold(ScoreMatrix(_scores()), truth=truth)
    with pytest.raises(StoreMismatchError, match="`truth` to be of the data at hand"):
        score(SoftThreshold(GradDot(), truth=truth), [_snapshot()], N)
