"""Learning rates are summed up by parameter, and TracIn weighs each parameter by its own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cases import BlobClassifier, blobs, loader_of, quiet_trainer, told
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.errors import AttributionError
from lightning_attr.methods import GAS, TRAK, TracIn
from lightning_attr.parameters.layout import ParameterLayout
from lightning_attr.parameters.learning_rates import LearningRates
from lightning_attr.projectors import IdentityProjector, SJLTProjector

N, M = 24, 8


class Grouped(BlobClassifier):
    """Layers, or weights and biases, with learning rates of their own."""

    def __init__(self, rates: dict[str, float]) -> None:
        super().__init__()
        self.rates = rates

    def rate(self, name: str) -> float:
        return next(rate for part, rate in self.rates.items() if part in name)

    def configure_optimizers(self) -> Any:
        groups = [{"params": [p], "lr": self.rate(name)} for name, p in self.named_parameters()]
        return torch.optim.SGD(groups, lr=0.1)


BY_LAYER = {"network.0": 0.0, "network.2": 0.05}
BY_KIND = {"weight": 0.05, "bias": 0.2}


def fit(module: Any, folder: Path, epochs: int = 1, batch_size: int = N, **settings: Any) -> Any:
    callback = AttributionCallback(folder, feature_dtype="float32", snapshots="all", **settings)
    trainer = quiet_trainer(max_epochs=epochs, callbacks=[callback])
    trainer.fit(module, loader_of(blobs(N), batch_size=batch_size))
    return trainer


def without(start: Grouped, sample: int | None) -> Tensor:
    """Outputs of the targets after the one step, with one sample's term of the mean loss left out."""
    module = copy.deepcopy(start)
    x, y = blobs(N).tensors
    losses = F.cross_entropy(module(x), y, reduction="none")
    keep = torch.tensor([i != sample for i in range(N)])
    step = torch.autograd.grad((losses * keep).sum() / N, list(module.parameters()))
    with torch.no_grad():
        for (name, p), g in zip(module.named_parameters(), step, strict=True):
            p -= module.rate(name) * g
        x, y = blobs(M, seed=1).tensors
        return module.model_output.output(module(x), y)


@pytest.mark.parametrize(
    ("rates", "method"),
    [
        (BY_LAYER, TracIn(IdentityProjector())),
        (BY_LAYER, TracIn(exact=True)),
        (BY_KIND, TracIn(exact=True)),
        ({"network.0.weight": 0.01, "network.0.bias": 0.2, "": 0.0}, TracIn(exact=True)),
    ],
    ids=["features", "exact", "exact, biases", "exact, all"],
)
def test_leaving_a_sample_out_of_one_step(tmp_path: Path, rates: dict[str, float], method: TracIn) -> None:
    """Of a run of one step and a snapshot at its start, TracIn is the first order of the truth."""
    module = Grouped(rates)
    start = copy.deepcopy(module)
    truth = without(start, None) - torch.stack([without(start, i) for i in range(N)])
    trainer = fit(module, tmp_path, method=method)
    # The one snapshot is at the end of the step; the small step makes that nearly the same.
    found = trainer.attribute(target_dataloaders=loader_of(blobs(M, seed=1))).scores.values
    assert torch.corrcoef(torch.stack([found.flatten(), truth.flatten()]))[0, 1] > 0.995
    assert found.std() / truth.std() == pytest.approx(1.0, abs=0.05)


def gradients(module: Any, data: Any, value: Any) -> list[dict[str, Tensor]]:
    parameters = dict(module.named_parameters())
    rows = [torch.autograd.grad(value(x[None], y[None]).sum(), list(parameters.values())) for x, y in data]
    return [dict(zip(parameters, row, strict=True)) for row in rows]


@pytest.mark.parametrize("normalize", [False, True, "layer"])
@pytest.mark.parametrize("exact", [False, True])
def test_products_and_cosines_by_hand(tmp_path: Path, normalize: Any, exact: bool) -> None:
    module = Grouped({"network.0": 0.02, "network.2": 0.1})
    method = TracIn(None if exact else IdentityProjector(), "lr", normalize=normalize, exact=exact)
    trainer = fit(module, tmp_path, method=method)
    result = trainer.attribute(target_dataloaders=loader_of(blobs(M, seed=1)))
    losses = gradients(module, blobs(N), lambda x, y: F.cross_entropy(module(x), y))
    outputs = gradients(module, blobs(M, seed=1), lambda x, y: module.model_output.output(module(x), y))
    layers = ["network.0", "network.2"]

    def parts(row: dict[str, Tensor], scaled: bool) -> list[Tensor]:
        return [
            torch.cat([(module.rate(n) ** 0.5 if scaled else 1) * g.flatten() for n, g in row.items() if layer in n])
            for layer in layers
        ]

    def score(loss: dict[str, Tensor], output: dict[str, Tensor]) -> Tensor:
        if normalize == "layer":
            cosines = [
                F.cosine_similarity(a, b, 0) for a, b in zip(parts(loss, False), parts(output, False), strict=True)
            ]
            return -sum(module.rate(layer) * cosine for layer, cosine in zip(layers, cosines, strict=True)) / 2
        a, b = torch.cat(parts(loss, True)), torch.cat(parts(output, True))
        mean = sum(module.rate(n) * g.numel() for n, g in loss.items()) / sum(g.numel() for g in loss.values())
        return -mean * F.cosine_similarity(a, b, 0) if normalize else -a @ b

    expected = torch.stack([torch.stack([score(loss, output) for output in outputs]) for loss in losses])
    torch.testing.assert_close(result.scores.values, expected, rtol=1e-4, atol=1e-6)


