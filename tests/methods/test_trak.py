"""TRAK against closed forms: what it computes where theory says exactly what leaving a sample out does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_attr import AttributionMixin
from lightning_attr.features.featurizer import Featurizer, plan
from lightning_attr.methods import TRAK, SnapshotFeatures
from lightning_attr.outputs import BinaryMargin, MulticlassMargin, Regression
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.projectors import GaussianProjector, IdentityProjector, Projector, RademacherProjector

N, M, P = 40, 6, 5
Batch = tuple[Tensor, Tensor]


class Line(AttributionMixin, nn.Linear):
    model_output = Regression()


class Logistic(AttributionMixin, nn.Linear):
    model_output = BinaryMargin()


class Softmax(AttributionMixin, nn.Linear):
    def __init__(self, inputs: int, classes: int, constant: float = 0.0) -> None:
        super().__init__(inputs, classes)
        self.constant = constant

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.constant


def _features(module: Any, batch: Batch, projector: Projector | None = None) -> dict[str, Tensor]:
    projection = (projector or IdentityProjector()).bind(ParameterLayout.of(module), "final")
    return Featurizer(module, plan(module, batch, len(batch[0])), projection)(batch, range(len(batch[0])))


def _score(method: TRAK, *snapshots: tuple[Mapping[str, Tensor], Mapping[str, Tensor]]) -> tuple[Tensor, Tensor]:
    (block,) = method.score([SnapshotFeatures.of(*snapshot) for snapshot in snapshots])
    return block.scores, block.self_influence


def _columns(rows: int = N, dim: int = P, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.rand(rows, generator=generator).double()
    features = torch.randn(rows, dim, generator=generator).double()
    return {"features": features, "out_to_loss": q, "newton_weight": q * (1 - q)}


def _regression() -> tuple[Line, Batch, Batch]:
    x, targets = torch.randn(N, P).double(), torch.randn(M, P).double()
    y = x @ torch.randn(P).double() + torch.randn(N).double()
    module = Line(P, 1, bias=False).double()
    module.weight.data[0] = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    return module, (x, y), (targets, torch.zeros(M).double())


# Linear regression ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("newton_weights", [True, False])
def test_regression_is_the_closed_form(newton_weights: bool) -> None:
    module, (x, y), targets = _regression()
    train = _features(module, (x, y))
    scores, self_influence = _score(TRAK(damping=0, newton_weights=newton_weights), (train, _features(module, targets)))
    residual = y - x @ module.weight[0].detach()
    expected = residual[:, None] * (x @ torch.linalg.inv(x.T @ x) @ targets[0].T)
    torch.testing.assert_close(scores, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(scores.sum(0), torch.zeros(M).double(), atol=1e-10, rtol=0)  # the normal equations
    torch.testing.assert_close(self_influence, residual * (x @ torch.linalg.inv(x.T @ x) * x).sum(1))


def test_regression_with_leverage_is_leaving_one_out_and_training_again() -> None:
    module, (x, y), (targets, zeros) = _regression()
    scores, _ = _score(TRAK(damping=0), (_features(module, (x, y)), _features(module, (targets, zeros))))
    leverage = (x @ torch.linalg.inv(x.T @ x) * x).sum(1)
    full = targets @ module.weight[0].detach()
    for i in range(N):
        kept = torch.arange(N) != i
        weight = torch.linalg.lstsq(x[kept], y[kept, None]).solution[:, 0]
        torch.testing.assert_close(scores[i] / (1 - leverage[i]), full - targets @ weight, rtol=1e-9, atol=1e-11)


def test_the_variance_of_a_regression_changes_no_newton_score() -> None:
    module, train, targets = _regression()
    expected, _ = _score(TRAK(damping=0), (_features(module, train), _features(module, targets)))
    module.model_output = Regression(variance=0.2)
    found, _ = _score(TRAK(damping=0), (_features(module, train), _features(module, targets)))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("projector", [RademacherProjector(P, seed=2), GaussianProjector(P, seed=1)])
@pytest.mark.parametrize("newton_weights", [True, False])
def test_any_invertible_projection_gives_the_same_scores(projector: Projector, newton_weights: bool) -> None:
    module, train, targets = _regression()
    method = TRAK(damping=0, newton_weights=newton_weights)
    expected = _score(method, (_features(module, train), _features(module, targets)))
    found = _score(method, (_features(module, train, projector), _features(module, targets, projector)))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


# Logistic regression ----------------------------------------------------------------------------------------------


def _fit_logistic(x: Tensor, y: Tensor, ridge: float, weights: Tensor) -> Tensor:
    """Newton's method, with a ridge on all coefficients, to the last digit."""
    theta = torch.zeros(x.shape[1]).double()
    for _ in range(50):
        p = (x @ theta).sigmoid()
        gradient = x.T @ (weights * (p - y)) + ridge * theta
        hessian = x.T @ (x * (weights * p * (1 - p))[:, None]) + ridge * torch.eye(len(theta)).double()
        theta = theta - torch.linalg.solve(hessian, gradient)
    assert gradient.norm() < 1e-12
    return theta


