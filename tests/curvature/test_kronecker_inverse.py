"""The damped inverse of Kronecker factors against dense solves, in float64."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_attr.curvature import kronecker_rotation
from lightning_attr.curvature.fisher import GradientBatch
from lightning_attr.curvature.kronecker_factors import BlockFactors, KroneckerFactors
from lightning_attr.curvature.kronecker_inverse import InverseForms, KroneckerInverse
from lightning_attr.curvature.kronecker_layout import KroneckerLayout
from lightning_attr.gradients import HookedGradients, ParameterGradient, materialise
from lightning_attr.gradients.hooks import LayerSink

Stream = Any


@pytest.fixture(autouse=True)
def float64() -> Iterable[None]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Mixed(nn.Module):
    """A grouped convolution, a layer used twice, one with several positions, one without bias, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3, groups=2)
        self.twice = nn.Linear(5, 5)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.twice(self.twice(self.conv(x)).tanh())  # (b, 6, 5)
        return self.head(self.norm(hidden).tanh().mean(2))


def stream_of(module: nn.Module, names: Any, x: Tensor) -> Stream:
    hooks = HookedGradients(module, names, direct=())
    return lambda sink: hooks(lambda: module(x).square().sum(1), len(x), sink)


def fitted(n: int = 40) -> tuple[Mixed, KroneckerFactors]:
    module = Mixed().eval()
    layout = KroneckerLayout.of(module)
    batch = GradientBatch([stream_of(module, layout.names, torch.randn(n, 4, 7))], n)
    return module, KroneckerFactors.fit(layout, lambda number: [batch], dtype=torch.float64)


def flat_gradients(module: nn.Module, x: Tensor) -> Tensor:
    rows = []
    for i in range(len(x)):
        gradients = torch.autograd.grad(module(x[i : i + 1]).square().sum(), list(module.parameters()))
        rows.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(rows)


def dense_solve(factors: KroneckerFactors, vectors: Tensor, method: Any, damping: float, decay: float) -> Tensor:
    """The same, with every Kronecker product formed, entry by entry of the layout."""
    slots, result = factors.layout.slots, torch.zeros_like(vectors)
    for block in factors.layout.blocks:
        found: BlockFactors = factors.blocks[block.weight]
        damped = found.eigenvalues(method) + damping * found.eigenvalues(method).mean() + decay
        weights = torch.arange(vectors.shape[1])[slots[block.weight]].reshape(block.groups, block.rows, -1)
        if block.bias is not None:
            biases = torch.arange(vectors.shape[1])[slots[block.bias]].reshape(block.groups, block.rows, 1)
            weights = torch.cat([weights, biases], 2)
        for g in range(block.groups):
            q = torch.kron(found.rows_basis[g], found.columns_basis[g])
            where = weights[g].flatten()
            matrix = q @ torch.diag(damped[g].flatten()) @ q.T
            result[:, where] = torch.linalg.solve(matrix, vectors[:, where].T).T
    return result


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-9 * expected.abs().max())


@pytest.mark.parametrize("method", ["ekfac", "kfac"])
@pytest.mark.parametrize(("damping", "decay"), [(0.1, 0.0), (0.01, 0.5), (0.0, 0.1)])
def test_apply(method: Any, damping: float, decay: float) -> None:
    _, factors = fitted()
    vectors = torch.randn(3, factors.layout.parameters.numel)
    before = vectors.clone()
    found = KroneckerInverse(factors, damping=damping, method=method, weight_decay=decay).apply(vectors)
    assert close(found, dense_solve(factors, vectors, method, damping, decay))
    assert torch.equal(vectors, before)
    assert (found[:, factors.layout.slots["norm.weight"]] == 0).all()


def test_apply_keeps_float32() -> None:
    _, factors = fitted()
    vectors = torch.randn(3, factors.layout.parameters.numel)
    inverse = KroneckerInverse(factors)
    found = inverse.apply(vectors.float())
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), inverse.apply(vectors), rtol=1e-3, atol=1e-5 * found.abs().max().item())


def test_apply_parameters() -> None:
    module, factors = fitted()
    inverse = KroneckerInverse(factors)
    vectors = {name: torch.randn_like(p) for name, p in module.named_parameters()}
    found = inverse.apply_parameters(dict(reversed(vectors.items())))
    expected = inverse.apply(torch.cat([v.flatten() for v in vectors.values()])[None])[0]
    assert {name: v.shape for name, v in found.items()} == {name: v.shape for name, v in vectors.items()}
    assert torch.equal(torch.cat([found[name].flatten() for name in vectors]), expected)
    del vectors["norm.bias"]
    with pytest.raises(ValueError, match=r"Expected argument `vectors` to have the parameters \['conv.bias'"):
        inverse.apply_parameters(vectors)


@pytest.mark.parametrize("method", ["ekfac", "kfac"])
@pytest.mark.parametrize("power", [1, 2])
def test_quadratic_form(method: Any, power: int) -> None:
    module, factors = fitted()
    x = torch.randn(5, 4, 7)
    inverse = KroneckerInverse(factors, method=method)
    gradients = flat_gradients(module, x)
    solved = inverse.apply(gradients)
    expected = (gradients * solved).sum(1) if power == 1 else solved.square().sum(1)
    found = inverse.quadratic_form(stream_of(module, factors.layout.names, x), 5, power=power)
    assert close(found, expected)


