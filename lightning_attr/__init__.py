"""Training-data attribution for PyTorch Lightning: which training samples made the model do this?"""

from importlib.metadata import version

from lightning_attr.mixin import AttributionMixin
from lightning_attr.outputs import ModelOutput
from lightning_attr.result import AttributionResult
from lightning_attr.scores import ScoreMatrix
from lightning_attr.store import FeatureStore
from lightning_attr.trainer import AttributionTrainer, attribute

__version__ = version("lightning_attr")

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
