"""What once broke on devices alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import sim
import torch
from device_cases import MODELS, Classifier, copied, fitted, scored
from sim.trainer import on_sim
from torch import nn
from torch.utils.data import TensorDataset

from cases import QUIET, loader_of, quiet_trainer
from lightning_attr import attribute
from lightning_attr.attribution.processes import Processes
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.data.memory import MemoryBudget, free_bytes
from lightning_attr.errors import AttributionError, InvalidLabelError, MemoryBudgetError
from lightning_attr.features.featurizer import plan
from lightning_attr.methods import RPS, TRAK, GradDot, Influence, KNNShapley
from lightning_attr.projectors import IdentityProjector, KroneckerProjector
from lightning_attr.testing import check_gradient_rule
from lightning_attr.user_code.generators import preserved_rng

DEVICE = torch.device("sim:0")
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


def sim_trainer(precision: str | None = None, **settings: Any) -> L.Trainer:
    quiet = {name: value for name, value in QUIET.items() if name not in {"accelerator", "devices"}}
    return L.Trainer(**{**quiet, **on_sim(precision), **settings})


@pytest.mark.parametrize("model", ["lstm", "gru"])
@pytest.mark.parametrize("method", [TRAK(proj_dim=16), Influence(solver="cg")])
def test_recurrent_layers_are_attributed_although_cudnn_cannot(model: str, method: Any, tmp_path: Path) -> None:
    module = fitted(model, tmp_path, sim_trainer)
    assert scored(model, module, method, sim_trainer()).scores.values.isfinite().all()


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_products_of_ten_bits_are_no_dependence_between_samples(precision: str) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    module = Classifier(
        nn.Sequential(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), nn.Flatten(), nn.Linear(1024, 5))
    )
    with torch.no_grad():
        module.network[2].weight *= 30  # as of a fitted model
    module.to(DEVICE).eval()
    batch = torch.randn(4, 16, 64, device=DEVICE), torch.tensor([0, 1, 2, 3], device=DEVICE)
    with sim.tensor_cores():
        torch.set_float32_matmul_precision(precision)
        try:
            assert plan(module, batch, 4).fallback == ()
        finally:
            torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("trainer", [sim_trainer, quiet_trainer])
def test_a_module_that_lives_on_the_device_comes_back_with_its_gradients(trainer: Any) -> None:
    module = MODELS["cnn"].make().to(DEVICE)
    x, y = MODELS["cnn"].data(8, 0).tensors
    module.training_step((x.to(DEVICE), y.to(DEVICE)), 0).backward()
    gradients = [p.grad for p in module.parameters()]
    values = {name: value.clone() for name, value in module.state_dict().items()}
    scored("cnn", module, GradDot(KroneckerProjector(16)), trainer())
    assert all(p.grad is g for p, g in zip(module.parameters(), gradients, strict=True))
    assert {value.device for value in module.state_dict().values()} == {DEVICE}
    assert all(torch.equal(value, values[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("model", ["mlp", "mlp, loss"])
def test_a_device_without_float64_trains_and_scores_stored_features(model: str, tmp_path: Path) -> None:
    with sim.without_float64():
        module = fitted(model, tmp_path / "store", sim_trainer)
        found = scored(model, module, TRAK(proj_dim=16), sim_trainer(), store=tmp_path / "store")
    expected = scored(model, module, TRAK(proj_dim=16), quiet_trainer(L.Trainer), store=tmp_path / "store")
    torch.testing.assert_close(found.scores.values, expected.scores.values, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", [TRAK(exact=True), Influence(), KNNShapley(3), RPS()])
def test_a_method_that_needs_float64_is_refused_by_name_where_there_is_none(method: Any) -> None:
    message = rf'{type(method).__name__} runs the module and computes in float64, which devices of type "sim" do not'
    with sim.without_float64(), pytest.raises(AttributionError, match=message):
        scored("mlp", MODELS["mlp"].make(), method, sim_trainer())


def test_the_check_of_a_gradient_rule_takes_a_layer_on_the_device() -> None:
    check_gradient_rule(nn.Linear(3, 2).to(DEVICE), torch.randn(4, 3, device=DEVICE))


@pytest.mark.parametrize("method", [Influence(solver="kfac"), KNNShapley(3)])
def test_deterministic_trainers_score(method: Any) -> None:
    torch.manual_seed(0)
    module = MODELS["mlp"].make()
    expected = scored("mlp", module, method, quiet_trainer(L.Trainer))
    found = scored("mlp", module, method, sim_trainer(deterministic=True))
    torch.testing.assert_close(found.scores.values, expected.scores.values, rtol=1e-4, atol=1e-5)


def test_streams_of_the_device_are_put_back() -> None:
    torch.manual_seed(0)
    with preserved_rng():
        torch.rand(3, device=DEVICE)
    found = torch.rand(3, device=DEVICE)
    torch.manual_seed(0)
    assert torch.equal(found, torch.rand(3, device=DEVICE))


@pytest.mark.parametrize("precision", [None, "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_training_is_the_same_to_the_last_bit(model: str, precision: str | None, tmp_path: Path) -> None:
    weights, scales = [], []
    for callbacks in ([], [AttributionCallback(tmp_path, method=TRAK(proj_dim=16))]):
        torch.manual_seed(0)
        module, trainer = MODELS[model].make(), sim_trainer(precision, max_epochs=3, callbacks=callbacks)
        trainer.fit(module, loader_of(MODELS[model].data(24, 0), shuffle=True))
        weights.append({name: value.cpu() for name, value in module.state_dict().items()})
        scales.append(trainer.precision_plugin.scaler.get_scale() if precision == "16-mixed" else None)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert scales[0] == scales[1]


class _Labelled:
    """The MLP's data, one of whose labels is changed between the check and the batches."""

    def __init__(self, label: int) -> None:
        x, y = MODELS["mlp"].data(24, 0).tensors
        self.data = TensorDataset(x, y.clone().index_fill_(0, torch.tensor([13]), label))


