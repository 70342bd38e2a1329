"""The eigenbasis projection: beside full gradients rotated and chosen by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_attr.gradients import HookedGradients, OuterSum
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.projectors import (
    AdamDirection,
    EigenProjector,
    IdentityProjector,
    LearnedProjection,
    Projection,
    ScaledProjection,
    covariance,
    projector_from_config,
)
from lightning_attr.projectors.eigen import EigenProjection


def _gradients(module: nn.Module, x: torch.Tensor, projection: Projection) -> torch.Tensor:
    """Features of a batch, by the hooks, of the sum of squares of the outputs."""
    names = [name for name, _ in module.named_parameters()]
    features = torch.full(
        (len(x), projection.dim), float("nan"), dtype=x.dtype if x.is_floating_point() else torch.float32
    )
    with projection.filling(features) as add:
        HookedGradients(module, names)(lambda: module(x).square().flatten(1).sum(1), len(x), add)
    return features


def _learned(module: nn.Module, x: torch.Tensor, proj_dim: int) -> Any:
    projection = EigenProjection(ParameterLayout.of(module), proj_dim, 512, (0, "final"))  # also where all would fit
    projection.learn(lambda learner, every=1, entries=1: _gradients(module, x, learner))
    return projection


CASES = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3, bias=False)), (40, 6)),
    "positions": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3)), (40, 5, 6)),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.GroupNorm(2, 4)), (40, 2, 5, 5)),
    "groups": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Tanh(), nn.Conv2d(4, 2, 1)), (40, 4, 5, 5)),
}


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_lost_where_all_coordinates_fit(name: str) -> None:
    make, shape = CASES[name]
    torch.manual_seed(0)
    module, x = make().double(), torch.randn(shape).double()
    features = _gradients(module, x, _learned(module, x[:20], 10_000))
    whole = _gradients(module, x, IdentityProjector().bind(ParameterLayout.of(module), "final"))
    assert features.shape == whole.shape
    torch.testing.assert_close(features @ features.T, whole @ whole.T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_features_are_the_coordinates_of_largest_second_moment(name: str) -> None:
    make, shape = CASES[name]
    torch.manual_seed(0)
    module, x = make().double(), torch.randn(shape).double()
    whole, chosen = (_gradients(module, x, _learned(module, x, k)) for k in (10_000, 15))
    moments, order = whole.square().mean(0).sort(descending=True)
    largest = whole[:, order[:15].sort().values]
    assert chosen.shape == (40, 15)
    torch.testing.assert_close(chosen.abs(), largest.abs(), rtol=1e-6, atol=1e-8)
    # And they hold more than 15 of the coordinates by themselves, which a random choice would on average.
    assert moments[:15].sum() > 15 * moments.mean() * 1.5


@pytest.mark.parametrize("name", CASES)
def test_whole_gradients_are_kept_where_they_are_no_more_than_the_features(name: str) -> None:
    make, shape = CASES[name]
    torch.manual_seed(0)
    module, x = make().double(), torch.randn(shape).double()
    layout = ParameterLayout.of(module)
    projection = EigenProjector(layout.numel).bind(layout, "final")
    assert not isinstance(projection, LearnedProjection)
    features = _gradients(module, x, projection)
    whole = _gradients(module, x, IdentityProjector().bind(layout, "final"))
    torch.testing.assert_close(features @ features.T, whole @ whole.T)


def test_features_do_not_depend_on_the_batch() -> None:
    torch.manual_seed(0)
    module, x = CASES["positions"][0](), torch.randn(12, 5, 6)
    projection = _learned(module, x, 20)
    parts = torch.cat([_gradients(module, part, projection) for part in x.split([1, 4, 7])])
    torch.testing.assert_close(parts, _gradients(module, x, projection))


def test_positions_without_a_gradient_have_no_part() -> None:
    torch.manual_seed(0)
    rows, columns = torch.randn(9, 4, 3), torch.randn(9, 4, 5)
    rows[:, 3] = 0
    found = []
    for positions in (3, 4):
        projection = EigenProjection(ParameterLayout({"weight": (3, 5)}), 6, 512, (0, "final"))

        def run(learner: Projection, every: int = 1, entries: int = 1, positions: int = positions) -> None:
            with learner.filling(torch.empty(9, learner.dim)) as add:
                add({"weight": OuterSum(rows[:, :positions], columns[:, :positions])})

        projection.learn(run)
        found.append(projection.basis)
    for name, values in found[0].items():
        torch.testing.assert_close(found[1][name], values, rtol=1e-4, atol=1e-5)


def test_a_table_of_embeddings() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(11, 5), nn.Linear(5, 3))
    x = torch.randint(0, 11, (30, 4))
    whole = _gradients(module, x, IdentityProjector().bind(ParameterLayout.of(module), "final"))
    features = _gradients(module, x, _learned(module, x, 10_000))
    torch.testing.assert_close(features @ features.T, whole @ whole.T, rtol=1e-4, atol=1e-4)
    assert _gradients(module, x, _learned(module, x, 9)).isfinite().all()


def test_a_loaded_basis_gives_the_same_features_and_layers() -> None:
    torch.manual_seed(0)
    module, x = CASES["mlp"][0](), torch.randn(12, 6)
    learned = _learned(module, x, 20)
    loaded = EigenProjector(20).bind(ParameterLayout.of(module), "other key")
    loaded.load(learned.basis)
    assert torch.equal(_gradients(module, x, loaded), _gradients(module, x, learned))
    assert loaded.layers == learned.layers
    assert sum(slot.stop - slot.start for slot in (loaded.layers or {}).values()) == 20


@pytest.mark.parametrize("diagonal", [False, True])
def test_wide_sides_are_decomposed_from_a_sketch(diagonal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    spread = torch.linspace(3, -5, 300).exp()
    vectors = torch.randn(2000, 300) * spread @ torch.linalg.qr(torch.randn(300, 300)).Q
    found = []
    for whole in (1024, 10):
        monkeypatch.setattr(covariance, "_WHOLE", whole)
        moment = covariance.Covariance(300, most=40)
        for part in vectors.split(500):
            moment.add(part)
        if diagonal:
            moment.add_diagonal(torch.linspace(0, 1e4, 300).double())
        found.append(moment.leading())
    torch.testing.assert_close(found[1] @ found[1].T, torch.eye(40), rtol=1e-5, atol=1e-5)
    total = vectors.T @ vectors + diagonal * torch.linspace(0, 1e4, 300).diag()
    energy = [(basis @ total @ basis.T).trace().item() for basis in found]
    assert energy[1] == pytest.approx(energy[0], rel=0.02)


def test_a_sketch_of_nothing_has_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(covariance, "_WHOLE", 10)
    moment = covariance.Covariance(20, most=4)
    moment.add(torch.zeros(3, 20))
    assert moment.leading().isfinite().all()


def test_samples_to_learn_from_are_spread_and_repeatable() -> None:
    projection = EigenProjector(8, samples=10).bind(ParameterLayout({"w": (4, 4)}), "final")
    rows = projection.learning_rows(1000)
    assert rows == projection.learning_rows(1000)
    assert len(set(rows)) == 10
    assert max(rows) > 500
    assert list(projection.learning_rows(7)) == list(range(7))
    assert rows != EigenProjector(8, seed=1, samples=10).bind(ParameterLayout({"w": (4, 4)}), "final").learning_rows(
        1000
    )


def test_config_round_trip() -> None:
    config = EigenProjector(40, seed=3, samples=10).config
    assert projector_from_config(config).config == config


@pytest.mark.parametrize("make", [ScaledProjection, AdamDirection])
def test_a_learned_projection_of_scaled_gradients_is_refused(make: Any) -> None:
    layout = ParameterLayout({"weight": (3, 4)})
    with pytest.raises(ValueError, match=r"that learns nothing from gradients, but got EigenProjector\. Use Kronecker"):
        make(EigenProjector(4).bind(layout, ""), layout, {})


@pytest.mark.parametrize("number", [0, 1])
def test_a_gradient_that_is_not_finite_shows_in_its_row_while_learning(number: int) -> None:
    seen: list[torch.Tensor] = []

    def run(learner: Projection, every: int = 1, entries: int = 1) -> None:
        gradient = torch.ones(5, 3, 4)
        gradient[2, 1, 1] = float("inf") if len(seen) == number else 1.0
        seen.append(torch.empty(5, learner.dim))
        with learner.filling(seen[-1]) as add:
            add({"weight": gradient})
        if not seen[-1].isfinite().all():
            raise InterruptedError

    with pytest.raises(InterruptedError):
        EigenProjector(4).bind(ParameterLayout({"weight": (3, 4)}), "").learn(run)
    assert seen[number].isfinite().all(1).tolist() == [True, True, False, True, True]


def test_bad_input() -> None:
    layout = ParameterLayout({"weight": (3, 4)})
    with pytest.raises(ValueError, match=r"`samples` of EigenProjector to be .*>= 1, but got 0"):
        EigenProjector(samples=0)
    with pytest.raises(RuntimeError, match="Expected a basis before features are computed"):
        EigenProjector(4).bind(layout, "").accumulate(torch.zeros(1, 4), "weight", torch.ones(1, 3, 4))
    module, x = nn.Linear(4, 3, bias=False), torch.randn(9, 4)
    basis = _learned(module, x, 4).basis
    with pytest.raises(ValueError, match="basis of `weight` to be of 3 x 5 parameters, but got 3 x 4"):
        EigenProjector(4).bind(ParameterLayout({"weight": (3, 5)}), "").load(basis)
    with pytest.raises(ValueError, match="a basis of 5 features, but got one of 4"):
        EigenProjector(5).bind(layout, "").load(basis)
