"""The calls users write, with the types they get: `make types` checks this file, nothing runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import assert_type

from lightning_attr import (
    AttributionMixin,
    AttributionResult,
    AttributionTrainer,
    FeatureStore,
    ModelOutput,
    ScoreMatrix,
    __version__,
    attribute,
)
from lightning_attr.callbacks import AttributionCallback, AttributionMonitor
from lightning_attr.methods import TRAK, GradCos, GradDot
from lightning_attr.metrics import (
    DataSelectionCurve,
    LinearDatamodelingScore,
    NoisyLabelAUROC,
    NoisyLabelRecall,
)
from lightning_attr.outputs import BinaryMargin, MulticlassMargin, NegativeLoss, Regression
from lightning_attr.results import TopScores


class LitClassifier(AttributionMixin, L.LightningModule):
    """An (x, y) classifier: nothing else to write."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.layer(x))


class LitRegression(AttributionMixin, L.LightningModule):
    """Both parts overridden: what is attributed, and how a batch becomes outputs and targets."""

    model_output = Regression()

    def attribution_step(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self(batch["x"]), batch["y"]


class Confidence(ModelOutput):
    """A model output of the user's own."""

    def output(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.gather(-1, targets[:, None])[:, 0]

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return -self.output(outputs, targets)

    def out_to_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.ones_like(self.output(outputs, targets))


def model_outputs(model: LitClassifier, outputs: Tensor, targets: Tensor) -> None:
    everything: list[ModelOutput] = [
        MulticlassMargin(),
        BinaryMargin(),
        Regression(),
        NegativeLoss(nn.CrossEntropyLoss(reduction="none")),
        Confidence(),
    ]
    for model_output in everything:
        assert_type(model_output.output(outputs, targets), Tensor)
        assert_type(model_output.loss(outputs, targets), Tensor)
        assert_type(model_output.out_to_loss(outputs, targets), Tensor)
    params, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    assert_type(model.functional_output(params, buffers, (outputs, targets)), Tensor)
    assert_type(model.functional_loss(params, buffers, (outputs, targets)), Tensor)
    assert_type(model.model_output, ModelOutput)


def callbacks(mask: Tensor) -> list[L.Callback]:
    return [
        AttributionCallback(),
        AttributionCallback(dirpath="attribution", method=TRAK(), snapshots="geometric", featurize=True, log=True),
        AttributionCallback(dirpath=Path("attribution"), snapshots="all", noise_mask=mask),
        AttributionCallback(snapshots=2),
        AttributionCallback(snapshots=[0, 3, 9], featurize=False, log=False),
        AttributionMonitor(),
    ]


def attributing(dm: L.LightningDataModule, model: LitClassifier, mask: Tensor) -> None:
    trainer = AttributionTrainer(max_epochs=20, callbacks=[AttributionCallback(dirpath="attribution")])
    trainer.fit(model, datamodule=dm)
    assert_type(trainer.attribute(dm), AttributionResult)
    assert_type(trainer.attribute(datamodule=dm, targets="test", noise_mask=mask), AttributionResult)
    assert_type(trainer.attribute(dm, topk=10), AttributionResult)
    assert_type(trainer.attribute(model, datamodule=dm, ckpt_path="best"), AttributionResult)
    assert_type(FeatureStore.from_checkpoints(["a.ckpt"], model, dm, dirpath="features"), FeatureStore)
    method = TRAK(proj_dim=512, damping=0.3, seed=1)
    result = AttributionTrainer().attribute(dm, model=LitClassifier(), store="attribution", method=method)
    assert_type(result, AttributionResult)


def attributing_loaders(train: DataLoader[Any], test: DataLoader[Any], model: LitClassifier, path: Path) -> None:
    for method in (TRAK(), GradDot(), GradCos()):
        result = AttributionTrainer().attribute(
            model=model, train_dataloaders=train, target_dataloaders=test, method=method, store=path
        )
        assert_type(result, AttributionResult)


def attributing_with_a_stock_trainer(dm: L.LightningDataModule, model: L.LightningModule) -> AttributionResult:
    trainer = L.Trainer(callbacks=[AttributionCallback()])
    trainer.fit(model, datamodule=dm)
    return attribute(trainer, dm)


def results(result: AttributionResult, directory: Path) -> None:
    assert_type(result.scores, ScoreMatrix | TopScores)
    assert_type(result.scores.values, Tensor)
    assert_type(result.scores.topk(10), tuple[Tensor, Tensor])
    assert_type(result.self_influence, Tensor)
    assert_type(result.data_value, Tensor)
    assert_type(result.metrics, dict[str, float])
    assert_type(result.select(0.9), Tensor)
    assert_type(result.select(0.9, by="self_influence", per_class=True), Tensor)
    assert_type(result.select(0.2, objective="coreset", per_class=True), Tensor)
    assert_type(result.predicted_effect([0, 1]).loss, Tensor)
    result.save(directory)
    assert_type(AttributionResult.load(directory), AttributionResult)


def scores(scores: ScoreMatrix, directory: Path) -> None:
    assert_type(scores.values, Tensor)
    assert_type(scores.train_indices, Tensor)
    assert_type(scores.target_indices, Tensor)
    indices, values = scores.topk(10)
    assert_type(indices, Tensor)
    assert_type(values, Tensor)
    assert_type(scores.bottomk(k=10)[0], Tensor)
    scores.save(directory)
    assert_type(ScoreMatrix.load(directory), ScoreMatrix)


def metrics(result: AttributionResult, mask: Tensor, subsets: Tensor, outputs: Tensor) -> None:
    auroc, recall = NoisyLabelAUROC(), NoisyLabelRecall(fraction=0.1)
    auroc.update(result.self_influence, mask)
    recall.update(result.self_influence, mask)
    assert_type(auroc.compute(), Tensor)
    assert_type(recall.compute(), Tensor)
    auroc.plot()
    lds = LinearDatamodelingScore()
    lds.update(result.scores.values, subsets, outputs)
    assert_type(lds.compute(), Tensor)
    for metric in (lds, DataSelectionCurve()):
        metric.plot()


def names(store: FeatureStore) -> str:
    return f"{__version__}: {store}"
