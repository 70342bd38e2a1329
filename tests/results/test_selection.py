"""What `AttributionResult.select` keeps for each objective, and what that is predicted to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_attr import AttributionResult, ScoreMatrix
from lightning_attr.errors import AttributionError
from lightning_attr.metrics import greedy_coreset
from lightning_attr.results.top_scores import TopScoresSum

N, M = 40, 6


def made(**changes: Any) -> AttributionResult:
    generator = torch.Generator().manual_seed(5)
    indices = torch.arange(N) * 2 + 1
    scores = changes.pop("scores", None)
    if scores is None:
        slopes = torch.rand(M, generator=generator)
        values = torch.randn(N, M, generator=generator)
        scores = ScoreMatrix(values, train_indices=indices, trained_on=changes.get("trained_on"), target_slopes=slopes)
    arguments = {"self_influence": torch.rand(N), "loss": torch.rand(N), "labels": torch.arange(N) % 3 + 4}
    return AttributionResult(scores, **{**arguments, **changes})


def test_prune_drops_what_hurts_and_nothing_else() -> None:
    result = made()
    harmful = result.scores.train_indices[result.data_value < 0]
    assert 4 < len(harmful) < N
    assert torch.equal(result.select(0.9, objective="prune"), result.select(0.9))
    kept = result.select(0.01, objective="prune")
    assert len(kept) == N - len(harmful)
    assert not torch.isin(kept, harmful).any()


def test_prune_keeps_the_share_of_every_class() -> None:
    kept = made().select(0.9, objective="prune", per_class=True)
    labels = made().labels
    assert labels is not None
    assert (labels[kept // 2].bincount()[4:] == torch.tensor([13, 12, 12])).all()


def test_coreset_is_the_greedy_one_as_indices() -> None:
    result = made()
    chosen = greedy_coreset(result.scores.values, 8)
    assert torch.equal(result.select(0.2, objective="coreset"), result.scores.train_indices[chosen].sort().values)


def test_coreset_balances_classes() -> None:
    result = made()
    kept = result.select(0.2, objective="coreset", per_class=True)
    assert result.labels is not None
    assert result.labels[kept // 2].bincount()[4:].tolist() == [3, 3, 3]


@pytest.mark.parametrize("objective", ["prune", "coreset", None])
@pytest.mark.parametrize("per_class", [False, True])
def test_what_training_never_drew_is_not_chosen(objective: str | None, per_class: bool) -> None:
    drawn = torch.arange(N) % 4 > 0
    result = made(trained_on=drawn)
    kept = result.select(0.5, objective=objective, per_class=per_class)
    assert drawn[kept // 2].all()
    assert len(kept) >= 15
    assert len(made(trained_on=drawn).select(1.0, objective=objective)) == 30


def test_predicted_effect_tells_good_choices_from_bad_ones() -> None:
    result = made()
    good = result.predicted_effect(result.select(0.8, objective="prune"))
    left = result.scores.train_indices[~torch.isin(result.scores.train_indices, result.select(0.2))]
    bad = result.predicted_effect(left)
    assert good.loss < 0 < bad.loss
    dropped = result.data_value.sort().values[:8].double().sum()
    assert float(good.loss) == pytest.approx(float(dropped), rel=1e-5)


def test_errors() -> None:
    result = made()
    for fraction in (1.5, 0, -0.1, float("nan"), "half"):
        with pytest.raises(ValueError, match=r"`fraction` of AttributionResult.select to be a number in \(0, 1\]"):
            result.select(fraction, objective="coreset")  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(ValueError, match=r"'prune', 'coreset' or None, but got 'corset'. Did you mean 'coreset'\?"):
        result.select(0.5, objective="corset")
    with pytest.raises(
        ValueError, match=r"'data_value' with objective='prune', but got 'self_influence'. An objective"
    ):
        result.select(0.5, by="self_influence", objective="prune")
    with pytest.raises(ValueError, match="Expected class labels for `per_class=True`"):
        made(labels=None).select(0.5, objective="coreset", per_class=True)
    for keep in ([0], [1, 1], [1.0], torch.ones(N, dtype=torch.bool), [[1]]):
        with pytest.raises(
            ValueError, match=r"`keep` of AttributionResult.predicted_effect to be indices .* each once"
        ):
            result.predicted_effect(keep)


def test_a_coreset_needs_all_scores() -> None:
    found = TopScoresSum(N, M, 3)
    found.add(range(N), slice(0, M), torch.randn(N, M))
    result = made(scores=found.total())
    with pytest.raises(AttributionError, match="Attribute without `topk`"):
        result.select(0.5, objective="coreset")
    with pytest.raises(AttributionError, match="Attribute without `topk`"):
        result.predicted_effect([0])
    assert len(result.select(0.9, objective="prune")) == 36