def test_features_of_other_methods_serve_where_layers_are_apart(tmp_path: Path) -> None:
    """TRAK's store holds plain gradients, layer by layer; rates are put to them when they are scored."""
    trainer = fit(Grouped(BY_LAYER), tmp_path, epochs=3, batch_size=8, method=TRAK(projector=IdentityProjector()))
    targets = loader_of(blobs(M, seed=1))
    stored = trainer.attribute(target_dataloaders=targets, method=TracIn(IdentityProjector()))
    exact = trainer.attribute(target_dataloaders=targets, method=TracIn(exact=True))
    torch.testing.assert_close(stored.scores.values, exact.scores.values, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(stored.self_influence, exact.self_influence, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("rates", "method", "message"),
    [
        (
            BY_LAYER,
            TracIn(SJLTProjector(64)),
            r"TracIn weighs .* every feature mixes all layers\. Take TracIn\(exact=T",
        ),
        (
            BY_KIND,
            TracIn(),
            r"sum up to 0\.05 for `network.0.weight` and 0\.2 for `network.0.bias`; but the features of `n",
        ),
        (BY_KIND, GAS(), r"GAS weighs the gradient of each parameter by its learning rate"),
    ],
)
def test_features_that_mix_rates_are_refused(tmp_path: Path, rates: Any, method: Any, message: str) -> None:
    trainer = fit(Grouped(rates), tmp_path, method=method)
    with pytest.raises(AttributionError, match=message):
        trainer.attribute(targets="train")
    uniform = type(method)(method.projector, weights="uniform")
    assert trainer.attribute(targets="train", method=uniform).scores.shape == (N, N)


# What is summed up ------------------------------------------------------------------------------------------------


def test_schedulers_and_groups(tmp_path: Path) -> None:
    class Scheduled(Grouped):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

    trainer = fit(Scheduled({"network.0": 0.4, "network.2": 0.1}), tmp_path, epochs=2, batch_size=8)
    first, second = trainer.callbacks[0].store.snapshots
    assert first.rates == pytest.approx({
        "network.0.weight": 1.2,
        "network.0.bias": 1.2,
        "network.2.weight": 0.3,
        "network.2.bias": 0.3,
    })
    assert second.rates == pytest.approx({name: rate / 2 for name, rate in first.rates.items()})
    assert first.learning_rate == pytest.approx((1.2 * 40 + 0.3 * 27) / 67)


def test_equal_groups_are_one(tmp_path: Path) -> None:
    trainer = fit(Grouped({"": 0.1}), tmp_path, epochs=2, batch_size=8)
    assert [snapshot.rates for snapshot in trainer.callbacks[0].store.snapshots] == [None, None]
    assert trainer.callbacks[0].store.snapshots[0].learning_rate == pytest.approx(0.3)


def test_several_optimizers(tmp_path: Path) -> None:
    class Alternating(BlobClassifier):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                loss = super().training_step(batch, batch_idx)
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

        def configure_optimizers(self) -> Any:
            body, head = self.network[0].parameters(), self.network[2].parameters()
            return torch.optim.SGD(body, lr=0.1), torch.optim.SGD(head, lr=0.02)

    trainer = fit(Alternating(), tmp_path, batch_size=8)
    assert trainer.callbacks[0].store.snapshots[0].rates == pytest.approx({
        "network.0.weight": 0.3,
        "network.0.bias": 0.3,
        "network.2.weight": 0.06,
        "network.2.bias": 0.06,
    })


def test_lbfgs_comes_several_times_a_step(tmp_path: Path) -> None:
    class Newton(BlobClassifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.05, max_iter=4)

    trainer = fit(Newton(), tmp_path, batch_size=8)
    snapshot = trainer.callbacks[0].store.snapshots[0]
    assert (snapshot.learning_rate, snapshot.rates) == (pytest.approx(0.15), None)


def test_parameters_that_nobody_updates() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    rates, optimizer = LearningRates(), torch.optim.SGD(net[1].parameters(), lr=0.5)
    rates.add(optimizer, net, 0)
    assert not rates.sums  # no gradients, no step: averaging callbacks run such epochs for BatchNorm
    net(torch.ones(2)).sum().backward()
    rates.add(optimizer, net, 0)
    assert rates.of(ParameterLayout.of(net))[1] == {"0.weight": 0.0, "0.bias": 0.0, "1.weight": 0.5, "1.bias": 0.5}
    assert LearningRates(rates.sums).of(ParameterLayout.of(net)) == rates.of(ParameterLayout.of(net))


def test_what_fails_here_does_not_end_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise TypeError("a rate that is no number")

    monkeypatch.setattr(LearningRates, "add", broken)
    with told(r"recording stopped in epoch 0 .* a rate that is no number"):
        trainer = fit(BlobClassifier(), tmp_path, epochs=2, batch_size=8)
    assert trainer.current_epoch == 2
