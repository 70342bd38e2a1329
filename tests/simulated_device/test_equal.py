"""Model by method by `topk`: what the device scores is what the CPU scores."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from device_cases import FEW, METHODS, MODELS, copied, fitted, scored
from sim.trainer import on_sim
from torch import Tensor

from cases import quiet_trainer
from lightning_attr import AttributionResult
from lightning_attr.errors import AttributionError

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:There is a performance drop",  # of the CPU, which has no rule for vmap of its recurrent layers
)
CLOSE = 5e-4
CASES = [(model, name) for model in MODELS for name in METHODS if model == "mlp" or name in FEW]
REST = [(model, name) for model in MODELS for name in METHODS if (model, name) not in CASES]


def sim_trainer(precision: str | None = None, **settings: Any) -> L.Trainer:
    return quiet_trainer(L.Trainer, **{**on_sim(precision), "accelerator": "auto", **settings})


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """A module that was trained on the CPU, with its store, made when it is first asked for."""
    made: dict[str, tuple[Any, Path]] = {}

    def run(model: str) -> tuple[Any, Path]:
        if model not in made:
            folder = tmp_path_factory.mktemp("recorded") / "store"
            made[model] = fitted(model, folder, featurize=False), folder
        return made[model]

    return run


def outcome(run: Callable[[], AttributionResult]) -> AttributionResult | str:
    """The result, or why it is refused."""
    try:
        return run()
    except (AttributionError, ValueError, TypeError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-20))


def compare(model: str, name: str, topk: int | None, recorded: Any, tmp_path: Path, record: Any) -> None:
    module, store = recorded(model)
    found = []
    for trainer in (quiet_trainer(L.Trainer), sim_trainer()):
        own = copied(store, tmp_path / "store")
        torch.manual_seed(0)
        found.append(outcome(partial(scored, model, module, METHODS[name].make(), trainer, topk=topk, store=own)))
    on_cpu, on_device = found
    if isinstance(on_cpu, str):
        assert on_device == on_cpu
        record("outcome", "refused by name")
        return
    assert isinstance(on_device, AttributionResult), on_device
    record("outcome", "equal")
    pairs = [(on_device.self_influence, on_cpu.self_influence), (on_device.scores.data_value, on_cpu.scores.data_value)]
    if topk is None:
        pairs.append((on_device.scores.values, on_cpu.scores.values))
    else:
        pairs.append((on_device.scores.topk(topk)[1], on_cpu.scores.topk(topk)[1]))
    assert max(error(*pair) for pair in pairs) < CLOSE


@pytest.mark.parametrize("topk", [None, 3])
@pytest.mark.parametrize(("model", "name"), CASES)
def test_scores(model: str, name: str, topk: int | None, recorded: Any, tmp_path: Path, record_property: Any) -> None:
    compare(model, name, topk, recorded, tmp_path, record_property)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "name"), REST)
def test_the_other_methods(model: str, name: str, recorded: Any, tmp_path: Path, record_property: Any) -> None:
    compare(model, name, 3, recorded, tmp_path, record_property)
