"""The strongest samples of single targets, for figures and tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning_attr.arguments.listed import check_ints
from lightning_attr.results.score_matrix import ScoreMatrix
from lightning_attr.results.top_scores import TopScores


def extremes(scores: ScoreMatrix | TopScores, targets: Any, k: int) -> Iterator[tuple[int, list[tuple[int, float]]]]:
    """Index of each target, with index and score of its top proponents, then opponents, the strongest last."""
    last = scores.shape[1] - 1
    chosen = check_ints(None, "targets", targets, -last - 1, last, "a list of numbers of targets")
    (up, up_scores), (down, down_scores) = scores.topk(k), scores.bottomk(k)
    for j in chosen:
        samples = [*zip(up[j].tolist(), up_scores[j].tolist(), strict=True)]
        samples += [*zip(down[j].tolist(), down_scores[j].tolist(), strict=True)][::-1]
        yield int(scores.target_indices[j]), samples
