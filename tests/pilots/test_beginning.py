"""Runs that began with weights of their own: pilots from a fresh constructor say so."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from pilots.pilot_cases import Fresh, recorded
from torch import nn

from lightning_attr import FeatureStore
from lightning_attr.pilots import Pilots
from lightning_attr.pilots.beginning import sizes_of_weights, unlike_a_fresh_one

MATCH = r"Pilots train a fresh Fresh, but the run began with a `network.0.weight` that it has not by chance"


def loaded() -> Fresh:
    torch.manual_seed(5)
    module = Fresh(0.2, 16)
    state = {name: 2 * tensor + 0.1 for name, tensor in module.state_dict().items()}
    module.load_state_dict(state)
    return module


def test_weights_loaded_after_the_constructor_are_told(tmp_path: Path) -> None:
    trainer = recorded(tmp_path / "run", loaded(), max_epochs=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.attribute(pilots=1)
    assert any(re.match(MATCH, str(warning.message)) for warning in caught)
    trainer = recorded(tmp_path / "again", loaded(), max_epochs=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Pilots train a fresh")
        trainer.attribute(pilots=Pilots(1, module=loaded))


def test_fresh_runs_are_not(tmp_path: Path) -> None:
    trainer = recorded(tmp_path, Fresh(0.2, 16), max_epochs=2)
    began = FeatureStore.open(tmp_path).manifest.training["began"]
    assert began["network.0.weight"] == pytest.approx([0.0, 0.5 / 3**0.5], abs=0.1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Pilots train a fresh")
        trainer.attribute(pilots=2)


NETWORKS: list[Any] = [
    lambda: nn.Linear(64, 8),
    lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)),
    lambda: nn.TransformerEncoderLayer(16, 2, 32),
    lambda: nn.utils.parametrizations.orthogonal(nn.Linear(16, 16)),
    lambda: nn.Embedding(50, 8, padding_idx=0),
]


@pytest.mark.parametrize("make", NETWORKS, ids=["linear", "batch norm", "transformer", "orthogonal", "table"])
def test_chance_explains_fresh_modules_and_not_others(make: Any) -> None:
    torch.manual_seed(0)
    assert all(unlike_a_fresh_one(sizes_of_weights(make()), make()) is None for _ in range(50))
    other = make()
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(1.3).add_(0.2)
    assert unlike_a_fresh_one(sizes_of_weights(other), make()) is not None


def test_sparse_weights_have_a_wide_spread() -> None:
    def make() -> nn.Linear:
        layer = nn.Linear(64, 64, bias=False)
        nn.init.sparse_(layer.weight, 0.9)
        return layer

    torch.manual_seed(0)
    assert all(unlike_a_fresh_one(sizes_of_weights(make()), make()) is None for _ in range(50))


@pytest.mark.parametrize("entry", ["text", [1.0], [1, 2], None], ids=str)
def test_records_that_nobody_wrote_say_nothing(entry: Any) -> None:
    assert unlike_a_fresh_one({"weight": entry, "other": [1.0, 2.0]}, nn.Linear(64, 8)) is None


def test_weights_that_are_not_finite_are_left_out() -> None:
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.fill_(float("nan"))
    assert list(sizes_of_weights(layer)) == ["bias"]
