"""Modules of a strategy that divides them: configured, made whole, refused; here among one process."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from sharded_cases import CASES, ON_CPUS, Divided, FSDPModule, fully_shard, mlp, sharding
from torch import nn

from cases import BlobClassifier, blobs, loader_of, quiet_trainer
from lightning_attr import AttributionResult, FeatureStore, attribute
from lightning_attr.attribution import division
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.errors import AttributionError, MemoryBudgetError
from lightning_attr.methods import GradDot, Influence, TracIn
from lightning_attr.projectors import IdentityProjector

pytestmark = ON_CPUS

METHOD = TracIn(projector=IdentityProjector())


@pytest.fixture(autouse=True)
def left_group() -> Iterator[None]:
    """Lightning sets a process group up, and leaves it as it is."""
    before = dict(os.environ)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


def dividing(**settings: Any) -> Any:
    return quiet_trainer(accelerator="cpu", devices=1, strategy=sharding(1), **settings)


def fitted(folder: Path | None, trainer: Any, **settings: Any) -> Divided:
    settings = {"method": METHOD, "log": False, "feature_dtype": "float32", "on_error": "raise", **settings}
    trainer.callbacks += [] if folder is None else [AttributionCallback(folder, **settings)]
    module = CASES["MLP"]()
    L.seed_everything(1)
    trainer.fit(module, loader_of(module.data(12), batch_size=4, shuffle=True))
    return module


def attributed(trainer: Any, **settings: Any) -> AttributionResult:
    data = Divided(mlp)
    given = {"train_dataloaders": loader_of(data.data(12)), "target_dataloaders": loader_of(data.data(3, seed=1))}
    return attribute(trainer, **{**given, **settings})


def test_recorded_and_attributed_as_by_one_device(tmp_path: Path) -> None:
    bare, divided = dividing(max_epochs=2), dividing(max_epochs=2)
    ends = [fitted(None, bare), fitted(tmp_path, divided)]
    assert isinstance(ends[1].network, FSDPModule)
    shares = [[p.to_local() for p in module.parameters()] for module in ends]
    assert all(map(torch.equal, *shares))
    found = attributed(divided)
    assert all(isinstance(p, torch.distributed.tensor.DTensor) for p in ends[1].parameters())
    expected = attributed(quiet_trainer(), model=CASES["MLP"](), store=tmp_path, method=METHOD)
    torch.testing.assert_close(found.scores.values, expected.scores.values)
    last = FeatureStore.open(tmp_path).weights(FeatureStore.open(tmp_path).snapshots[-1].key)
    assert all(torch.equal(last[name], p.to_local()) for name, p in ends[0].named_parameters())
    # Another day: fresh modules, under either strategy, and methods that run the module.
    for method in (METHOD, Influence(solver="ekfac")):
        settings = {"store": tmp_path, "method": method}
        fresh = attributed(dividing(), model=CASES["MLP"](), **settings)
        alone = attributed(quiet_trainer(), model=CASES["MLP"](), **settings)
        torch.testing.assert_close(fresh.scores.values, alone.scores.values)
    torch.testing.assert_close(fresh.self_influence, alone.self_influence)


def test_the_guide(repository: Path) -> None:
    text = (repository / "examples" / "guides" / "sharded.md").read_text("utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    trainer = partial(quiet_trainer, accelerator="cpu")
    names: dict[str, Any] = {  # the guide's two processes would run this file again
        "L": SimpleNamespace(Trainer=lambda **given: trainer(**{**given, "devices": 1})),
        "ModelParallelStrategy": lambda **_: sharding(1),
        "LitClassifier": BlobClassifier,
        "AttributionCallback": AttributionCallback,
        "nn": nn,
        "fully_shard": fully_shard,
        "train_loader": loader_of(blobs(20), shuffle=True),
        "target_loader": loader_of(blobs(4, seed=1)),
    }
    exec(block, names)
    assert names["result"].scores.shape == (20, 4)


def test_current_weights() -> None:
    found, expected = (
        attributed(one, model=CASES["MLP"](), method=GradDot(METHOD.projector)) for one in (dividing(), quiet_trainer())
    )
    torch.testing.assert_close(found.scores.values, expected.scores.values)


def test_what_is_said_and_refused_for_want_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        fitted(tmp_path, dividing(max_epochs=1))
    assert "each holds its parameters whole, 0.00 MB" in caplog.text
    monkeypatch.setattr(division, "free_bytes", lambda device: 100)
    with pytest.raises(MemoryBudgetError, match=r"whole parameters of Divided on each device.*but 0\.00 GB are free"):
        fitted(tmp_path / "other", dividing(max_epochs=1))
    assert not (tmp_path / "other").exists()


def test_optimizer_moments(tmp_path: Path) -> None:
    with pytest.raises(AttributionError, match=r"those of Divided are divided among processes.*TRAK, TracIn"):
        fitted(tmp_path / "store", dividing(max_epochs=1), optimizer_state=True)
    assert not (tmp_path / "store").exists()


def test_without_configure_model() -> None:
    with pytest.raises(AttributionError, match="Expected BlobClassifier to define `configure_model`"):
        attributed(dividing(), model=BlobClassifier())


def test_configure_model_that_wants_a_mesh() -> None:
    class Careless(Divided):
        def configure_model(self) -> None:
            self.device_mesh["data_parallel"]

    with pytest.raises(AttributionError, match=r"`configure_model` of Careless raised TypeError.*no device mesh"):
        attributed(quiet_trainer(), model=Careless(mlp))


def test_a_divided_module_under_another_strategy(tmp_path: Path) -> None:
    module = fitted(None, dividing(max_epochs=1))
    with pytest.raises(AttributionError, match=r"under SingleDeviceStrategy, but those of Divided are divided by"):
        attributed(quiet_trainer(accelerator="cpu"), model=module)
    trainer = quiet_trainer(accelerator="cpu", max_epochs=1, callbacks=[AttributionCallback(tmp_path / "store")])
    with pytest.raises(AttributionError, match="under SingleDeviceStrategy"):
        trainer.fit(module, loader_of(module.data(12)))


def test_modules_without_layers_stay_refused() -> None:
    class Empty(BlobClassifier):
        def __init__(self) -> None:
            super().__init__()
            self.network = nn.Identity()

    with pytest.raises(ValueError, match="at least one parameter"):
        attributed(quiet_trainer(), model=Empty())