@pytest.mark.parametrize("label", [-100, 3])
def test_a_label_that_is_no_class_is_named(label: int) -> None:
    module, data = MODELS["mlp"].make(), _Labelled(label).data
    loaders = {"train_dataloaders": loader_of(data), "target_dataloaders": loader_of(MODELS["mlp"].data(4, 1))}
    with pytest.raises(InvalidLabelError, match=r"13"):
        attribute(sim_trainer(), model=module, method=GradDot(IdentityProjector()), **loaders)


def test_large_sums_over_processes_pass_the_device_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_attr.attribution.processes._PART_BYTES", 64)
    sizes: list[int] = []

    def all_reduce(tensor: torch.Tensor) -> None:
        assert tensor.device == DEVICE
        sizes.append(tensor.nbytes)
        tensor *= 2

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    processes = Processes(0, 2, DEVICE)
    monkeypatch.setattr(processes, "_apart", True)
    matrix = torch.arange(60.0).view(20, 3)
    assert torch.equal(processes.sum(matrix), 2 * torch.arange(60.0).view(20, 3))
    assert max(sizes) <= 64
    assert processes.sum(torch.tensor(3.0)) == 6


def test_memory_that_runs_out_halves_the_batch_and_names_what_a_sample_needs() -> None:
    seen: list[int] = []

    def run(batch: torch.Tensor, rows: Any) -> dict[str, torch.Tensor]:
        seen.append(len(rows))
        room = torch.empty(len(rows) * 1000, device=DEVICE)  # twice that where nobody measures
        return {"x": batch + room[:1].nan_to_num() * 0}

    x, used = torch.ones(8, 4, device=DEVICE), torch.sim.memory_allocated()
    budget = MemoryBudget()
    try:
        sim.set_memory(used + 3 * 4000 + 2000)
        budget.limit = 10**9
        assert torch.equal(budget.run(run, x, range(8))["x"], x)
        assert seen[-4:] == [2, 2, 2, 2]
        sim.set_memory(used + 2000)
        with pytest.raises(MemoryBudgetError, match=r"no memory left for a single sample: one needs about 0\.00 MB"):
            budget.run(run, x, range(8))
    finally:
        sim.set_memory(2**34)


def test_free_memory_is_the_devices() -> None:
    x = torch.ones(1000, device=DEVICE)
    assert free_bytes(DEVICE) == torch.sim.mem_get_info()[0]
    assert x.numel() == 1000


def test_a_resumed_store_is_the_same(tmp_path: Path) -> None:
    module = fitted("cnn", tmp_path / "store", sim_trainer)
    first = scored("cnn", module, TRAK(proj_dim=16), sim_trainer(), store=tmp_path / "store")
    again = scored("cnn", module, TRAK(proj_dim=16), sim_trainer(), store=copied(tmp_path / "store", tmp_path / "two"))
    assert torch.equal(first.scores.values, again.scores.values)