def test_logistic_regression_is_the_derivative_of_training_again() -> None:
    ridge, eps = 0.3, 1e-4
    x, targets = torch.randn(N, P).double(), torch.randn(M, P).double()
    y = (x @ torch.randn(P).double() + torch.randn(N).double() > 0).double()
    labels = torch.tensor([0, 1, 0, 1, 1, 0]).double()
    theta = _fit_logistic(x, y, ridge, torch.ones(N).double())
    module = Logistic(P, 1, bias=False).double()
    module.weight.data[0] = theta
    train = _features(module, (x, y))
    p = (x @ theta).sigmoid()
    diagonal = (x.square() * (p * (1 - p))[:, None]).sum(0).mean()
    method = TRAK(damping=(ridge / diagonal).item())  # relative damping that adds the ridge
    scores, self_influence = _score(method, (train, _features(module, (targets, labels))))

    def output_change(i: int, inputs: Tensor, signs: Tensor) -> Tensor:
        """Derivative of the outputs in the weight of training sample i."""
        ends = []
        for step in (eps, -eps):
            weights = torch.ones(N).double()
            weights[i] += step
            ends.append(signs * (inputs @ _fit_logistic(x, y, ridge, weights)))
        return (ends[0] - ends[1]) / (2 * eps)

    for i in range(0, N, 5):
        torch.testing.assert_close(scores[i], output_change(i, targets, 2 * labels - 1), rtol=1e-6, atol=1e-8)
        own = output_change(i, x[i : i + 1], 2 * y[i : i + 1] - 1)
        assert self_influence[i].item() == pytest.approx(own.item(), rel=1e-6)


# Invariances ------------------------------------------------------------------------------------------------------

METHODS = [TRAK(damping=0), TRAK(damping=0.3), TRAK(damping=0.3, newton_weights=False)]


