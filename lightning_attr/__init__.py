"""Training-data attribution for PyTorch Lightning: which training samples made the model do this?"""

from importlib.metadata import version

from lightning_attr.attribution.checkpoint_store import from_checkpoints
from lightning_attr.attribution.trainer import AttributionTrainer, attribute
from lightning_attr.objectives.mixin import AttributionMixin
from lightning_attr.outputs import ModelOutput
from lightning_attr.results.result import AttributionResult
from lightning_attr.results.score_matrix import ScoreMatrix
from lightning_attr.store.feature_store import FeatureStore

__version__ = version("lightning_attr")

FeatureStore.from_checkpoints = staticmethod(from_checkpoints)

__all__ = [
    "AttributionMixin",
    "AttributionResult",
    "AttributionTrainer",
    "FeatureStore",
    "ModelOutput",
    "ScoreMatrix",
    "__version__",
    "attribute",
]
