"""chemprop: message passing on molecules, as its training notebook does it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from torch import Tensor

from checks import QUIET, check_scores, train_both
from lightning_attr import AttributionMixin
from lightning_attr.outputs import NegativeLoss

pytest.importorskip("chemprop")
from chemprop import data, featurizers, models, nn
from lightning import pytorch as pl

# fmt: off
SMILES = [
    "CCO", "CCN", "CCC", "CCCl", "CC(C)O", "c1ccccc1", "c1ccccc1O", "CC(=O)O",
    "CC(=O)N", "CCOC", "CCSC", "C1CCCCC1", "C1CCNCC1", "OCCO", "NCCN", "CC#N",
    "CC=C", "C=O", "CC(C)(C)O", "c1ccncc1", "c1ccsc1", "FC(F)F", "BrCCBr", "CCCCCC",
]
# fmt: on
ROWS = [0, 6, 23]


def molecules(tasks: int = 1, missing: bool = False) -> Any:
    values = np.random.default_rng(0).normal(size=(len(SMILES), tasks))
    if missing:
        values[8::3, 0] = np.nan  # the first molecules have every label
    points = [data.MoleculeDatapoint.from_smi(smi, y) for smi, y in zip(SMILES, values, strict=True)]
    return data.MoleculeDataset(points, featurizers.SimpleMoleculeMolGraphFeaturizer())


def network(dataset: Any, kind: type[models.MPNN] = models.MPNN, tasks: int = 1) -> Any:
    scaler = dataset.normalize_targets()
    transform = nn.UnscaleTransform.from_standard_scaler(scaler)
    head = nn.RegressionFFN(n_tasks=tasks, input_dim=12, hidden_dim=8, output_transform=transform)
    return kind(nn.BondMessagePassing(d_h=12, depth=2), nn.MeanAggregation(), head, True, [nn.metrics.RMSE()])


def train_with(dataset: Any, kind: type[models.MPNN] = models.MPNN, tasks: int = 1, **arguments: Any) -> Any:
    def train(callbacks: list[Any]) -> Any:
        dataset.reset()
        module = network(dataset, kind, tasks)
        trainer = pl.Trainer(max_epochs=2, callbacks=callbacks, **QUIET)
        trainer.fit(module, data.build_dataloader(dataset, batch_size=8))
        return trainer

    return train_both(train, **arguments)


def loaders(dataset: Any) -> tuple[Any, Any]:
    copies = data.MoleculeDataset([dataset.data[row] for row in ROWS], dataset.featurizer)
    copies.Y = dataset.Y[ROWS]
    one = data.build_dataloader(dataset, batch_size=1, shuffle=False, drop_last=False)
    return one, data.build_dataloader(copies, batch_size=8, shuffle=False)


def test_regression() -> None:
    dataset = molecules()
    trainer = train_with(dataset)
    one, targets = loaders(dataset)
    # In eval mode the head gives values in the units of the data: the loss of training is that of train mode.
    check_scores(trainer, ROWS, one, mode="train", target_dataloaders=targets)


class PerMolecule(AttributionMixin, models.MPNN):
    """With labels missing, the loss of a batch is a mean over labels: what is a molecule's is said with the mixin."""

    model_output = NegativeLoss(lambda outputs, y: (outputs - y).nan_to_num().square().sum(1))

    def attribution_step(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self.predictor.train_step(self.fingerprint(*batch[:3])), batch.Y


def test_missing_labels_with_the_mixin() -> None:
    dataset = molecules(2, missing=True)
    trainer = train_with(dataset, PerMolecule, 2, mode="train")
    one, targets = loaders(dataset)

    def loss(module: Any, batch: Any) -> Tensor:
        error = module.predictor.train_step(module.fingerprint(*batch[:3])) - batch.Y
        return error.masked_fill(batch.Y.isnan(), 0).square().sum()

    check_scores(trainer, ROWS, one, loss, mode="train", target_dataloaders=targets)
