"""Rows of the store: features and values of each sample, whatever the batches; and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from cases import needs_subclasses_under_modes
from lightning_attr import AttributionMixin
from lightning_attr.data.memory import MemoryBudget, peak_bytes
from lightning_attr.errors import BatchDependenceError, NonFiniteGradientError, UnsupportedLayerError
from lightning_attr.features.featurizer import Featurizer, plan
from lightning_attr.outputs import BinaryMargin, ModelOutput, NegativeLoss, Regression
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.projectors import (
    GaussianProjector,
    IdentityProjector,
    KroneckerProjector,
    Projector,
    RademacherProjector,
)

N = 64


class Net(AttributionMixin, nn.Module):
    """Hooked layers, and a scale that only the fallback covers; ``trace=False`` keeps vmap out."""

    def __init__(self, scale: bool = True, trace: bool = True) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU(True), nn.Flatten(), nn.Linear(12, 3)
        )
        self.scale = nn.Parameter(torch.tensor(1.5)) if scale else None
        self.trace = trace

    def forward(self, x: Tensor) -> Tensor:
        out = self.network(x)
        if not self.trace:
            assert out.sum().item() < 1e9  # vmap cannot read values
        return out if self.scale is None else torch.kron(out, self.scale)  # of which no rule is known


def _net(dtype: torch.dtype = torch.float64, **arguments: bool) -> Net:
    return Net(**arguments).to(dtype).eval()


def _data(n: int = N, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 2, 5, generator=generator).to(dtype), torch.randint(3, (n,), generator=generator)


def _featurizer(module: Any, batch: Any, projector: Projector | None = None) -> Featurizer:
    projection = (projector or IdentityProjector()).bind(ParameterLayout.of(module), "final")
    return Featurizer(module, plan(module, batch, 4), projection)


def _loop(module: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    params = [p for p in module.parameters() if p.requires_grad]
    rows = []
    for x, y in zip(*batch, strict=True):
        output = module.model_output.output(*module.attribution_step((x[None], y[None])))
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(output.sum(), params)]))
    return torch.stack(rows)


@pytest.mark.parametrize("arguments", [{"scale": False}, {}, {"trace": False}], ids=["hooks", "vmap", "loop"])
def test_features_are_the_gradients_of_the_model_output(arguments: dict[str, bool]) -> None:
    module, (x, y) = _net(**arguments), _data(9)
    featurize = _featurizer(module, (x[:4], y[:4]))
    assert featurize.plan.fallback == (() if arguments == {"scale": False} else ("scale",))
    assert featurize.plan.vectorised == arguments.get("trace", True)
    found = featurize((x, y), range(9))["features"]
    torch.testing.assert_close(found, _loop(module, (x, y)), rtol=1e-10, atol=1e-12)


def test_the_sum_of_the_rows_is_the_gradient_of_the_batch() -> None:
    module, (x, y) = _net(), _data()
    rows = _featurizer(module, (x[:4], y[:4]))((x, y), range(N))["features"]
    whole = torch.autograd.grad(module.model_output.output(module(x), y).sum(), list(module.parameters()))
    torch.testing.assert_close(rows.sum(0), torch.cat([g.flatten() for g in whole]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_columns(dtype: torch.dtype) -> None:
    module, (x, y) = _net(dtype), _data(6, dtype)
    columns = _featurizer(module, (x[:4], y[:4]), KroneckerProjector(20))((x, y), range(6))
    assert {name: tuple(values.shape) for name, values in columns.items()} == {
        "features": (6, columns["features"].shape[1]),
        **dict.fromkeys(("output", "loss", "out_to_loss", "newton_weight", "label"), (6,)),
    }
    assert {values.dtype for name, values in columns.items() if name != "label"} == {dtype}
    for name in ("output", "loss", "out_to_loss", "newton_weight"):
        expected = getattr(module.model_output, name)(module(x), y)
        torch.testing.assert_close(columns[name], expected.detach())
    assert torch.equal(columns["label"], y)
    assert not any(values.requires_grad for values in columns.values())
    assert all(p.grad is None and p.requires_grad for p in module.parameters())


def test_labels_only_where_there_are() -> None:
    class Line(AttributionMixin, nn.Linear):
        model_output: ModelOutput = Regression()

    x, y = torch.randn(4, 2), torch.randn(4)
    assert "label" not in _featurizer(Line(2, 1), (x, y))((x, y), range(4))
    bits = torch.tensor([True, False, True, True])
    module = Line(2, 1)
    module.model_output = BinaryMargin()
    label = _featurizer(module, (x, bits))((x, bits), range(4))["label"]
    assert label.dtype == torch.int64
    assert label.tolist() == [1, 0, 1, 1]
    module.model_output = NegativeLoss(lambda out, ids: (out - ids.double()).square().mean(1))
    many = torch.ones(4, 3).long()  # integers, but not one a sample
    assert "label" not in _featurizer(module, (x, many))((x, many), range(4))


@pytest.mark.parametrize("batch_size", [1, 7, N])
@pytest.mark.parametrize(
    "projector", [IdentityProjector(), KroneckerProjector(30), RademacherProjector(32), GaussianProjector(32)]
)
def test_batches_and_their_order_change_nothing(projector: Projector, batch_size: int) -> None:
    module, (x, y) = _net(torch.float32), _data(dtype=torch.float32)
    whole = _featurizer(module, (x[:4], y[:4]), projector)((x, y), range(N))
    featurize = _featurizer(module, (x[-4:], y[-4:]), projector)
    for rows in torch.randperm(N).split(batch_size):
        part = featurize((x[rows], y[rows]), rows.tolist())
        for name, values in part.items():
            torch.testing.assert_close(values, whole[name][rows], rtol=1e-4, atol=1e-5)


def test_one_plan_serves_all_snapshots() -> None:
    module, (x, y) = _net(), _data(6)
    chosen = plan(module, (x[:4], y[:4]), 4)
    for p in module.parameters():
        nn.init.normal_(p)
    projection = IdentityProjector().bind(ParameterLayout.of(module), "later")
    rows = Featurizer(module, chosen, projection)((x, y), range(6))["features"]
    torch.testing.assert_close(rows, _loop(module, (x, y)), rtol=1e-10, atol=1e-12)


def test_frozen_parameters_have_no_features() -> None:
    module, (x, y) = _net(), _data(5)
    module.network[0].requires_grad_(False)
    found = _featurizer(module, (x[:4], y[:4]))((x, y), range(5))["features"]
    assert found.shape[1] == sum(p.numel() for p in module.parameters() if p.requires_grad)
    torch.testing.assert_close(found, _loop(module, (x, y)), rtol=1e-10, atol=1e-12)


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    return nn.functional.cosine_similarity(a, b, dim=1)


def test_features_under_autocast_are_close() -> None:
    module, (x, y) = _net(torch.float32), _data(dtype=torch.float32)
    featurize = _featurizer(module, (x[:4], y[:4]), KroneckerProjector(60))
    exact = featurize((x, y), range(N))
    with torch.autocast("cpu", torch.bfloat16):
        rough = featurize((x, y), range(N))
    assert {values.dtype for name, values in rough.items() if name != "label"} == {torch.float32}
    assert not torch.equal(rough["features"], exact["features"])
    assert _cosines(rough["features"], exact["features"]).min() > 0.99
    torch.testing.assert_close(rough["features"].norm(dim=1), exact["features"].norm(dim=1), rtol=0.05, atol=0)
    torch.testing.assert_close(rough["output"], exact["output"], rtol=0.05, atol=0.05)


def test_a_module_in_half_precision_has_float32_features() -> None:
    module, (x, y) = _net(torch.float32), _data(dtype=torch.float32)
    exact = _featurizer(module, (x[:4], y[:4]))((x, y), range(N))["features"]
    x = x.bfloat16()
    rough = _featurizer(module.bfloat16(), (x[:4], y[:4]))((x, y), range(N))["features"]
    assert rough.dtype == torch.float32
    assert _cosines(rough, exact).min() > 0.95


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("bad", [[2], [0, 5]])
def test_samples_that_are_not_finite_are_named_by_their_rows(bad: Sequence[int], value: float) -> None:
    module, (x, y) = _net(), _data(6)
    featurize = _featurizer(module, (x[:4], y[:4]))
    x[bad, 0, 0] = value
    rows = [10, 11, 12, 13, 14, 15]
    named = ", ".join(str(rows[i]) for i in bad)
    expected = (
        rf"The \w+ of sample {named} is NaN or Inf \({len(bad)} of the 6 samples.*Look at dataset\[{rows[bad[0]]}\]"
    )
    with pytest.raises(NonFiniteGradientError, match=expected):
        featurize((x, y), rows)


class Root(AttributionMixin, nn.Linear):
    """Finite outputs with an infinite slope where the first feature is zero."""

    model_output = Regression()

    def forward(self, x: Tensor) -> Tensor:
        return (super().forward(x)[:, 0] * x[:, 0]).abs().sqrt()


def test_a_gradient_that_is_not_finite_names_its_sample() -> None:
    module, x, y = Root(2, 1), torch.rand(12, 2) + 0.1, torch.zeros(12)
    featurize = _featurizer(module, (x[:4], y[:4]))
    x[7, 0] = 0
    with pytest.raises(NonFiniteGradientError, match=r"The gradient of sample 7 is NaN or Inf \(1 of the 12 samples"):
        featurize((x, y), range(12))
    x[:] = 0
    with pytest.raises(
        NonFiniteGradientError, match=r"sample 0, 1, 2, 3, 4, 5, 6, 7 \.\.\. is NaN or Inf \(12 of the 12"
    ):
        featurize((x, y), range(12))
    with pytest.raises(NonFiniteGradientError, match=r"`weight`, `bias` is NaN or Inf \(positions \[0, 1, 2, 3\]"):
        plan(module, (x[:4], y[:4]), 4)


def _no_running_statistics() -> nn.Module:
    module = _net()
    module.network[1] = nn.BatchNorm1d(4, track_running_stats=False).double()
    return module.eval()


def _centred() -> nn.Module:
    class Centred(Net):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            return out - (out**2).mean(0)

    return Centred().double().eval()


def _wrong_shape() -> nn.Module:
    class Sum(Regression):
        def output(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return outputs.sum(1, keepdim=True)

    module = _net()
    module.model_output = Sum()
    return module


def _wrong_output() -> nn.Module:
    class Wrong(type(Net.model_output)):
        def out_to_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return 1 + super().out_to_loss(outputs, targets)

    module = _net()
    module.model_output = Wrong()
    return module


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (_no_running_statistics, UnsupportedLayerError, r"`network.1` \(BatchNorm1d\) has no running statistics"),
        (
            _centred,
            BatchDependenceError,
            "depends on the samples beside it: the same 4 samples in one batch and in two",
        ),
        (_wrong_shape, ValueError, r"one value a sample, of shape \(4,\), but got \(4, 1\)"),
        (_wrong_output, AssertionError, "Wrong: expected grad loss = -out_to_loss . grad output"),
        (lambda: nn.Linear(5, 3), TypeError, r"Expected Linear to have .*AttributionMixin among its bases"),
    ],
)
def test_modules_that_cannot_be_attributed(make: Callable[[], nn.Module], error: type[Exception], message: str) -> None:
    x, y = _data(4)
    with pytest.raises(error, match=message):
        plan(make(), (x, y), 4)


def test_a_refused_module_is_left_alone() -> None:
    module, (x, y) = _no_running_statistics(), _data(4)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(UnsupportedLayerError):
        plan(module, (x, y), 4)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("arguments", [{"scale": False}, {}, {"trace": False}], ids=["hooks", "vmap", "loop"])
@pytest.mark.parametrize("projector", [IdentityProjector(), KroneckerProjector(40), RademacherProjector(24)])
def test_memory_stays_within_the_budget(projector: Projector, arguments: dict[str, bool]) -> None:
    module, (x, y) = _net(**arguments), _data()
    free = _featurizer(module, (x[:4], y[:4]), projector)
    whole = free((x, y), range(N))
    limit = peak_bytes(lambda: free((x, y), range(N))) // 2
    bounded = Featurizer(module, free.plan, free.projection, MemoryBudget(limit))
    bounded((x, y), range(N))  # measures
    rows = bounded((x, y), range(N))
    for name, values in whole.items():
        torch.testing.assert_close(rows[name], values, rtol=1e-10, atol=1e-12)
    kept = sum(values.nbytes for values in rows.values())
    assert peak_bytes(lambda: bounded((x, y), range(N))) <= limit + 2 * kept  # the rows found, and their joining


@pytest.mark.parametrize("limit", [None, 1], ids=["whole", "in parts"])
def test_features_are_computed_in_the_room_that_they_are_given(limit: int | None) -> None:
    module, (x, y) = _net(), _data()
    free = _featurizer(module, (x[:4], y[:4]), KroneckerProjector(40))
    expected = free((x, y), range(N))["features"]
    if limit is not None:
        limit = peak_bytes(lambda: free((x, y), range(N))) // 2
    featurizer = Featurizer(module, free.plan, free.projection, MemoryBudget(limit))
    out = torch.full((N, free.projection.dim), torch.nan, dtype=expected.dtype)
    features = featurizer((x, y), range(N), out)["features"]
    torch.testing.assert_close(features, expected, rtol=1e-10, atol=1e-12)
    assert (features.data_ptr() == out.data_ptr()) == (limit is None)


class LibraryTensor(Tensor):
    """A library's own tensors, whose methods take other arguments than those of torch."""

    def new_empty(self, *size: int) -> Any:  # type: ignore[override]
        return Tensor.new_empty(self.as_subclass(Tensor), size)


@needs_subclasses_under_modes
def test_a_librarys_tensors_end_at_the_columns() -> None:
    class Squares(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.layer(batch[0]).square().mean()

    module, batch = Squares().eval(), (torch.randn(4, 3).as_subclass(LibraryTensor),)
    identity = IdentityProjector().bind(ParameterLayout.of(module), "final")
    columns = Featurizer(module, plan(module, batch, 4), identity)(batch, [0, 1, 2, 3])
    assert {type(values) for values in columns.values()} == {Tensor}
