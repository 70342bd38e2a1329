"""pytorch-forecasting: networks made from its data set of time series, as its tutorials do it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader, Subset

from checks import QUIET, check_scores, train_both

pytest.importorskip("pytorch_forecasting")
import lightning.pytorch as pl
import pandas as pd
from pytorch_forecasting import NBeats, NHiTS, TemporalFusionTransformer, TimeSeriesDataSet
from pytorch_forecasting.data import GroupNormalizer
from pytorch_forecasting.metrics import MAE, SMAPE, QuantileLoss

ROWS = [0, 9, 21]


def series(kind: type[Any]) -> TimeSeriesDataSet:
    generator = np.random.default_rng(0)
    steps, groups = 20, ["a", "b"]
    frame = pd.DataFrame({
        "time": [*range(steps)] * 2,
        "group": np.repeat(groups, steps),
        "value": 10 + np.sin(np.arange(2 * steps)) + 0.3 * generator.normal(size=2 * steps),
        "price": generator.normal(size=2 * steps),
    })
    settings: dict[str, Any] = {"max_encoder_length": 6, "max_prediction_length": 3}
    if kind is TemporalFusionTransformer:
        settings |= {"static_categoricals": ["group"], "time_varying_known_reals": ["time", "price"]}
        settings |= {"add_relative_time_idx": True, "add_target_scales": True, "add_encoder_length": True}
        settings |= {"min_encoder_length": 3}
    return TimeSeriesDataSet(
        frame,
        time_idx="time",
        target="value",
        group_ids=["group"],
        time_varying_unknown_reals=["value"],
        target_normalizer=GroupNormalizer(groups=["group"]),
        **settings,
    )


NETWORKS = {
    "temporal fusion transformer": (TemporalFusionTransformer, {"hidden_size": 8, "hidden_continuous_size": 4}),
    "quantiles": (TemporalFusionTransformer, {"hidden_size": 8, "hidden_continuous_size": 4, "loss": QuantileLoss}),
    "n-beats": (NBeats, {"widths": [8, 16], "num_blocks": [1, 1], "num_block_layers": [2, 2], "loss": SMAPE}),
    "n-hits": (NHiTS, {"hidden_size": 8, "loss": MAE, "backcast_loss_ratio": 0.0}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str) -> None:
    kind, settings = NETWORKS[name]
    data = series(kind)

    def train(callbacks: list[Any]) -> Any:
        made = {key: value() if key == "loss" else value for key, value in settings.items()}
        network = kind.from_dataset(data, learning_rate=0.03, **made)
        trainer = pl.Trainer(max_epochs=2, gradient_clip_val=0.1, callbacks=callbacks, **QUIET)
        trainer.fit(network, data.to_dataloader(train=True, batch_size=8))
        return trainer

    trainer = train_both(train)
    one = data.to_dataloader(train=False, batch_size=1)
    targets = DataLoader(Subset(data, ROWS), batch_size=8, collate_fn=one.collate_fn)
    check_scores(trainer, ROWS, one, target_dataloaders=targets)
