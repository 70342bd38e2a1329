"""What an attribution gives: scores, the strongest of them, and the result that holds both."""

from lightning_attr.results.reranked_scores import RerankedScores
from lightning_attr.results.result import AttributionResult
from lightning_attr.results.score_matrix import ScoreMatrix
from lightning_attr.results.top_scores import TopScores

__all__ = ["AttributionResult", "RerankedScores", "ScoreMatrix", "TopScores"]
