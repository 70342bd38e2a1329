"""A dear method scores the candidates that a quick one has found."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lightning_attr.arguments.checks import check_int
from lightning_attr.attribution.request import AttributionRequest
from lightning_attr.methods.base import check_method
from lightning_attr.results.reranked_scores import CandidateScores, reranked
from lightning_attr.results.result import AttributionResult

_USUAL = 100


def check_reranking(rerank: Any, candidates: Any) -> int | None:
    """Check the arguments that rerank.

    Returns how many candidates there are at either end of a target's scores; None where nothing is reranked.
    """
    if rerank is None:
        if candidates is not None:
            raise ValueError(
                f"Expected argument `candidates` of attribute only with `rerank`, the method that scores them, but got "
                f"{candidates!r} without it."
            )
        return None
    check_method("attribute", rerank, "rerank")
    return check_int("attribute", "candidates", _USUAL if candidates is None else candidates, 1)


def with_depth(request: AttributionRequest, candidates: int) -> AttributionRequest:
    """Let a first method that keeps the extremes alone keep the candidates."""
    if request.topk is None:
        return request
    return replace(request, topk=min(len(request.train), max(request.topk, candidates)))


def with_candidates(request: AttributionRequest, result: AttributionResult, candidates: int) -> AttributionRequest:
    """Let the second method score the candidates of the first, and no others."""
    drawn = result.scores.shape[0] if result.trained_on is None else int(result.trained_on.sum())
    count = min(candidates, drawn, result.scores.depth)
    return replace(request, topk=None, candidates=CandidateScores.of(result.scores, count))


def joined(first: AttributionResult, second: AttributionResult) -> AttributionResult:
    """Put the second method's scores of candidates before those of the first.

    Returns the first result otherwise.
    """
    return replace(first, scores=reranked(first.scores, second.scores))  # type: ignore[arg-type]  # of candidates
