from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from truths import truth_of

from lightning_attr import AttributionMixin
from lightning_attr.attribution.scoring import score
from lightning_attr.features.snapshot_model import SnapshotModel
from lightning_attr.func import dropout_ensemble
from lightning_attr.methods import (
    TRAK,
    AttributionMethod,
    DropoutEnsemble,
    GradDot,
    ModelMethod,
    ScoreBlock,
    SnapshotFeatures,
)
from lightning_attr.projectors import GaussianProjector, IdentityProjector, KroneckerProjector, NoProjection, Projector
from lightning_attr.randomness.streams import hashed_seed

N, M = 20, 7


class Classifier(AttributionMixin, nn.Sequential):
    """With dropout and with BatchNorm, whose running statistics are of no batch here."""


def _module(rate: float = 0.3, **layers: nn.Module) -> Classifier:
    module = Classifier(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(rate), nn.Linear(6, 3)).double()
    module[1].running_mean.normal_()
    module[1].running_var.uniform_(0.5, 2)
    return module.eval()


def _batches(n: int, size: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, 3, generator=generator).double(), torch.randint(3, (n,), generator=generator)
    return list(zip(x.split(size), y.split(size), strict=True))


def _model(module: Any, size: int = 6, key: str = "current", folder: Path | None = None) -> SnapshotModel:
    model = SnapshotModel.of(module, _batches(N, size, 0), _batches(M, size, 1), key)
    object.__setattr__(model, "folder", folder)
    return model


def _scored(method: AttributionMethod, *models: SnapshotModel) -> tuple[Tensor, Tensor]:
    blocks = list(method.score([SnapshotFeatures.at(model, {}) for model in models]))
    return torch.cat([block.scores for block in blocks]), torch.cat([block.self_influence for block in blocks])


def _columns(model: SnapshotModel, projector: Projector, key: str) -> SnapshotFeatures:
    """The slow way: features of the module as it is, all in one block."""
    projection = projector.bind(model.layout, key)
    parts = [columns for _, columns in model.train(projection)]
    train = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return SnapshotFeatures.of(train, model.targets(projection, range(M)))


def _same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float = 1e-10) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("inner", [TRAK, lambda projector: TRAK(projector=projector, newton_weights=False)])
def test_at_rate_zero_it_is_the_plain_method(inner: Any) -> None:
    method = TRAK(projector=IdentityProjector()) if inner is TRAK else inner(IdentityProjector())
    model = _model(_module())
    (expected,) = method.score([_columns(model, IdentityProjector(), "any")])
    for ensemble in (DropoutEnsemble(method, masks=3, rate=0), DropoutEnsemble(method, 2, rate=0, forward_only=True)):
        _same(_scored(ensemble, model), (expected.scores, expected.self_influence))


@pytest.mark.parametrize("projector", [IdentityProjector(), GaussianProjector(9, seed=1)])
def test_every_mask_is_a_member(projector: Projector) -> None:
    models = [_model(_module(), key="run0/a"), _model(_module(), key="run0/b")]
    members = []
    for model in models:
        for mask in range(3):
            with dropout_ensemble(model.module, hashed_seed(5, model.key, mask)):
                members.append(_columns(model, projector, f"{model.key}/mask={mask}"))
    method = TRAK(projector=projector)
    (expected,) = method.score(members)
    _same(_scored(DropoutEnsemble(method, masks=3, seed=5), *models), (expected.scores, expected.self_influence))
    assert members[0].targets["output"].sub(members[1].targets["output"]).abs().min() > 0


def test_gradients_once_and_forward_passes_for_the_masks() -> None:
    model, method = _model(_module()), TRAK(projector=IdentityProjector())
    plain = _columns(model, IdentityProjector(), "any")
    (_, train), *_ = plain.blocks()
    pushes = []
    for mask in range(4):
        with dropout_ensemble(model.module, hashed_seed(0, model.key, mask)):
            pushes += [torch.cat([columns["out_to_loss"] for _, columns in model.train(NoProjection())])]
    assert (pushes[0] - pushes[1]).abs().max() > 1e-3
    own = {**train, "out_to_loss": torch.stack(pushes).mean(0)}
    (expected,) = method.score([SnapshotFeatures.of(own, plain.targets)])
    ensemble = DropoutEnsemble(method, masks=4, forward_only=True)
    _same(_scored(ensemble, model), (expected.scores, expected.self_influence))


def test_another_rate_and_back() -> None:
    module, method = _module(0.3), GradDot(IdentityProjector())
    found = _scored(DropoutEnsemble(method, masks=2, rate=0.5), _model(module))
    assert module[3].p == 0.3
    module[3].p = 0.5
    _same(found, _scored(DropoutEnsemble(method, masks=2), _model(module)))


def test_all_else_stays_as_it_was() -> None:
    module = _module()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    _scored(DropoutEnsemble(GradDot(IdentityProjector()), masks=2), _model(module))
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert not module.training
    assert not module[3]._forward_hooks


@pytest.mark.parametrize("forward_only", [False, True])
def test_batches_do_not_matter(forward_only: bool) -> None:
    module = _module()
    method = DropoutEnsemble(TRAK(projector=IdentityProjector()), masks=2, forward_only=forward_only)
    expected = _scored(method, _model(module, size=6))
    for size in (1, 20):
        _same(_scored(method, _model(module, size=size)), expected)


