"""Ground truth for attribution scores: what the model outputs after retraining without some of the data."""

from lightning_attr.evaluation.brittleness import brittleness, proponent_sets
from lightning_attr.evaluation.evaluate import Evaluation, evaluate
from lightning_attr.evaluation.ground_truth import GroundTruth
from lightning_attr.evaluation.retrain import retrain_lds, retrain_loo, retrain_without

__all__ = [
    "Evaluation",
    "GroundTruth",
    "brittleness",
    "evaluate",
    "proponent_sets",
    "retrain_lds",
    "retrain_loo",
    "retrain_without",
]
