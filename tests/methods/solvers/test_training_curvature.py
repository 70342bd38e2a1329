"""Products with the curvature of the whole training set against matrices from plain autograd."""

from __future__ import annotations

import threading
from typing import Any

import lightning as L
import pytest
import torch
from influence_cases import N, dense_curvature, gradients, network, shares, snapshot
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_attr import AttributionMixin
from lightning_attr.features.snapshot_model import SnapshotModel
from lightning_attr.methods.solvers.training_curvature import TrainingCurvature
from lightning_attr.outputs import NegativeLoss

KINDS = ["ggn", "hessian", "empirical_fisher"]


def matrix(curvature: TrainingCurvature) -> Tensor:
    return curvature.product(torch.eye(curvature.size, dtype=curvature.model.dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 7, N])
def test_products_are_those_of_the_mean_over_all_samples(kind: str, batch_size: int) -> None:
    module, train, targets = network()
    expected = dense_curvature(module, kind, train)
    curvature = TrainingCurvature(snapshot(module, train, targets, batch_size).model, kind, weight_decay=0.5)
    for _ in range(2):  # the second time from the graphs that were kept
        torch.testing.assert_close(matrix(curvature), expected + 0.5 * torch.eye(len(expected)).double())
    assert curvature.mean_eigenvalue() == pytest.approx(expected.trace().item() / len(expected))
    curvature.release()
    row = torch.randn(1, curvature.size).double()
    torch.testing.assert_close(curvature.product(row), row @ expected + 0.5 * row)


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_is_the_sum_over_its_samples(kind: str) -> None:
    module, train, targets = network()
    group = [0, 5, 6, 7, 23]
    part = train[0][group], train[1][group]
    curvature = TrainingCurvature(snapshot(module, train, targets).model, kind, weight_decay=0.5)
    found = curvature.group_product(torch.eye(curvature.size).double(), group)
    torch.testing.assert_close(found, len(group) * dense_curvature(module, kind, part))


def test_drawn_samples_depend_on_the_key_alone() -> None:
    module, train, targets = network()
    rows = torch.randn(2, 43).double()
    found = [
        TrainingCurvature(snapshot(module, train, targets, size).model, "ggn").sampled_product(rows, 6, 0, key)
        for size, key in ((7, "a"), (3, "a"), (7, "b"))
    ]
    torch.testing.assert_close(found[0], found[1])
    assert not torch.allclose(found[0], found[2])
    curvature = TrainingCurvature(snapshot(module, train, targets).model, "ggn")
    torch.testing.assert_close(curvature.sampled_product(rows, N, 0, "a"), curvature.product(rows))


def test_the_trace_of_many_parameters_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_attr.methods.solvers.training_curvature._EXACT_TRACE", 10)
    module, train, targets = network()
    expected = dense_curvature(module, "ggn", train).trace().item() / 43
    found = [
        TrainingCurvature(snapshot(module, train, targets, size).model, "ggn").mean_eigenvalue() for size in (7, N)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-10)
    assert found[0] == pytest.approx(expected, rel=0.3)
    assert found[0] != pytest.approx(expected, rel=1e-6)