@pytest.mark.parametrize("method", METHODS)
def test_scaling_all_features_changes_nothing(method: TRAK) -> None:
    train, targets = _columns(), _columns(M, seed=1)
    expected = _score(method, (train, targets))
    scaled = [{**columns, "features": 1e-3 * columns["features"]} for columns in (train, targets)]
    for a, b in zip(_score(method, tuple(scaled)), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_permuting_rows_permutes_scores(method: TRAK) -> None:
    train, targets, order = _columns(), _columns(M, seed=1), torch.randperm(N)
    scores, self_influence = _score(method, (train, targets))
    found = _score(method, ({name: values[order] for name, values in train.items()}, targets))
    torch.testing.assert_close(found[0], scores[order], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found[1], self_influence[order], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_copies_of_a_sample_have_equal_scores(method: TRAK) -> None:
    module, (x, y), targets = _regression()
    x[7], y[7] = x[3], y[3]
    scores, self_influence = _score(method, (_features(module, (x, y)), _features(module, targets)))
    torch.testing.assert_close(scores[7], scores[3], rtol=1e-12, atol=0)
    torch.testing.assert_close(self_influence[7], self_influence[3], rtol=1e-12, atol=0)


@pytest.mark.parametrize("newton_weights", [True, False])
def test_a_constant_added_to_all_logits_changes_nothing(newton_weights: bool) -> None:
    x, y, found = torch.randn(N, P).double(), torch.randint(3, (N,)), []
    modules = [Softmax(P, 3).double(), Softmax(P, 3, constant=10.0).double()]
    modules[1].load_state_dict(modules[0].state_dict())
    for module in modules:
        train, targets = _features(module, (x, y)), _features(module, (x[:M], y[:M].roll(1)))
        found.append(_score(TRAK(newton_weights=newton_weights), (train, targets)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [2, 5])
def test_equal_snapshots_are_one(method: TRAK, count: int) -> None:
    snapshot = _columns(), _columns(M, seed=1)
    for a, b in zip(_score(method, *[snapshot] * count), _score(method, snapshot), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("balanced", [True, False])
def test_newton_scores_are_the_mean_over_snapshots(balanced: bool) -> None:
    snapshots = [(_columns(seed=s), _columns(M, seed=s + 10)) for s in range(3)]
    for s, (train, _) in enumerate(snapshots):
        train["out_to_loss"] *= 10.0**-s  # late snapshots push less
    found = _score(TRAK(balanced=balanced), *snapshots)
    alone = [_score(TRAK(), snapshot) for snapshot in snapshots]
    weights = torch.tensor([1 / one[1].abs().mean() if balanced else 1.0 for one in alone]).double()
    weights /= weights.sum()
    for i in range(2):
        expected = sum(weight * one[i] for weight, one in zip(weights, alone, strict=True))
        torch.testing.assert_close(found[i], expected, rtol=1e-6, atol=1e-12)


def test_a_snapshot_without_any_push_does_no_harm() -> None:
    snapshots = [(_columns(seed=s), _columns(M, seed=s + 10)) for s in range(2)]
    snapshots[0][0]["out_to_loss"] *= 0
    found, alone = _score(TRAK(), *snapshots), _score(TRAK(), snapshots[1])
    torch.testing.assert_close(found[0], alone[0] / 2)


def test_published_trak_averages_q_apart() -> None:
    snapshots = [(_columns(seed=s), _columns(M, seed=s + 10)) for s in range(3)]
    kernels, leverages = [], []
    for train, targets in snapshots:
        phi = train["features"]
        kernel = phi.T @ phi
        inverse = torch.linalg.inv(kernel + 0.7 * kernel.trace() / P * torch.eye(P).double())
        kernels.append(phi @ inverse @ targets["features"].T)
        leverages.append((phi @ inverse * phi).sum(1))
    q = torch.stack([train["out_to_loss"] for train, _ in snapshots]).mean(0)
    scores, self_influence = _score(TRAK(damping=0.7, newton_weights=False), *snapshots)
    torch.testing.assert_close(scores, q[:, None] * torch.stack(kernels).mean(0))
    torch.testing.assert_close(self_influence, q * torch.stack(leverages).mean(0))


def test_damping_is_relative_to_the_weighted_kernel() -> None:
    train, targets = _columns(), _columns(M, seed=1)
    phi, q = train["features"], train["out_to_loss"]
    kernel = phi.T @ (phi * train["newton_weight"][:, None])
    inverse = torch.linalg.inv(kernel + 0.7 * kernel.trace() / P * torch.eye(P).double())
    scores, self_influence = _score(TRAK(damping=0.7), (train, targets))
    torch.testing.assert_close(scores, q[:, None] * (phi @ inverse @ targets["features"].T))
    torch.testing.assert_close(self_influence, q * (phi @ inverse * phi).sum(1))


# Self-influence ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_leverages_add_up_to_the_effective_dimension(damping: float) -> None:
    train = _columns()
    train["out_to_loss"] = torch.ones(N).double()
    _, leverage = _score(TRAK(damping=damping, newton_weights=False), (train, _columns(M, seed=1)))
    values = torch.linalg.svdvals(train["features"]).square()
    ridge = damping * values.sum() / P
    assert leverage.sum().item() == pytest.approx((values / (values + ridge)).sum().item(), rel=1e-9)
    assert leverage.min() >= 0
    assert leverage.max() <= 1
    if damping == 0:
        assert leverage.sum().item() == pytest.approx(P)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("snapshots", [1, 3])
def test_self_influence_is_the_diagonal(method: TRAK, snapshots: int) -> None:
    both = [(_columns(seed=s), _columns(seed=s)) for s in range(snapshots)]
    scores, self_influence = _score(method, *both)
    torch.testing.assert_close(scores.diagonal(), self_influence, rtol=1e-9, atol=1e-12)


# Sign -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("newton_weights", [True, False])
def test_a_copy_of_a_target_is_its_top_proponent_and_a_mislabelled_one_its_top_opponent(newton_weights: bool) -> None:
    y = torch.randint(2, (60,))
    x = torch.randn(60, P).double() + y[:, None]
    x[:, -1] *= 0.03  # a direction in which only the target is large
    target, label = torch.tensor([0.5, 0.5, 0.5, 0.5, 1.5]).double(), torch.tensor(0)
    for own, extreme in ((label, torch.argmax), (torch.tensor(1), torch.argmin)):
        inputs, labels = torch.cat([x, target[None]]), torch.cat([y, own[None]])
        module = Softmax(P, 2).double()
        optimizer = torch.optim.LBFGS(module.parameters(), lr=0.5, max_iter=30)

        def closure(
            module: Any = module, inputs: Tensor = inputs, labels: Tensor = labels, optimizer: Any = optimizer
        ) -> Tensor:
            optimizer.zero_grad()
            ridge = 0.02 * module.weight.square().sum()
            loss = MulticlassMargin().loss(module(inputs), labels).mean() + ridge
            loss.backward()
            return loss

        optimizer.step(closure)
        module.zero_grad()
        targets = _features(module, (target[None], label[None]))
        scores, _ = _score(TRAK(newton_weights=newton_weights), (_features(module, (inputs, labels)), targets))
        assert extreme(scores[:, 0]).item() == 60
        assert scores[60, 0].sign() == (1 if own == label else -1)


# Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [-0.1, float("nan")])
def test_damping_below_zero(damping: float) -> None:
    with pytest.raises(ValueError, match=f"`damping` of .+ to be a finite number >= 0, or 'auto', but got {damping}"):
        TRAK(damping=damping)


@pytest.mark.parametrize("newton_weights", [True, False])
def test_a_singular_kernel(newton_weights: bool) -> None:
    train, targets = _columns(), _columns(M, seed=1)
    for columns in (train, targets):
        columns["features"] = torch.cat([columns["features"], torch.zeros(len(columns["features"]), 1).double()], 1)
    method = TRAK(damping=0, newton_weights=newton_weights)
    with pytest.raises(ValueError, match=r"kernel of 6 features is singular with `damping=0`\. Raise the damping"):
        _score(method, (train, targets))
    scores, _ = _score(TRAK(newton_weights=newton_weights), (train, targets))
    assert scores.isfinite().all()
