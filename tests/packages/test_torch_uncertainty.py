"""TorchUncertainty: its routines and trainer, as its tutorials use them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from checks import QUIET, check_scores, train_both

pytest.importorskip("torch_uncertainty")
from torch_uncertainty import TUTrainer
from torch_uncertainty.layers.bayesian import BayesLinear
from torch_uncertainty.layers.distributions import NormalInverseGammaLinear, NormalLinear
from torch_uncertainty.losses import DECLoss, DERLoss, DistributionNLLLoss, ELBOLoss, FocalLoss
from torch_uncertainty.routines import ClassificationRoutine, RegressionRoutine

from lightning_attr.callbacks import AttributionCallback
from lightning_attr.errors import BatchDependenceError
from lightning_attr.methods import GradCos

ROWS = [0, 9, 23]


def points(classes: bool) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 5, generator=generator)
    return TensorDataset(x, torch.arange(24) % 3 if classes else x[:, 0] + 0.1 * torch.randn(24, generator=generator))


def fit(routine: Any, data: Any, callbacks: list[Any]) -> Any:
    trainer = TUTrainer(max_epochs=3, callbacks=callbacks, **QUIET)
    trainer.fit(routine(), DataLoader(data, batch_size=8, shuffle=True))
    return trainer


def check(routine: Any, data: Any) -> None:
    trainer = train_both(lambda callbacks: fit(routine, data, callbacks))
    check_scores(trainer, ROWS, DataLoader(data), target_dataloaders=DataLoader(Subset(data, ROWS)))


def mlp(last: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Dropout(0.2), last)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss, lambda: FocalLoss(gamma=1), lambda: DECLoss(annealing_step=5)])
def test_classification(loss: Any) -> None:
    def routine() -> Any:
        model = mlp(nn.Linear(16, 3))
        nn.init.ones_(model[-1].bias)  # of logits below zero, DECLoss has no gradient
        recipe = torch.optim.Adam(model.parameters(), lr=1e-2)
        return ClassificationRoutine(model, num_classes=3, loss=loss(), optim_recipe=recipe)

    check(routine, points(classes=True))


@pytest.mark.parametrize(
    ("family", "layer", "loss"),
    [("normal", NormalLinear, DistributionNLLLoss), ("nig", NormalInverseGammaLinear, lambda: DERLoss(1e-2))],
)
def test_regression(family: str, layer: Any, loss: Any) -> None:
    def routine() -> Any:
        model = mlp(layer(base_layer=nn.Linear, event_dim=1, in_features=16))
        recipe = torch.optim.Adam(model.parameters(), lr=1e-2)
        return RegressionRoutine(model, output_dim=1, loss=loss(), dist_family=family, optim_recipe=recipe)

    check(routine, points(classes=False))


def bayesian() -> Any:
    model = nn.Sequential(BayesLinear(5, 16), nn.ReLU(), BayesLinear(16, 3))
    loss = ELBOLoss(model, nn.CrossEntropyLoss(), kl_weight=1 / 24, num_samples=2)
    recipe = torch.optim.Adam(model.parameters(), lr=1e-2)
    return ClassificationRoutine(model, num_classes=3, loss=loss, optim_recipe=recipe)


def test_sampled_weights_are_refused_before_training() -> None:
    with pytest.raises(BatchDependenceError, match="is random"):
        fit(bayesian, points(classes=True), [AttributionCallback("attribution")])


def test_sampled_weights_in_train_mode() -> None:
    """Each sample has random numbers of its own: a target that is the training sample itself has the same."""
    trainer = train_both(lambda callbacks: fit(bayesian, points(classes=True), callbacks), mode="train")
    scores = trainer.attribute(method=GradCos(), targets="train").scores.values
    assert scores.argmax(0).tolist() == list(range(24))
