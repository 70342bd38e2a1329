"""What all projectors promise: one linear map, unbiased, a function of (seed, snapshot) alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_attr.errors import CorruptedStoreError
from lightning_attr.gradients import ConvSum, GatherSum, OuterSum, ParameterGradient
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.projectors import (
    FactGraSSProjector,
    FactoredSJLTProjector,
    GaussianProjector,
    GraSSProjector,
    IdentityProjector,
    KroneckerProjector,
    LayerSubset,
    Projection,
    Projector,
    RademacherProjector,
    SJLTProjector,
    projector_from_config,
)
from lightning_attr.projectors.base import flat_slots

LAYOUT = ParameterLayout({
    "linear.weight": (6, 9),
    "linear.bias": (6,),
    "conv.weight": (4, 2, 3),
    "table.weight": (12, 5),
    "norm.weight": (7,),
    "scale": (),
})
PROJECTORS: dict[str, Projector] = {
    "identity": IdentityProjector(),
    "kronecker": KroneckerProjector(40),
    "rademacher": RademacherProjector(24),
    "gaussian": GaussianProjector(24),
    "sjlt": SJLTProjector(24, nonzeros=3),
    "factored_sjlt": FactoredSJLTProjector(24, side=3),
    "grass": GraSSProjector(24, mask_factor=3),
    "factgrass": FactGraSSProjector(24, mask_factor=3),
}
RANDOM = [kind for kind in PROJECTORS if kind != "identity"]


def _gradients(b: int, seed: int = 0) -> tuple[dict[str, ParameterGradient], dict[str, Tensor]]:
    """The gradients of a batch, factored where a rule would factor them, and materialised."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(b, *shape, generator=generator).double()

    factored: dict[str, ParameterGradient] = {
        "linear.weight": OuterSum(draw(3, 6), draw(3, 9)),
        "linear.bias": draw(6),
        "conv.weight": ConvSum(draw(2, 8), draw(4, 6), (3,), (1,), (1,), 1),
        "table.weight": GatherSum(torch.randint(12, (b, 4), generator=generator), draw(4, 5), 12),
        "norm.weight": draw(7),
        "scale": draw(),
    }
    dense = {
        name: (g if isinstance(g, Tensor) else g.materialise()).reshape(b, *LAYOUT.shapes[name])
        for name, g in factored.items()
    }
    return factored, dense


def _project(projection: Projection, gradients: dict[str, ParameterGradient], b: int, dtype=torch.float64) -> Tensor:
    features = torch.zeros(b, projection.dim, dtype=dtype)
    for name, gradient in gradients.items():
        projection.accumulate(features, name, gradient)
    return features


def _flat(dense: dict[str, Tensor]) -> Tensor:
    return torch.cat(
        [dense[name].flatten(1) if dense[name].ndim > 1 else dense[name][:, None] for name in LAYOUT.shapes], 1
    )


def _matrix(projector: Projector, layout: ParameterLayout = LAYOUT, snapshot: str = "final") -> Tensor:
    """The projection as the matrix that it is, ``(dim, parameters)``: the images of the unit vectors."""
    projection = projector.bind(layout, snapshot)
    eye = torch.eye(layout.numel).double()
    gradients = {name: eye[:, slot].reshape(-1, *layout.shapes[name]) for name, slot in flat_slots(layout).items()}
    return _project(projection, gradients, layout.numel).T