def test_many_targets_are_scored_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    module, method = _module(), DropoutEnsemble(TRAK(projector=IdentityProjector()), masks=2)
    expected, _ = _scored(method, _model(module))
    monkeypatch.setattr("lightning_attr.attribution.scoring._MOST_TARGETS", 3)
    snapshot, runs = SnapshotFeatures.at(_model(module), {}), []
    handle = module[0].register_forward_hook(lambda *_: runs.append("run"))
    scores, _ = score(method, [snapshot], N)
    handle.remove()
    torch.testing.assert_close(scores.values, expected.to(scores.values.dtype), rtol=1e-5, atol=1e-5)
    assert len(runs) == 2 * (4 + 2)  # a mask: batches of training samples, and of targets
    assert [set(member) for member in snapshot.evidence["members"]] == [{"effective_dimension", "kernel"}] * 2


def test_a_damping_is_chosen_for_the_ensemble() -> None:
    module = _module()
    inner = TRAK(projector=IdentityProjector(), damping=3.0)
    truth = truth_of(_scored(DropoutEnsemble(inner, masks=2), _model(module))[0])
    method = DropoutEnsemble(TRAK(projector=IdentityProjector(), damping="auto", truth=truth), masks=2)
    snapshot = SnapshotFeatures.at(_model(module), {})
    score(method, [snapshot], N)
    assert snapshot.evidence["members"][0]["damping_choice"]["damping"] == 3.0
    assert method.config["fitted_on"] == method.method.config["fitted_on"]


@pytest.mark.parametrize("forward_only", [False, True])
def test_a_killed_run_goes_on_behind_its_last_mask(tmp_path: Path, forward_only: bool) -> None:
    module = _module()
    method = DropoutEnsemble(TRAK(projector=IdentityProjector()), masks=3, forward_only=forward_only)
    models = [_model(module, folder=tmp_path) for _ in range(4)]
    expected, runs, last = _scored(method, _model(module)), [], [9]

    def count(*_: Any) -> None:
        runs.append("run")
        if len(runs) == last[0]:
            raise KeyboardInterrupt

    module[0].register_forward_hook(count)
    with pytest.raises(KeyboardInterrupt):
        _scored(method, models[0])
    finished = len(list(tmp_path.iterdir()))
    assert finished == (2 if forward_only else 1)  # a mask is 4 batches, and 2 of targets, which are not kept
    runs.clear()
    last[0] = 10**9
    _same(_scored(method, models[1]), expected, 0)
    targets = 2 * (1 if forward_only else 3)
    assert len(runs) == 4 * ((4 if forward_only else 3) - finished) + targets
    runs.clear()
    _same(_scored(method, models[2]), expected, 0)
    assert len(runs) == targets
    other = DropoutEnsemble(method.method, masks=3, forward_only=forward_only, seed=1)
    assert (_scored(other, models[3])[0] - expected[0]).abs().max() > 1e-3


def test_arguments_are_on_record() -> None:
    config = DropoutEnsemble(TRAK(proj_dim=8), masks=4, rate=0.2).config
    assert config["method"] == "DropoutEnsemble"
    assert config["of"] == TRAK(projector=KroneckerProjector(8)).config  # in place of the default, which would learn
    assert (config["masks"], config["rate"], config["seed"], config["forward_only"]) == (4, 0.2, 0, False)
    assert DropoutEnsemble(GradDot()).select([1, 2]) == [2]
    assert DropoutEnsemble().select([1, 2]) == [1, 2]


# Bad input --------------------------------------------------------------------------------------------------------


def test_a_module_without_dropout() -> None:
    module = Classifier(nn.Linear(3, 3)).double().eval()
    with pytest.raises(ValueError, match=r"to have a dropout layer .* Functional dropout is not covered"):
        _scored(DropoutEnsemble(GradDot(IdentityProjector()), masks=2), _model(module))


def test_features_without_their_module() -> None:
    snapshot = SnapshotFeatures.of({"features": torch.ones(3, 2)}, {"features": torch.ones(1, 2)})
    with pytest.raises(TypeError, match="Expected a snapshot with its `model`"):
        next(DropoutEnsemble().score([snapshot]))


class RunsTheModule(ModelMethod):
    def score_snapshot(self, snapshot: Any) -> Any:
        yield ScoreBlock(range(0), torch.zeros(0, 0), torch.zeros(0))


class Preconditioned(GradDot):
    needs_optimizer_state = True


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": RunsTheModule()}, TypeError, "to score features, as TRAK does, but RunsTheModule runs the module"),
        ({"method": Preconditioned()}, TypeError, "to need no optimizer state, but Preconditioned does"),
        ({"masks": 0}, ValueError, "`masks` of .+ to be an integer >= 1, but got 0"),
        ({"rate": 1.0}, ValueError, r"`rate` of .+ to be a number in \[0, 1\), or None, but got 1.0"),
        ({"rate": -0.1}, ValueError, r"`rate` of .+ to be a number in \[0, 1\), or None, but got -0.1"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DropoutEnsemble(**arguments)
