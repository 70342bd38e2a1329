"""Model outputs: what of a sample is attributed, one file a kind."""

from lightning_attr.outputs.base import ModelOutput, curvature_of
from lightning_attr.outputs.contrastive import ContrastiveMargin
from lightning_attr.outputs.diffusion import DenoisingLoss, SquaredPrediction
from lightning_attr.outputs.directions import SampleDraws, along, softmax_direction
from lightning_attr.outputs.language_model import LanguageModel
from lightning_attr.outputs.margins import BinaryMargin, MulticlassMargin
from lightning_attr.outputs.negative_loss import NegativeLoss
from lightning_attr.outputs.regression import Regression
from lightning_attr.outputs.segmentation import PixelMargin

__all__ = [
    "BinaryMargin",
    "ContrastiveMargin",
    "DenoisingLoss",
    "LanguageModel",
    "ModelOutput",
    "MulticlassMargin",
    "NegativeLoss",
    "PixelMargin",
    "Regression",
    "SampleDraws",
    "SquaredPrediction",
    "along",
    "curvature_of",
    "softmax_direction",
]
