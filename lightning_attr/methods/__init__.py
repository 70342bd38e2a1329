"""Attribution methods, one file each."""

from lightning_attr.methods.base import AttributionMethod, ScoreBlock, SnapshotFeatures, in_step
from lightning_attr.methods.grad import GradCos, GradDot
from lightning_attr.methods.model import ModelMethod, model_of
from lightning_attr.methods.trak import TRAK

__all__ = [
    "TRAK",
    "AttributionMethod",
    "GradCos",
    "GradDot",
    "ModelMethod",
    "ScoreBlock",
    "SnapshotFeatures",
    "in_step",
    "model_of",
]
