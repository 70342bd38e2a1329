"""One batch of each snapshot is compared with autograd on some of its samples: what the first look cannot see."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cases import BlobClassifier, blobs, loader_of, quiet_trainer
from lightning_attr import attribute
from lightning_attr.errors import BatchDependenceError
from lightning_attr.features.featurizer import Featurizer, plan
from lightning_attr.methods import GradDot
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.projectors import (
    FactGraSSProjector,
    IdentityProjector,
    KroneckerProjector,
    LayerSubset,
    RademacherProjector,
)
from lightning_attr.verification.feature_check import check_features


class Crowded(BlobClassifier):
    """In larger batches than a module is checked with, samples are centred."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0) if len(x) > 4 else x)


def test_samples_that_affect_each_other_in_larger_batches_alone_are_found() -> None:
    data = loader_of(blobs(24), 8)
    given = {"train_dataloaders": data, "targets": "train", "method": GradDot(IdentityProjector())}
    message = r"features of dataset\[\d\], .* computed in a batch of 8, differ .* what Crowded computes"
    with pytest.raises(BatchDependenceError, match=message):
        attribute(quiet_trainer(), model=Crowded(), **given)


PROJECTORS = [
    IdentityProjector(),
    KroneckerProjector(16),
    RademacherProjector(16),
    FactGraSSProjector(16),
    LayerSubset(KroneckerProjector(16), ["network.2"]),
]


@pytest.mark.parametrize("projector", PROJECTORS, ids=lambda projector: projector.kind)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_right_features_pass_and_wrong_ones_do_not(projector: Any, dtype: torch.dtype) -> None:
    model = BlobClassifier().eval().to(dtype)
    x, y = blobs(12).tensors
    batch = (x.to(dtype), y)
    projection = projector.bind(ParameterLayout.of(model), "final")
    featurize = Featurizer(model, plan(model, (batch[0][:4], y[:4]), 4), projection)
    features = featurize(batch, range(12))["features"]
    check_features(featurize, batch, range(12), features)
    with pytest.raises(BatchDependenceError, match="differ from the gradients of these samples"):
        check_features(featurize, batch, range(12), features.roll(1, 0))


def test_losses_are_compared_as_well() -> None:
    class Plain(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = BlobClassifier().network

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            return F.cross_entropy(self.inner(x - x.mean(0) if len(x) > 4 else x), y)

    given = {"train_dataloaders": loader_of(blobs(24), 8), "targets": "train", "method": GradDot(IdentityProjector())}
    with pytest.raises(BatchDependenceError, match="what Plain computes"):
        attribute(quiet_trainer(), model=Plain(), **given)


def test_what_a_projection_takes_away_is_no_difference() -> None:
    """Margins of a linear layer have gradients whose rows add up to zero: a projection to their sum leaves rounding."""
    model = BlobClassifier().eval()
    model.network[:2].requires_grad_(False)
    x, y = blobs(8).tensors
    for seed in range(8):
        projection = KroneckerProjector(4, seed=seed).bind(ParameterLayout.of(model), "final")
        featurize = Featurizer(model, plan(model, (x[:4], y[:4]), 4), projection)
        check_features(featurize, (x, y), range(8), featurize((x, y), range(8))["features"])
