"""scvi-tools: models that make their own trainer, whose loaders fetch whole minibatches from the table of cells."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from torch import Tensor

from checks import QUIET, check_scores, train_both
from lightning_attr import AttributionMixin
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.errors import BatchDependenceError
from lightning_attr.methods import GradCos
from lightning_attr.outputs import NegativeLoss

pytest.importorskip("scvi")
import anndata
import scvi
from scvi.external import RNAStereoscope
from scvi.train import TrainingPlan

ROWS = [0, 9, 23]


def cells() -> anndata.AnnData:
    generator = np.random.default_rng(0)
    counts = generator.poisson(np.exp(generator.normal(size=(24, 10)) + np.arange(24)[:, None] % 3)).astype(np.float32)
    return anndata.AnnData(counts, obs={"type": [f"t{i % 3}" for i in range(24)]})


def train_model(model: Any, callbacks: list[Any]) -> Any:
    scvi.settings.seed = 1  # without it two plain trainings differ
    settings = {name: value for name, value in QUIET.items() if name not in {"logger", "num_sanity_val_steps"}}
    settings["shuffle_set_split"] = False  # the rows of training are those of the table
    model.train(max_epochs=2, train_size=1.0, batch_size=8, callbacks=callbacks, logger=False, **settings)
    return model.trainer


def loaders(model: Any) -> tuple[Any, Any]:
    copies = model._validate_anndata(model.adata[ROWS].copy())
    return model._make_data_loader(model.adata, batch_size=1), model._make_data_loader(copies, batch_size=8)


class PerCell(AttributionMixin, TrainingPlan):
    """The loss of a cell at the mean of its latent distribution, where training draws from it."""

    model_output = NegativeLoss(lambda losses, _: losses)

    def attribution_step(self, batch: Any) -> tuple[Tensor, None]:
        inference = self.module.inference(**self.module._get_inference_input(batch))
        inference["z"] = inference["qz"].loc
        generative = self.module.generative(**self.module._get_generative_input(batch, inference))
        found = self.module.loss(batch, inference, generative)
        return found.reconstruction_loss["reconstruction_loss"] + found.kl_local["kl_divergence_z"], None


def scvi_model(plan: Any = None) -> Any:
    table = cells()
    scvi.model.SCVI.setup_anndata(table)
    model = scvi.model.SCVI(table, n_hidden=8, n_latent=3)
    if plan is not None:
        model._training_plan_cls = plan
    return model


def test_drawn_latents_are_refused_before_training() -> None:
    with pytest.raises(BatchDependenceError, match="is random"):
        train_model(scvi_model(), [AttributionCallback("attribution")])


def test_drawn_latents_in_train_mode() -> None:
    """Each cell has random numbers of its own: a target that is the training cell itself has the same."""
    trainer = train_both(lambda callbacks: train_model(scvi_model(), callbacks), mode="train")
    scores = trainer.attribute(method=GradCos(), targets="train").scores.values
    assert scores.argmax(0).tolist() == list(range(24))


def test_latent_means_with_the_mixin() -> None:
    trainer = train_both(lambda callbacks: train_model(scvi_model(PerCell), callbacks))
    one, targets = loaders(scvi_model())

    def loss(module: Any, batch: Any) -> Tensor:
        return module.attribution_step(batch)[0].sum()

    check_scores(trainer, ROWS, one, target_dataloaders=targets, loss=loss)


def test_a_model_without_draws() -> None:
    def train(callbacks: list[Any]) -> Any:
        table = cells()
        RNAStereoscope.setup_anndata(table, labels_key="type")
        return train_model(RNAStereoscope(table), callbacks)

    trainer = train_both(train)
    table = cells()
    RNAStereoscope.setup_anndata(table, labels_key="type")
    one, targets = loaders(RNAStereoscope(table))
    check_scores(trainer, ROWS, one, target_dataloaders=targets)
