"""Representer points: the head that is a sum over training samples, and what has no such head."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from cases import BlobClassifier, blobs, loader_of, quiet_trainer
from lightning_attr import AttributionMixin
from lightning_attr.errors import AttributionError
from lightning_attr.features.snapshot_model import SnapshotModel
from lightning_attr.methods import RPS, SnapshotFeatures
from lightning_attr.methods.representer import fit_head
from lightning_attr.outputs import BinaryMargin, ModelOutput, MulticlassMargin, Regression

N, M = 12, 5


class Classifier(AttributionMixin, nn.Module):
    """Features, and a head on them."""

    def __init__(self, classes: int = 3, bias: bool = True, model_output: ModelOutput | None = None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        self.head = nn.Linear(6, classes, bias=bias)
        self.model_output = model_output or (BinaryMargin() if classes == 1 else MulticlassMargin())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def data(n: int, seed: int, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(classes, (n,), generator=generator)


def snapshot_of(module: nn.Module, train: Any = None, targets: Any = None) -> SnapshotFeatures:
    train, targets = train or data(N, 0), targets or data(M, 1)
    parts = [tuple(part.contiguous() for part in batch) for batch in zip(*(t.split(5) for t in train), strict=True)]
    return SnapshotFeatures.at(SnapshotModel.of(module.double().eval(), parts, [targets]), {})


def scores_of(method: RPS, snapshot: SnapshotFeatures) -> tuple[Tensor, Tensor]:
    blocks = list(method.score([snapshot]))
    assert [row for block in blocks for row in block.rows] == list(range(N))
    return torch.cat([block.scores for block in blocks]), torch.cat([block.self_influence for block in blocks])


def fitted(module: Classifier, l2: float) -> tuple[Tensor, Tensor, Tensor]:
    """Features, soft labels and the optimal head, by Newton steps with the whole Hessian."""
    h = module.body(data(N, 0)[0]).detach()
    logits = module.head(h).detach()
    if module.head.bias is not None:
        h = torch.cat([h, torch.ones(N, 1)], 1)
    soft = logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)

    def objective(flat: Tensor) -> Tensor:
        s = h @ flat.view(logits.shape[1], -1).T
        terms = (
            F.softplus(s) - soft * s if s.shape[1] == 1 else (s.logsumexp(1, keepdim=True) - (soft * s).sum(1, True))
        )
        return l2 * flat.square().sum() + terms.mean(0).sum()

    flat = torch.zeros(logits.shape[1] * h.shape[1], dtype=torch.float64)
    for _ in range(30):
        gradient = torch.autograd.functional.jacobian(objective, flat)
        flat = flat - torch.linalg.solve(torch.autograd.functional.hessian(objective, flat), gradient)
    assert gradient.norm() < 1e-12
    return h, soft, flat.view(logits.shape[1], -1)


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("l2", [1.0, 3e-3, 1e-3])
def test_scores_are_shares_in_the_logit_of_the_optimal_head(classes: int, bias: bool, l2: float) -> None:
    module = Classifier(classes, bias).double()
    targets = data(M, 1, max(2, classes))
    scores, self_influence = scores_of(RPS(l2), snapshot_of(module, data(N, 0, max(2, classes)), targets))
    h, soft, weight = fitted(module, l2)
    z = module.body(targets[0]).detach()
    z = torch.cat([z, torch.ones(M, 1)], 1) if bias else z
    s = h @ weight.T
    push = soft - (s.sigmoid() if classes == 1 else s.softmax(1))
    alpha = push / (2 * l2 * N)
    torch.testing.assert_close(alpha.T @ h, weight, rtol=1e-5, atol=1e-9)  # the representer theorem
    logits = z @ weight.T
    for j in range(M):
        label = int(targets[1][j])
        sign, c = (2 * label - 1, 0) if classes == 1 else (1, label)
        torch.testing.assert_close(scores[:, j], sign * alpha[:, c] * (h @ z[j]), rtol=1e-5, atol=1e-5)
        assert scores[:, j].sum().item() == pytest.approx(sign * logits[j, c].item(), rel=1e-5, abs=1e-5)
    train_labels = data(N, 0, max(2, classes))[1]
    own = [
        ((2 * y - 1) * alpha[i, 0] if classes == 1 else alpha[i, y]) * h[i] @ h[i] for i, y in enumerate(train_labels)
    ]
    torch.testing.assert_close(self_influence, torch.stack(own), rtol=1e-5, atol=1e-5)


def test_weights_are_the_gradient_of_the_cross_entropy() -> None:
    s = torch.randn(N, 3, dtype=torch.float64, requires_grad=True)
    soft = torch.randn(N, 3).double().softmax(1)
    (gradient,) = torch.autograd.grad(F.cross_entropy(s, soft, reduction="sum"), s)
    torch.testing.assert_close(gradient, s.detach().softmax(1) - soft)


@pytest.mark.parametrize("classes", [1, 4])
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_a_head_is_fitted_to_the_last_digit(classes: int, size: float) -> None:
    h = (torch.randn(60, 9).double() * torch.logspace(0, -2, 9) * size).relu()
    logits = h @ torch.randn(9, classes).double()
    weight = fit_head(h.split(25), logits.split(25), torch.zeros(classes, 9).double(), 1e-4, 60)
    p, soft = ((s.sigmoid() if classes == 1 else s.softmax(1)) for s in (h @ weight.T, logits))
    assert ((p - soft).T @ h / 60 + 2e-4 * weight).norm() < 1.001e-8


def test_a_head_that_can_not_be_fitted_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_attr.methods.representer._MOST_STEPS", 1)
    h = torch.randn(9, 3).double()
    with pytest.raises(AttributionError, match=r"has the norm .* after 1 Newton steps, not 1e-08. Raise `l2`"):
        fit_head([h], [h], torch.zeros(3, 3).double(), 1e-3, 9)


def test_classes_are_those_of_the_prediction_if_wanted() -> None:
    module = Classifier().double()
    x, _ = data(M, 1)
    predicted = module(x).argmax(1)
    expected = scores_of(RPS(), snapshot_of(module, targets=(x, predicted)))[0]
    wrong = (x, (predicted + 1) % 3)
    torch.testing.assert_close(
        scores_of(RPS(target_class="prediction"), snapshot_of(module, targets=wrong))[0], expected
    )
    assert not torch.allclose(scores_of(RPS(), snapshot_of(module, targets=wrong))[0], expected)


def test_predictions_of_one_output_are_its_sign() -> None:
    module = Classifier(1).double()
    x, _ = data(M, 1)
    predicted = (module(x) > 0).long().flatten()
    assert 0 < predicted.sum() < M
    train = data(N, 0, 2)
    expected = scores_of(RPS(), snapshot_of(module, train, (x, predicted)))[0]
    found = scores_of(RPS(target_class="prediction"), snapshot_of(module, train, (x, 1 - predicted)))[0]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
def test_labels_of_one_output_may_be_numbers(shape: tuple[int, ...]) -> None:
    module, (x, y) = Classifier(1).double(), data(N, 0, 2)
    expected = scores_of(RPS(), snapshot_of(module, (x, y), (x, y)))[0]
    batch = (x, y.double().reshape(shape))
    torch.testing.assert_close(scores_of(RPS(), snapshot_of(module, batch, batch))[0], expected)


def test_cosines_of_features() -> None:
    module = Classifier(bias=False).double()
    plain, cosine = (scores_of(RPS(normalize=flag), snapshot_of(module))[0] for flag in (False, True))
    h, z = module.body(data(N, 0)[0]), module.body(data(M, 1)[0])
    torch.testing.assert_close(cosine, plain / (h.norm(dim=1)[:, None] * z.norm(dim=1)).detach())


def test_temperature_belongs_to_the_logits() -> None:
    hot = Classifier(model_output=MulticlassMargin(temperature=2.0)).double()
    cold = Classifier().double()
    cold.load_state_dict(hot.state_dict())
    with torch.no_grad():
        cold.head.weight /= 2
        cold.head.bias /= 2
    torch.testing.assert_close(scores_of(RPS(), snapshot_of(hot)), scores_of(RPS(), snapshot_of(cold)))


def test_scores_of_a_module_in_float32_are_float32() -> None:
    module = Classifier()
    train, targets = ((x.float(), y) for x, y in (data(N, 0), data(M, 1)))
    (block,) = RPS().score([SnapshotFeatures.at(SnapshotModel.of(module.eval(), [train], [targets]), {})])
    assert block.scores.dtype == block.self_influence.dtype == torch.float32


def test_rps_of_dattri_agrees_up_to_its_coarse_fit() -> None:
    algorithm = pytest.importorskip("dattri.algorithm.rps")
    from dattri.task import AttributionTask

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Sequential(nn.Linear(4, 6), nn.Tanh()), nn.Linear(6, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x))

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)

    (x, y), (z, t) = data(N, 0), data(M, 1)
    ours, theirs = Classifier(bias=False), Model()
    theirs.load_state_dict(ours.state_dict())
    task = AttributionTask(loss, theirs, theirs.state_dict(), target_func=loss)
    attributor = algorithm.RPSAttributor(task, "head", l2_strength=0.1)
    train, targets = (DataLoader(TensorDataset(a.float(), b), batch_size=4) for a, b in ((x, y), (z, t)))
    attributor.cache(train)
    found = N * attributor.attribute(train, targets)  # its gradient is that of a mean, and divided by n once more
    expected = scores_of(RPS(l2=0.1), snapshot_of(ours))[0].float()
    assert found.shape == expected.shape == (N, M)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05 * expected.abs().max().item())


def test_end_to_end() -> None:
    module, train, targets = BlobClassifier(), blobs(20), blobs(6, seed=1)
    trainer = quiet_trainer()
    result = trainer.attribute(
        model=module,
        method=RPS(l2=0.01),
        train_dataloaders=loader_of(train, batch_size=8),
        target_dataloaders=loader_of(targets, batch_size=4),
    )
    assert result.scores.shape == (20, 6)
    assert result.scores.provenance["scale"] == "rank_only"
    assert result.scores.provenance["l2"] == 0.01
    direct = SnapshotFeatures.at(SnapshotModel.of(module.eval(), [train.tensors], [targets.tensors]), {})
    (block,) = RPS(l2=0.01).score([direct])
    torch.testing.assert_close(result.scores.values, block.scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"l2": 0.0}, "`l2` of .+ to be a finite number > 0, but got 0.0"),
        ({"l2": float("nan")}, "`l2` of .+ to be a finite number > 0, but got nan"),
        ({"target_class": "labels"}, "`target_class` of .+ to be 'label' or 'prediction', but got 'labels'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RPS(**arguments)


def test_modules_without_logits_are_refused() -> None:
    class Plain(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def training_step(self, batch: Any) -> Tensor:
            return F.cross_entropy(self.layer(batch[0]), batch[1])

    with pytest.raises(TypeError, match="needs the logits of Plain, but it has only a training step"):
        scores_of(RPS(), snapshot_of(Plain()))
    regressor = Classifier(1, model_output=Regression())
    with pytest.raises(ValueError, match=r"logits of a classifier, .* model output of Classifier is Regression"):
        scores_of(RPS(), snapshot_of(regressor, (data(N, 0)[0], torch.randn(N).double())))


def test_heads_that_do_not_give_the_logits_are_refused() -> None:
    class Scaled(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    with pytest.raises(
        ValueError, match=r"layer 'head' gives something else. Name another `layer` \('body.0', 'head'\)"
    ):
        scores_of(RPS(), snapshot_of(Scaled()))
    with pytest.raises(ValueError, match=r"`layer` to name a layer of Classifier, but got 'tail'. .*'body.0', 'head'"):
        scores_of(RPS(layer="tail"), snapshot_of(Classifier()))
    with pytest.raises(ValueError, match=r"the layer 'body.0' gives something else"):
        scores_of(RPS(layer="body.0"), snapshot_of(Classifier()))


def test_targets_that_are_no_labels_are_refused() -> None:
    class Soft(Classifier):
        def attribution_step(self, batch: Any) -> tuple[Tensor, Tensor]:
            return self(batch[0]), batch[1].double() / 2

    class Halves(ModelOutput):
        def output(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return -self.loss(outputs, targets)

        def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return (outputs.sum(1) - targets).square()

        def out_to_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return torch.ones(len(outputs), dtype=outputs.dtype)

    with pytest.raises(ValueError, match=r"the targets of Soft are not labels of shape \(5,\)"):
        scores_of(RPS(), snapshot_of(Soft(model_output=Halves())))


def test_a_function_of_the_targets_is_refused() -> None:
    loader = loader_of(blobs(8))
    with pytest.raises(AttributionError, match="RPS does not measure an output of the targets"):
        quiet_trainer().attribute(
            model=BlobClassifier(),
            method=RPS(),
            train_dataloaders=loader,
            target_dataloaders=loader,
            target_function=lambda module, batch: module(batch[0]).sum(1),
        )
