"""gluonts: its estimators train on windows that they draw at random from an endless stream.

Such windows have no row numbers: the stream is refused before training. An estimator that cuts the windows once, and
hands them over as a data set, is attributed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader, Subset

from checks import QUIET, check_scores, train_both
from lightning_attr.callbacks import AttributionCallback

pytest.importorskip("gluonts")
pytest.importorskip("gluonts.torch")
from gluonts.dataset.common import ListDataset
from gluonts.torch import DeepAREstimator, SimpleFeedForwardEstimator
from gluonts.transform import SelectFields

ROWS = [0, 5, 11]
FIELDS = {
    "deepar": (
        DeepAREstimator,
        "feat_static_cat feat_static_real past_time_feat past_target past_observed_values future_time_feat "
        "future_target future_observed_values",
    ),
    "feedforward": (SimpleFeedForwardEstimator, "past_target future_target future_observed_values"),
}


def series() -> ListDataset:
    generator = np.random.default_rng(0)
    targets = [10 + np.sin(np.arange(40) + i) + 0.3 * generator.normal(size=40) for i in range(12)]
    return ListDataset([{"start": "2026-01-01", "target": target} for target in targets], freq="D")


def estimator(name: str, callbacks: list[Any], mixin: tuple[type, ...] = ()) -> Any:
    base, _ = FIELDS[name]
    kind = type(base.__name__, (*mixin, base), {})
    settings: dict[str, Any] = {"freq": "D"} if name == "deepar" else {"hidden_dimensions": [8]}
    if name == "deepar":
        settings |= {"hidden_size": 8, "num_layers": 1, "lags_seq": [1, 2], "dropout_rate": 0.1}
    trainer = {**QUIET, "enable_checkpointing": True, "max_epochs": 2, "callbacks": callbacks}
    return kind(
        prediction_length=4, context_length=8, batch_size=4, num_batches_per_epoch=3, trainer_kwargs=trainer, **settings
    )


@pytest.mark.parametrize("name", FIELDS)
def test_endless_streams_are_refused_before_training(name: str) -> None:
    with pytest.raises(TypeError, match="one torch DataLoader for the training data, but got IterableSlice"):
        estimator(name, [AttributionCallback("attribution")]).train(series())


class Windows:
    """The last window of each series, cut once."""

    def create_training_data_loader(self, data: Any, module: Any, **_: Any) -> Any:
        splitter = self._create_instance_splitter(module, "validation")
        fields = next(fields for kind, fields in FIELDS.values() if isinstance(self, kind))
        windows = list(SelectFields(fields.split()).apply(splitter.apply(data, is_train=True), is_train=True))
        return DataLoader(windows, batch_size=4, shuffle=True)


@pytest.mark.parametrize("name", FIELDS)
def test_windows_as_a_data_set(name: str) -> None:
    def train(callbacks: list[Any]) -> Any:
        return estimator(name, callbacks, (Windows,)).train_model(series()).trainer

    trainer = train_both(train)
    windows = trainer.train_dataloader.dataset
    check_scores(trainer, ROWS, DataLoader(windows), target_dataloaders=DataLoader(Subset(windows, ROWS)))