def test_rows_go_through_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    module, train, targets = network()
    rows = torch.randn(9, 43).double()
    expected = TrainingCurvature(snapshot(module, train, targets).model, "ggn").product(rows)
    monkeypatch.setattr("lightning_attr.methods.solvers.training_curvature._MOST_ROWS", 4)
    torch.testing.assert_close(TrainingCurvature(snapshot(module, train, targets).model, "ggn").product(rows), expected)
    monkeypatch.setattr("lightning_attr.methods.solvers.training_curvature._AT_ONCE", 1)
    torch.testing.assert_close(TrainingCurvature(snapshot(module, train, targets).model, "ggn").product(rows), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_are_one(kind: str) -> None:
    module, train, targets = network()
    rows = torch.randn(3, 43).double()
    expected = TrainingCurvature(snapshot(module, train, targets).model, kind, 0.1).product(rows)
    found: dict[int, Tensor] = {}

    def run(rank: int, features: Any) -> None:
        found[rank] = TrainingCurvature(features.model, kind, 0.1).product(rows.clone())

    parts = shares(module, train, targets, [[0, 3, 4], [1, 2, 5]])
    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(parts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for rank in range(2):
        torch.testing.assert_close(found[rank], expected)


class Halves(AttributionMixin, nn.Module):
    """Outputs that are no tensor: two heads in a dict, beside a flag."""

    model_output = NegativeLoss(lambda out, y: (out["a"] - y).square().sum(1) + out["b"].exp().sum(1))

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 2), nn.Linear(4, 1)

    def attribution_step(self, batch: Any) -> Any:
        x, y = batch
        return {"a": self.a(x), "b": self.b(x), "count": 3}, y


def test_outputs_may_be_any_structure() -> None:
    x, y = torch.randn(6, 4).double(), torch.randn(6, 2).double()
    module = Halves().double()
    curvature = TrainingCurvature(snapshot(module, (x, y), (x[:3], y[:3])).model, "ggn")
    ones = torch.cat([x, torch.ones(6, 1).double()], 1)
    half = 2 * ones.T @ ones / 6  # both rows of the first head, in weights and bias apart
    own = (ones * module.b(x).detach().exp()).T @ ones / 6
    found = matrix(curvature)
    order = [0, 1, 2, 3, 8]
    torch.testing.assert_close(found[order][:, order], half)
    torch.testing.assert_close(found[10:, 10:], own)
    assert not found[:10, 10:].any()


class StepOnly(L.LightningModule):
    """No mixin: its training loss is all there is."""

    def __init__(self, hidden: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)
        self.hidden = hidden

    def training_step(self, batch: Any) -> Tensor:
        x, y = batch
        if self.hidden:  # a reduction that nothing outside sees
            losses = F.cross_entropy(self.layer(x), y, reduction="none")
            return (losses @ torch.ones_like(losses)) / len(losses)
        return F.cross_entropy(self.layer(x), y)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("hidden", [False, True])
def test_a_training_loss_has_a_hessian_and_an_empirical_fisher(hidden: bool) -> None:
    _, train, targets = network()
    module = StepOnly(hidden).double()
    for kind in ("hessian", "empirical_fisher"):
        model = snapshot(module, train, targets).model
        g = gradients(module, lambda b: F.cross_entropy(module.layer(b[0]), b[1]), train)
        expected = g.T @ g / N
        if kind == "hessian":
            p = module.layer(train[0]).softmax(1)
            bend = torch.diag_embed(p) - p[:, :, None] * p[:, None]
            x = train[0]
            expected = torch.einsum("bij,bk,bl->ikjl", bend, x, x).reshape(12, 12) / N
            found = matrix(TrainingCurvature(model, kind))[:12, :12]
        else:
            found = matrix(TrainingCurvature(model, kind))
        torch.testing.assert_close(found, expected.detach())
    with pytest.raises(TypeError, match=r"Expected StepOnly to have .*AttributionMixin .* for `curvature='ggn'`"):
        TrainingCurvature(model, "ggn")


def test_products_of_a_bfloat16_module_are_in_float32() -> None:
    module, train, targets = network(torch.float32)
    rows = torch.randn(2, 43)
    weights = {name: p.bfloat16().float() for name, p in module.state_dict().items()}
    module.load_state_dict(weights)
    half = (train[0].bfloat16(), train[1])
    expected = TrainingCurvature(snapshot(module, (half[0].float(), half[1]), targets).model, "ggn").product(rows)
    features = snapshot(module.bfloat16(), half, (targets[0].bfloat16(), targets[1]))
    torch.testing.assert_close(TrainingCurvature(features.model, "ggn").product(rows), expected)


def test_an_unknown_curvature() -> None:
    _unread: Any = None  # the name is looked at first
    with pytest.raises(ValueError, match=r"`curvature` of .+ 'hessian' or 'empirical_fisher', but got 'fisher'"):
        TrainingCurvature(_unread, "fisher")


def test_after_the_first_product_all_batches_go_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    module, train, targets = network()
    curvature = TrainingCurvature(snapshot(module, train, targets, 5).model, "ggn")
    prepare, sizes = curvature.of_batch.product, []

    def counted(batch: Any, size: int) -> Any:
        sizes.append(size)
        return prepare(batch, size)

    monkeypatch.setattr(curvature.of_batch, "product", counted)
    rows = torch.randn(3, curvature.size).double()
    first, second = curvature.product(rows), curvature.product(rows)
    assert sizes == [5, 5, 5, 5, 4, N]
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-14)
    curvature.sampled_product(rows, 4, 0, "key")
    assert sizes[6:] == [4]  # drawn from several batches
    curvature.sampled_product(rows, 12, 0, "key")
    assert sum(sizes[7:]) == 12
    assert max(sizes[7:]) <= 5  # of no more memory than a batch


def test_batches_of_other_lengths_stay_apart() -> None:
    class Sums(AttributionMixin, nn.Linear):
        model_output = NegativeLoss(lambda outputs, targets: (outputs - targets).square())

        def attribution_step(self, batch: Any) -> Any:
            return self(batch[0].sum(2)).squeeze(1), batch[1]

    module = Sums(2, 1).double()
    parts = [(torch.randn(3, 2, length).double(), torch.randn(3).double()) for length in (2, 4)]
    curvature = TrainingCurvature(SnapshotModel.of(module.eval(), parts, parts), "ggn")
    x = torch.cat([torch.cat([part[0].sum(2), torch.ones(3, 1).double()], 1) for part in parts])
    for _ in range(2):
        torch.testing.assert_close(matrix(curvature), 2 * x.T @ x / 6)


def test_a_curvature_that_is_written_out_multiplies_without_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    module, train, targets = network()
    for exact in (1024, 10):
        monkeypatch.setattr("lightning_attr.methods.solvers.training_curvature._EXACT_TRACE", exact)
        curvature, other = (
            TrainingCurvature(snapshot(module, train, targets).model, "hessian", weight_decay=0.5) for _ in range(2)
        )
        curvature.write(matrix(curvature))
        monkeypatch.setattr(curvature.of_batch, "product", None)
        rows = torch.randn(2, 43).double()
        torch.testing.assert_close(curvature.product(rows), other.product(rows))
        assert curvature.mean_eigenvalue() == pytest.approx(other.mean_eigenvalue(), rel=1e-10)
