"""A dear method on the candidates of a quick one: against both on everything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from method_cases import N_TARGET, N_TRAIN, random_truth, record, scored

from cases import quiet_trainer
from lightning_attr import AttributionResult, attribute
from lightning_attr.errors import AttributionError, StoreMismatchError
from lightning_attr.evaluation import evaluate
from lightning_attr.methods import (
    SOURCE,
    TRAK,
    ConjugateGradient,
    GradDot,
    Influence,
    KNNShapley,
    TracIn,
    TrackStar,
)
from lightning_attr.projectors import IdentityProjector, KroneckerProjector
from lightning_attr.results import RerankedScores

C = 4


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("recorded") / "store")


QUICK = [(Influence(solver="ekfac"), None), (SOURCE(2), 2)]
SLOW = [
    (Influence(solver=ConjugateGradient(tolerance=1e-6)), None),
    (Influence(snapshots="all"), 2),
    (Influence(relative="loss", solver="explicit"), None),
    (TracIn(exact=True), 2),
    (KNNShapley(k=3), None),
    (GradDot(IdentityProjector()), 2),
]


@pytest.mark.parametrize(("dear", "topk"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_candidates_have_the_scores_that_the_dear_method_gives_them_alone(
    recorded: Path, dear: Any, topk: int | None
) -> None:
    quick = TRAK(projector=IdentityProjector())
    found = scored(quick, recorded, rerank=dear, candidates=C, topk=topk, batch_size=3)
    first, second = scored(quick, recorded), scored(dear, recorded).scores.values
    assert isinstance(found.scores, RerankedScores)
    for name, descending in (("topk", True), ("bottomk", False)):
        rows, scores = getattr(found.scores, name)(C)
        strongest = getattr(first.scores, name)(C)[1]
        for j in range(N_TARGET):
            chosen = first.scores.values[rows[j], j].sort().values  # of twins either may be chosen
            torch.testing.assert_close(chosen, strongest[j].sort().values)
            torch.testing.assert_close(scores[j], second[rows[j], j], rtol=1e-4, atol=1e-5)
            assert torch.equal(scores[j], scores[j].sort(descending=descending).values)
    torch.testing.assert_close(found.self_influence, first.self_influence)
    torch.testing.assert_close(found.data_value, first.data_value)
    assert found.scores.provenance["method"] == "TRAK"
    assert found.scores.provenance["rerank"]["method"] == type(dear).__name__
    assert found.scores.provenance["rerank"]["candidates"] == C


def test_no_training_sample_is_solved_for_that_nobody_asked_for(
    recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_attr.methods.solvers import iterative

    solved = []
    solve = iterative.conjugate_gradient
    monkeypatch.setattr(
        iterative, "conjugate_gradient", lambda *given, **more: solved.append(len(given[1])) or solve(*given, **more)
    )
    scored(GradDot(IdentityProjector()), recorded, rerank=Influence(solver="cg"), candidates=2)
    assert sum(solved) == N_TARGET


def test_more_candidates_than_samples_are_all_of_them_and_the_usual_number_is_a_hundred(
    recorded: Path, tmp_path: Path
) -> None:
    found = scored(GradDot(IdentityProjector()), recorded, rerank=Influence())
    assert found.scores.candidates == N_TRAIN
    assert found.reranked.all()
    found.save(tmp_path)
    assert torch.equal(AttributionResult.load(tmp_path).scores.topk(N_TRAIN)[0], found.scores.topk(N_TRAIN)[0])


def test_what_the_second_method_is_refused_for_is_told_before_the_first_one_runs(
    recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Any] = []
    monkeypatch.setattr(GradDot, "score", lambda *given: ran.append(given))
    scored(TRAK(projector=IdentityProjector()), recorded)  # the store has features of this projection now
    with pytest.raises(StoreMismatchError, match="was featurized with the projection"):
        scored(GradDot(IdentityProjector()), recorded, rerank=TrackStar(KroneckerProjector(64)))
    assert not ran


def test_arguments_that_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="`candidates` of attribute only with `rerank`"):
        attribute(quiet_trainer(), candidates=3)
    with pytest.raises(TypeError, match="`rerank` of attribute to be an AttributionMethod"):
        attribute(quiet_trainer(), rerank="TRAK")
    with pytest.raises(ValueError, match="`candidates` of attribute"):
        attribute(quiet_trainer(), rerank=TRAK(), candidates=0)


def test_a_reranked_result_is_not_evaluated_as_one(recorded: Path) -> None:
    found = scored(GradDot(IdentityProjector()), recorded, rerank=Influence(), candidates=2)
    with pytest.raises(AttributionError, match=r"was reranked.*Evaluate the two apart"):
        evaluate(found, random_truth())
