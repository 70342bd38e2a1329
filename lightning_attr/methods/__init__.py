"""Attribution methods, one file each."""

from lightning_attr.methods.base import AttributionMethod, SnapshotFeatures
from lightning_attr.methods.grad import GradCos, GradDot
from lightning_attr.methods.trak import TRAK

__all__ = ["TRAK", "AttributionMethod", "GradCos", "GradDot", "SnapshotFeatures"]
