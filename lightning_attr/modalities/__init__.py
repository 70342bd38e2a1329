"""Beyond classifiers: contrastive and diffusion models, generated samples, tokens, sequences and texts."""

from lightning_attr.modalities.contrastive import ContrastiveMixin
from lightning_attr.modalities.diffusion import DiffusionMixin
from lightning_attr.modalities.position_scores import PositionScores, position_scores
from lightning_attr.modalities.token_dataset import LossTokens
from lightning_attr.modalities.trajectories import DenoisingTrajectory, GeneratedSamples, sample_trajectory
from lightning_attr.report.highlights import HighlightedText, TextHighlights

__all__ = [
    "ContrastiveMixin",
    "DenoisingTrajectory",
    "DiffusionMixin",
    "GeneratedSamples",
    "HighlightedText",
    "LossTokens",
    "PositionScores",
    "TextHighlights",
    "position_scores",
    "sample_trajectory",
]