def test_quadratic_form_of_single_positions() -> None:
    layer, x = nn.Linear(3, 2), torch.randn(6, 3)
    layout = KroneckerLayout.of(layer)
    hooks = HookedGradients(layer, layout.names, direct=())

    def stream(sink: LayerSink) -> None:
        hooks(lambda: layer(x).square().sum(1), 6, sink)

    inverse = KroneckerInverse(KroneckerFactors.fit(layout, lambda _: [GradientBatch([stream], 6)], dtype=x.dtype))
    gradients = flat_gradients(layer, x)
    found = inverse.quadratic_form(stream, 6)
    assert close(found, (gradients * inverse.apply(gradients)).sum(1))


@pytest.mark.parametrize("method", ["ekfac", "kfac"])
@pytest.mark.parametrize("chunk", [1, 2**25])
def test_products_and_forms_of_one_pass(method: Any, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kronecker_rotation, "CHUNK", chunk)
    module, factors = fitted()
    x, inverse = torch.randn(5, 4, 7), KroneckerInverse(factors, method=method)
    gradients, vectors = flat_gradients(module, x), torch.randn(3, factors.layout.parameters.numel)
    forms = InverseForms(inverse, vectors, powers=(1, 2))
    features = torch.full((5, forms.dim), torch.nan)
    with forms.filling(features) as add:
        stream_of(module, factors.layout.names, x)(add)
    solved = inverse.apply(gradients)
    expected = [*(vectors @ solved.T), (gradients * solved).sum(1), solved.square().sum(1)]
    for column, values in zip(features.T, expected, strict=True):
        assert close(column, values)
    assert forms.names == {"conv.weight", "conv.bias", "twice.weight", "twice.bias", "head.weight"}


def test_no_vectors() -> None:
    _, factors = fitted()
    size = factors.layout.parameters.numel
    assert KroneckerInverse(factors).apply(torch.zeros(0, size)).shape == (0, size)


def test_quadratic_form_without_gradients_is_zero() -> None:
    _, factors = fitted()
    assert KroneckerInverse(factors).quadratic_form(lambda sink: None, 3).tolist() == [0, 0, 0]


def test_scores_from_hooks_equal_those_of_dense_vectors() -> None:
    module, factors = fitted()
    x, targets = torch.randn(5, 4, 7), torch.randn(2, factors.layout.parameters.numel)
    preconditioned = KroneckerInverse(factors).apply(targets)
    scores = torch.zeros(5, 2)
    slots, shapes = factors.layout.slots, factors.layout.parameters.shapes

    def score(gradients: dict[str, ParameterGradient]) -> None:
        for name, gradient in gradients.items():
            scores.add_(materialise(gradient, shapes[name]).flatten(1) @ preconditioned[:, slots[name]].T)

    stream_of(module, factors.layout.names, x)(score)
    assert close(scores, flat_gradients(module, x) @ preconditioned.T)


def test_singular_curvature_needs_damping() -> None:
    layer = nn.Linear(3, 1, bias=False)
    layout = KroneckerLayout.of(layer)
    batch = GradientBatch([stream_of(layer, layout.names, torch.randn(2, 3))], 2)  # two samples, three weights
    factors = KroneckerFactors.fit(layout, lambda number: [batch], dtype=torch.float64)
    for method in ("ekfac", "kfac"):
        with pytest.raises(
            ValueError, match=r"Expected argument `damping` to be positive .* curvature of `weight`, but got 0"
        ):
            KroneckerInverse(factors, damping=0, method=method)
        assert KroneckerInverse(factors, damping=1e-6, method=method).apply(torch.ones(1, 3)).isfinite().all()
        assert (
            KroneckerInverse(factors, damping=0, method=method, weight_decay=1e-6)
            .apply(torch.ones(1, 3))
            .isfinite()
            .all()
        )


def test_layer_whose_input_is_zero_has_no_influence() -> None:
    module = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 2))
    nn.init.zeros_(module[0].weight)
    layout = KroneckerLayout.of(module)
    batch = GradientBatch([stream_of(module, layout.names, torch.zeros(6, 3))], 6)
    factors = KroneckerFactors.fit(layout, lambda number: [batch], dtype=torch.float64)
    found = KroneckerInverse(factors).apply(torch.ones(1, layout.parameters.numel))
    assert (found[:, :6] == 0).all()
    assert found[:, 6:].isfinite().all()


@pytest.mark.parametrize("name", ["damping", "weight_decay"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_bad_damping_is_refused(name: str, value: float) -> None:
    _, factors = fitted()
    with pytest.raises(ValueError, match=f"Expected argument `{name}` to be a non-negative number, but got {value}"):
        KroneckerInverse(factors, **{name: value})


@pytest.mark.parametrize("shape", [(3,), (2, 3), (1, 1, 3)])
def test_vectors_of_another_size_are_refused(shape: tuple[int, ...]) -> None:
    _, factors = fitted()
    with pytest.raises(ValueError, match=r"Expected argument `vectors` of shape \(r, 100\), one number a parameter"):
        KroneckerInverse(factors).apply(torch.ones(shape))


def test_unknown_method_is_refused() -> None:
    _, factors = fitted()
    with pytest.raises(ValueError, match='Expected argument `method` to be "ekfac" or "kfac", but got \'kfacx\''):
        KroneckerInverse(factors, method="kfacx")  # type: ignore[arg-type]
