"""Gradient similarity against loops over pairs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_attr import AttributionMixin
from lightning_attr.curvature.explicit import factor
from lightning_attr.features.featurizer import Featurizer, plan
from lightning_attr.methods import GradCos, GradDot, SnapshotFeatures
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.projectors import IdentityProjector

N, M, K = 7, 4, 5


def _columns(rows: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "features": torch.randn(rows, K, generator=generator).double(),
        "out_to_loss": torch.randn(rows, generator=generator).double(),
    }


def _score(method: GradDot, train: dict[str, Tensor], targets: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    (block,) = method.score([SnapshotFeatures.of(train, targets)])
    assert block.rows == range(N)
    return block.scores, block.self_influence


def test_graddot_matches_a_loop() -> None:
    train, targets = _columns(N, 0), _columns(M, 1)
    scores, self_influence = _score(GradDot(), train, targets)
    for i in range(N):
        q, g = train["out_to_loss"][i], train["features"][i]
        assert self_influence[i].item() == pytest.approx((q * (g @ g)).item())
        for j in range(M):
            assert scores[i, j].item() == pytest.approx((q * (g @ targets["features"][j])).item())


def test_gradcos_matches_a_loop() -> None:
    train, targets = _columns(N, 0), _columns(M, 1)
    scores, self_influence = _score(GradCos(), train, targets)
    for i in range(N):
        loss_gradient = -train["out_to_loss"][i] * train["features"][i]
        assert self_influence[i].item() == pytest.approx(train["out_to_loss"][i].sign().item())
        for j in range(M):
            expected = -F.cosine_similarity(loss_gradient, targets["features"][j], dim=0)
            assert scores[i, j].item() == pytest.approx(expected.item())


def test_gradcos_of_a_zero_gradient_is_zero() -> None:
    train, targets = _columns(N, 0), _columns(M, 1)
    train["features"][2] = 0
    targets["features"][1] = 0
    scores, self_influence = _score(GradCos(), train, targets)
    assert scores.isfinite().all()
    assert not scores[2].any()
    assert not scores[:, 1].any()
    assert self_influence[2] == 0


@pytest.mark.parametrize("method", [GradDot(), GradCos()])
def test_self_influence_is_the_diagonal(method: GradDot) -> None:
    train = _columns(N, 0)
    scores, self_influence = _score(method, train, train)
    torch.testing.assert_close(scores.diagonal(), self_influence)


@pytest.mark.parametrize("method", [GradDot(), GradCos()])
def test_blocks_change_nothing(method: GradDot) -> None:
    train, targets = _columns(N, 0), _columns(M, 1)
    whole = _score(method, train, targets)
    blocks = [range(5, 7), range(2), range(2, 5)]
    snapshot = SnapshotFeatures(
        lambda: ((rows, {name: values[rows] for name, values in train.items()}) for rows in blocks), targets
    )
    for block, rows in zip(method.score([snapshot]), blocks, strict=True):
        assert block.rows == rows
        torch.testing.assert_close(block.scores, whole[0][rows], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(block.self_influence, whole[1][rows], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", [GradDot(), GradCos()])
def test_only_the_last_snapshot_is_used(method: GradDot) -> None:
    assert list(method.select(["first", "second", "last"])) == ["last"]
    assert list(method.select(["last"])) == ["last"]
    snapshots = [SnapshotFeatures.of(_columns(N, seed), _columns(M, seed + 5)) for seed in range(2)]
    (both,), (last,) = method.score(snapshots), method.score(snapshots[1:])
    assert torch.equal(both.scores, last.scores)


def test_graddot_is_the_change_under_one_gradient_step() -> None:
    class Classifier(AttributionMixin, nn.Linear):
        pass

    module = Classifier(3, 4).double().eval()
    x, y = torch.randn(N, 3).double(), torch.randint(4, (N,))
    targets = torch.randn(M, 3).double(), torch.randint(4, (M,))
    featurize = Featurizer(module, plan(module, (x, y), N), IdentityProjector().bind(ParameterLayout.of(module), ""))
    scores, _ = _score(GradDot(), featurize((x, y), range(N)), featurize(targets, range(M)))
    params, rate = {name: p.detach() for name, p in module.named_parameters()}, 1e-5
    for i in range(N):
        loss = module.functional_loss({}, {}, (x[i : i + 1], y[i : i + 1])).sum()
        step = dict(zip(params, torch.autograd.grad(loss, list(module.parameters())), strict=True))
        ahead, behind = (
            module.functional_output({name: p - sign * rate * step[name] for name, p in params.items()}, {}, targets)
            for sign in (1, -1)
        )
        torch.testing.assert_close(scores[i], (ahead - behind) / (2 * rate), rtol=1e-6, atol=1e-8)


def test_graddot_is_influence_without_curvature() -> None:
    """Times the number of samples, since an influence is that of one weight among them."""
    train, targets = _columns(N, 0), _columns(M, 1)
    without = factor(torch.eye(K).double(), 0.0)
    influence = train["out_to_loss"][:, None] * train["features"] @ without.solve(targets["features"]).T / N
    torch.testing.assert_close(_score(GradDot(), train, targets)[0], N * influence)
