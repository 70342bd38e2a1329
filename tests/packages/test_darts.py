"""darts: forecasting models that make their own trainer, of `pytorch_lightning`, in double precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader, Subset

from checks import QUIET, check_scores, train_both

pytest.importorskip("darts")
pytest.importorskip("darts.models.forecasting.torch_forecasting_model")
from darts import TimeSeries
from darts.models import BlockRNNModel, NBEATSModel, TCNModel, TiDEModel
from darts.utils.likelihood_models.torch import GaussianLikelihood, QuantileRegression

ROWS = [0, 9, 20]
SIZES: dict[str, Any] = {"input_chunk_length": 8, "output_chunk_length": 3, "n_epochs": 2, "batch_size": 8}
MODELS = {
    "n-beats": (NBEATSModel, {"num_stacks": 2, "num_blocks": 1, "num_layers": 2, "layer_widths": 8}),
    "rnn": (BlockRNNModel, {"model": "LSTM", "hidden_dim": 6, "dropout": 0.1}),
    "tcn": (TCNModel, {"num_filters": 2, "likelihood": GaussianLikelihood()}),
    "tide": (TiDEModel, {"hidden_size": 8, "likelihood": QuantileRegression([0.1, 0.5, 0.9]), "dropout": 0.1}),
}


def series() -> TimeSeries:
    generator = np.random.default_rng(0)
    return TimeSeries.from_values(np.sin(np.arange(40) / 3) + 0.3 * generator.normal(size=40))


@pytest.mark.parametrize("precision", [np.float64, np.float32])
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, precision: Any) -> None:
    kind, settings = MODELS[name]

    def train(callbacks: list[Any]) -> Any:
        model = kind(random_state=0, pl_trainer_kwargs={**QUIET, "callbacks": callbacks}, **SIZES, **settings)
        model.fit(series().astype(precision))
        return model.trainer

    trainer = train_both(train)
    loader = trainer.train_dataloader
    one = DataLoader(loader.dataset, collate_fn=loader.collate_fn)
    targets = DataLoader(Subset(loader.dataset, ROWS), batch_size=8, collate_fn=loader.collate_fn)
    check_scores(trainer, ROWS, one, target_dataloaders=targets)
