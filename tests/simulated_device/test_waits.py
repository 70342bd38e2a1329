"""How often the host waits for the device, and what runs on it: counted, not timed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import sim
import torch
from device_cases import MODELS, fitted, scored
from sim.trainer import on_sim

from cases import QUIET, loader_of, quiet_trainer
from lightning_attr.attribution import assembly
from lightning_attr.callbacks import AttributionCallback, featurizing
from lightning_attr.methods import GAS, TRAK, FactGraSS, LoGra, TracIn
from lightning_attr.projectors import KroneckerProjector

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


def sim_trainer(**settings: Any) -> L.Trainer:
    quiet = {name: value for name, value in QUIET.items() if name not in {"accelerator", "devices"}}
    return L.Trainer(**{**quiet, **on_sim(), **settings})


def waits_of(model: str, n: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """What the host waits for while one snapshot of `n` samples is featurized, in batches of 8."""
    torch.manual_seed(0)
    found: Counter[str] = Counter()
    featurize = featurizing.featurize

    def counted(*arguments: Any) -> None:
        with sim.counted() as (_, waits):
            featurize(*arguments)
        found.update(waits)

    monkeypatch.setattr("lightning_attr.callbacks.snapshot_recorder.featurize", counted)
    callback = AttributionCallback(
        folder, TRAK(projector=KroneckerProjector(64)), snapshots=[0], batch_size=8, featurize=True
    )
    sim_trainer(max_epochs=1, callbacks=[callback]).fit(MODELS[model].make(), loader_of(MODELS[model].data(n, 0)))
    assert found
    return found


@pytest.mark.parametrize("model", ["mlp", "mlp, loss", "cnn", "transformer", "gpt-2", "u-net"])
def test_a_batch_waits_once_at_most(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (waits_of(model, n, tmp_path / str(n), monkeypatch) for n in (32, 96))
    more = many - few
    assert sum(more.values()) <= (96 - 32) // 8, more


@pytest.mark.parametrize(
    "method", [TRAK(proj_dim=16), TracIn(KroneckerProjector(64)), GAS(KroneckerProjector(64)), LoGra(64), FactGraSS(64)]
)
def test_stored_features_are_scored_on_the_device(method: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = fitted("mlp", tmp_path / "store", sim_trainer, method=method)
    counts: Counter[str] = Counter()
    score = assembly.score

    def counted(*arguments: Any, **settings: Any) -> Any:
        with sim.counted() as (operators, _):
            found = score(*arguments, **settings)
        counts.update(operators)
        return found

    monkeypatch.setattr(assembly, "score", counted)
    found = scored("mlp", module, method, sim_trainer(), store=tmp_path / "store")
    assert counts["aten::mm.out"] + counts["aten::mm"] + counts["aten::addmm.out"] > 0, counts
    expected = scored("mlp", module, method, quiet_trainer(L.Trainer), store=tmp_path / "store")
    torch.testing.assert_close(found.scores.values, expected.scores.values, rtol=1e-3, atol=1e-5)


def test_batches_that_land_late_are_waited_for(tmp_path: Path) -> None:
    with sim.late_copies():
        module = fitted("mlp", tmp_path / "store", sim_trainer)
        found = scored("mlp", module, TRAK(proj_dim=16), sim_trainer(), store=tmp_path / "store")
    expected = scored("mlp", module, TRAK(proj_dim=16), quiet_trainer(L.Trainer), store=tmp_path / "store")
    torch.testing.assert_close(found.scores.values, expected.scores.values, rtol=1e-3, atol=1e-5)