@pytest.mark.parametrize("kind", PROJECTORS)
def test_features_are_linear_in_the_gradient(kind: str) -> None:
    _, dense = _gradients(5)
    matrix = _matrix(PROJECTORS[kind])
    features = _project(PROJECTORS[kind].bind(LAYOUT, "final"), dense, 5)
    torch.testing.assert_close(features, _flat(dense) @ matrix.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", PROJECTORS)
def test_factored_and_materialised_gradients_give_the_same_features(kind: str) -> None:
    factored, dense = _gradients(5)
    projection = PROJECTORS[kind].bind(LAYOUT, "final")
    torch.testing.assert_close(
        _project(projection, factored, 5), _project(projection, dense, 5), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("kind", PROJECTORS)
def test_batches_and_order_change_nothing(kind: str) -> None:
    factored, dense = _gradients(6)
    whole = _project(PROJECTORS[kind].bind(LAYOUT, "final"), factored, 6)
    projection = PROJECTORS[kind].bind(LAYOUT, "final")
    for rows in ([4], [5, 0, 3], [1, 2]):
        part = {name: dense[name][rows] for name in reversed(LAYOUT.shapes)}  # another order of parameters, too
        torch.testing.assert_close(_project(projection, part, len(rows)), whole[rows], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", PROJECTORS)
def test_dtypes_change_nothing_but_rounding(kind: str) -> None:
    _, dense = _gradients(4)
    projection = PROJECTORS[kind].bind(LAYOUT, "final")
    single = {name: g.float() for name, g in dense.items()}
    low = _project(projection, single, 4, torch.float32)
    high = _project(projection, {name: g.double() for name, g in single.items()}, 4)
    again = _project(projection, single, 4, torch.float32)
    error = (low.double() - high).norm() / high.norm()
    assert error < (2e-4 if kind == "rademacher" else 1e-6)  # which rounds float32 to 16 bits where that is faster
    assert torch.equal(low, again)


@pytest.mark.parametrize("kind", PROJECTORS)
def test_accumulate_adds_to_what_is_there(kind: str) -> None:
    factored, _ = _gradients(2)
    projection = PROJECTORS[kind].bind(LAYOUT, "final")
    features = _project(projection, factored, 2)
    twice = features.clone()
    for name, gradient in factored.items():
        projection.accumulate(twice, name, gradient)
    torch.testing.assert_close(twice, 2 * features, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", RANDOM)
def test_a_function_of_seed_and_snapshot_alone(kind: str) -> None:
    cls = type(PROJECTORS[kind])
    torch.manual_seed(1)
    first = _matrix(cls(40, seed=3), snapshot="a")
    torch.manual_seed(2)
    assert torch.equal(_matrix(cls(40, seed=3), snapshot="a"), first)
    for other in (_matrix(cls(40, seed=4), snapshot="a"), _matrix(cls(40, seed=3), snapshot="b")):
        assert not torch.equal(other, first)


@pytest.mark.parametrize("kind", RANDOM)
def test_global_random_state_is_left_alone(kind: str) -> None:
    before = torch.get_rng_state()
    _matrix(PROJECTORS[kind])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", PROJECTORS)
def test_config_round_trip(kind: str) -> None:
    projector = PROJECTORS[kind]
    again = projector_from_config(projector.config)
    assert type(again) is type(projector)
    assert again.config == projector.config
    assert torch.equal(_matrix(again), _matrix(projector))


def test_config_of_an_unknown_projector() -> None:
    with pytest.raises(
        ValueError, match=r"Expected a projector among \['eigen', 'fact.*'gaussian', .*'sjlt'\], but .* 'fft'"
    ):
        projector_from_config({"kind": "fft", "proj_dim": 3})


@pytest.mark.parametrize(
    "config",
    [
        {"kind": "kronecker", "proj_dim": "../../x"},
        {"kind": "kronecker", "proj_dim": 4, "seed": []},
        {"kind": "kronecker", "proj_dim": 4, "__class__": "x"},
        {"kind": LayerSubset.kind, "projector": {"kind": "kronecker", "proj_dim": 4}},
    ],
)
def test_settings_of_a_store_that_make_no_projector(config: dict[str, Any]) -> None:
    config = {
        **config,
        "kind": LayerSubset.kind if config["kind"] == "layers" else KroneckerProjector(4).config["kind"],
    }
    with pytest.raises(CorruptedStoreError, match=r"The store says .* those of .* which is no projector"):
        projector_from_config(config)


@pytest.mark.parametrize("config", [{}, {"kind": []}, {"kind": {"a": 1}}, {"kind": LayerSubset.kind, "projector": 3}])
def test_what_is_recorded_of_no_projector(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Expected a projector among"):
        projector_from_config(config)


@pytest.mark.parametrize("kind", RANDOM)
@pytest.mark.parametrize("proj_dim", [0, -1])
def test_proj_dim_that_is_not_positive(kind: str, proj_dim: int) -> None:
    with pytest.raises(ValueError, match=f"`proj_dim` of .+ to be an integer >= 1, but got {proj_dim}"):
        type(PROJECTORS[kind])(proj_dim)


def test_identity_keeps_the_order_of_the_parameters() -> None:
    factored, dense = _gradients(3)
    features = _project(IdentityProjector().bind(LAYOUT, "final"), factored, 3)
    torch.testing.assert_close(features, _flat(dense), rtol=1e-12, atol=1e-12)
    assert list(flat_slots(LAYOUT)) == list(LAYOUT.shapes)


# Statistics over seeds. The bound on the mean is 5 standard errors; that on the variance 20 %, with about 4 % of noise.

SEEDS = 1500
VECTOR = ParameterLayout({"w": (30,)})


def _products(projectors: list[Projector], layout: ParameterLayout, x: Tensor, y: Tensor) -> Tensor:
    """``<Px, Py>`` for each projector."""
    gradients = {
        name: torch.stack([x, y])[:, slot].reshape(2, *layout.shapes[name]) for name, slot in flat_slots(layout).items()
    }
    products = []
    for projector in projectors:
        px, py = _project(projector.bind(layout, "final"), gradients, 2)
        products.append(px @ py)
    return torch.stack(products)


def _check_moments(products: Tensor, mean: float, variance: float) -> None:
    assert abs(products.mean().item() - mean) < 5 * math.sqrt(variance / len(products))
    assert products.var().item() == pytest.approx(variance, rel=0.2)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_dense_projections_are_unbiased_with_the_known_variance(kind: str) -> None:
    x, y = torch.randn(2, 30, generator=torch.Generator().manual_seed(0)).double()
    y += 0.5 * x
    x[0] = y[0] = 3  # a large entry in common, which tells signs from normal numbers
    k, product = 16, (x @ y).item()
    products = _products([type(PROJECTORS[kind])(k, seed=seed) for seed in range(SEEDS)], VECTOR, x, y)
    variance = (x @ x * (y @ y)).item() + product**2
    if kind == "rademacher":
        variance -= 2 * (x**2 @ y**2).item()
    _check_moments(products, product, variance / k)


def test_kronecker_projection_is_unbiased_with_the_known_variance() -> None:
    # For gradients of rank one and signs: E<P a, P a'>^2 of each side, without the fourth moments of normal numbers.
    rows, columns, side = 12, 15, 4
    layout = ParameterLayout({"weight": (rows, columns)})
    generator = torch.Generator().manual_seed(0)
    e, f = torch.randn(2, rows, generator=generator).double()
    a, c = torch.randn(2, columns, generator=generator).double()
    f, c = f + e, c + a
    products = _products(
        [KroneckerProjector(side**2, seed=seed) for seed in range(SEEDS)],
        layout,
        torch.outer(e, a).flatten(),
        torch.outer(f, c).flatten(),
    )

    def second_moment(x: Tensor, y: Tensor) -> float:
        variance = (x @ x) * (y @ y) + (x @ y) ** 2 - 2 * (x**2 @ y**2)
        return (variance / side + (x @ y) ** 2).item()

    product = ((e @ f) * (a @ c)).item()
    _check_moments(products, product, second_moment(e, f) * second_moment(a, c) - product**2)


@pytest.mark.parametrize("kind", RANDOM)
def test_a_whole_module_is_unbiased(kind: str) -> None:
    layout = ParameterLayout.of(nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4, bias=False)))
    x, y = torch.randn(2, layout.numel, generator=torch.Generator().manual_seed(0)).double()
    y += x
    products = _products([type(PROJECTORS[kind])(20, seed=seed) for seed in range(600)], layout, x, y)
    error = products.std().item() / math.sqrt(len(products))
    assert abs(products.mean().item() - (x @ y).item()) < 5 * error
    assert error < 0.2 * (x @ y).item()
