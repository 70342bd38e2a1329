"""Attribution methods, one file each."""

from lightning_attr.methods.base import AttributionMethod, ScoreBlock, SnapshotFeatures, in_step
from lightning_attr.methods.grad import GradCos, GradDot
from lightning_attr.methods.trak import TRAK

__all__ = ["TRAK", "AttributionMethod", "GradCos", "GradDot", "ScoreBlock", "SnapshotFeatures", "in_step"]
