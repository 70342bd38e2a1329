"""Scores are by the snapshots of a store: a module with other weights is told so, one of another layout refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import BlobClassifier, blobs, loader_of, quiet_trainer
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.errors import StoreMismatchError
from lightning_attr.methods import TRAK

DATA = loader_of(blobs(24))


class Normalised(BlobClassifier):
    """The same parameters, and a buffer more."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.register_buffer("scale", torch.ones(2))


class Relu(BlobClassifier):
    """The same parameters in another function."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.network[1] = nn.ReLU()


@pytest.fixture(name="run", scope="module")
def run_fixture(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    path = tmp_path_factory.mktemp("model_check") / "run"
    trainer = quiet_trainer(max_epochs=2, callbacks=[AttributionCallback(path, TRAK(8), log=False)])
    trainer.fit(BlobClassifier(), DATA)
    return trainer, path


def scores(path: Path, model: Any) -> Tensor:
    result = quiet_trainer().attribute(model=model, train_dataloaders=DATA, targets="train", store=path)
    return result.scores.values


def told_by(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage() for record in caplog.records if record.name == "lightning_attr.verification.model_check"
    ]


def test_other_weights_are_told_once_and_change_nothing(
    run: tuple[Any, Path], caplog: pytest.LogCaptureFixture
) -> None:
    trainer, path = run
    trained = trainer.attribute(targets="train").scores.values
    assert not told_by(caplog)
    first = trainer.lightning_module.state_dict()
    for model in (BlobClassifier(seed=5), BlobClassifier().double().float()):
        caplog.clear()
        torch.testing.assert_close(scores(path, model), trained)
        (told,) = told_by(caplog)
        assert "weights that BlobClassifier has now are those of no snapshot in" in told
        assert str(path) in told
        assert "(epoch=0000-step=000003 to epoch=0001-step=000006)" in told
    caplog.clear()
    model = BlobClassifier(seed=5)
    model.load_state_dict(first)
    torch.testing.assert_close(scores(path, model), trained)
    assert not told_by(caplog)


def test_a_module_that_the_snapshots_do_not_fit_is_refused_before_anything_runs(run: tuple[Any, Path]) -> None:
    with pytest.raises(StoreMismatchError, match="does not fit Normalised: scale differ in presence or shape"):
        scores(run[1], Normalised())


def test_another_function_of_the_same_parameters_is_not_the_model_of_the_record(run: tuple[Any, Path]) -> None:
    with pytest.raises(StoreMismatchError, match=r"losses at snapshot .* are not those on record"):
        scores(run[1], Relu())
