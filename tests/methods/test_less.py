"""LESS against a loop over samples and snapshots, by hand and in a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cases import BlobClassifier, blobs, loader_of, quiet_trainer
from lightning_attr import FeatureStore, attribute
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.errors import AttributionError, StoreMismatchError
from lightning_attr.methods import LESS, SnapshotFeatures, TracIn
from lightning_attr.parameters.weights import load_weights
from lightning_attr.projectors import IdentityProjector, KroneckerProjector

TRAIN, TARGETS = blobs(20), blobs(6, seed=1)


class Adam(BlobClassifier):
    """Two optimizers of two kinds, and a parameter that none of them has."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.shift = torch.nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x) + self.shift

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> Any:
        first = torch.optim.AdamW(self.network[0].parameters(), lr=0.02, betas=(0.8, 0.95), eps=1e-6)
        return first, torch.optim.Adam(self.network[2].parameters(), lr=0.01, betas=(0.7, 0.9), eps=1e-5)


def fit(folder: Path, **settings: Any) -> L.Trainer:
    callback = AttributionCallback(folder, **{"snapshots": "all", "log": False, **settings})
    trainer = quiet_trainer(L.Trainer, max_epochs=2, callbacks=[callback], precision="64-true")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trainer.fit(Adam().double(), loader_of(TRAIN, shuffle=True))
    return trainer


def gradients(module: Any, x: Tensor, y: Tensor, loss: bool) -> dict[str, Tensor]:
    batch = (x[None].double(), y[None])
    value = module.functional_loss({}, {}, batch) if loss else module.functional_output({}, {}, batch)
    names = [name for name, _ in module.named_parameters()]
    return dict(zip(names, torch.autograd.grad(value.sum(), list(module.parameters())), strict=True))


def looped(folder: Path) -> tuple[Tensor, Tensor]:
    store, module = FeatureStore.open(folder), Adam().double().eval()
    total = sum(snapshot.learning_rate for snapshot in store.snapshots)
    scores, self_influence = torch.zeros(20, 6).double(), torch.zeros(20).double()
    for snapshot in store.snapshots:
        load_weights(module, store.weights(snapshot.key))
        moments = store.optimizer_state(snapshot.key).moments
        outputs = [torch.cat([g.flatten() for g in gradients(module, *pair, loss=False).values()]) for pair in TARGETS]
        for i, (x, y) in enumerate(TRAIN):
            steps = []
            for name, gradient in gradients(module, x, y, loss=True).items():
                if name not in moments:
                    steps.append(torch.zeros_like(gradient).flatten())
                    continue
                own = moments[name]
                mean = own.betas[0] * own.exp_avg + (1 - own.betas[0]) * gradient
                square = own.betas[1] * own.exp_avg_sq + (1 - own.betas[1]) * gradient**2
                steps.append(own.learning_rate * (mean / (square + own.eps).sqrt()).flatten())
            step, weight = torch.cat(steps), snapshot.learning_rate / total
            for j, output in enumerate(outputs):
                scores[i, j] -= weight * F.cosine_similarity(step, output, dim=0)
            own_output = torch.cat([g.flatten() for g in gradients(module, x, y, loss=False).values()])
            self_influence[i] -= weight * F.cosine_similarity(step, own_output, dim=0)
    return scores, self_influence


@pytest.mark.parametrize("featurize", [False, True])
def test_a_run_matches_a_loop(tmp_path: Path, featurize: bool) -> None:
    trainer = fit(tmp_path, method=LESS(IdentityProjector()), featurize=featurize)
    store = FeatureStore.open(tmp_path)
    assert "shift" not in store.optimizer_state(store.snapshots[0].key).moments
    result = trainer.attribute(target_dataloaders=loader_of(TARGETS))
    scores, self_influence = looped(tmp_path)
    torch.testing.assert_close(result.scores.values, scores.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.self_influence, self_influence.float(), rtol=1e-5, atol=1e-6)
    assert result.scores.provenance["scale"] == "rank_only"
    itself = trainer.attribute(target_dataloaders=loader_of(TRAIN))
    torch.testing.assert_close(itself.scores.values.diagonal(), self_influence.float(), rtol=1e-5, atol=1e-6)


def test_its_features_are_not_mixed_with_others(tmp_path: Path) -> None:
    trainer = fit(tmp_path, method=LESS(IdentityProjector()))
    with pytest.raises(StoreMismatchError, match=r"featurized with the projection .*adam_direction"):
        trainer.attribute(target_dataloaders=loader_of(TARGETS), method=TracIn(IdentityProjector()))


@pytest.mark.parametrize("method", [LESS(), TracIn(preconditioner="adam")])
def test_a_store_without_optimizer_state_is_refused(tmp_path: Path, method: Any) -> None:
    fit(tmp_path, method=TracIn(), featurize=False)
    arguments = {"train_dataloaders": loader_of(TRAIN), "target_dataloaders": loader_of(TARGETS)}
    message = r"The snapshot 'epoch=0000-step=\d+' in .* has no optimizer state, .*AttributionCallback\(optimizer_state"
    with pytest.raises(AttributionError, match=message):
        attribute(quiet_trainer(), model=Adam(), method=method, store=tmp_path, **arguments)


def test_weights_follow_the_learning_rate() -> None:
    generator = torch.Generator().manual_seed(0)

    def snapshot(rate: float) -> SnapshotFeatures:
        train = {"features": torch.randn(4, 3, generator=generator), "alignment": torch.rand(4, generator=generator)}
        targets = {"features": torch.randn(2, 3, generator=generator)}
        return SnapshotFeatures(lambda: iter([(range(4), train)]), targets, rate)

    first, second = snapshot(0.3), snapshot(0.1)
    (both,), (one,), (two,) = (LESS().score(own) for own in ([first, second], [first], [second]))
    torch.testing.assert_close(both.scores, 0.75 * one.scores + 0.25 * two.scores)
    torch.testing.assert_close(both.self_influence, 0.75 * one.self_influence + 0.25 * two.self_influence)
    with pytest.raises(AttributionError, match="add up to 0"):
        list(LESS().score([snapshot(0.0)]))


def test_defaults() -> None:
    assert LESS().needs_optimizer_state
    assert LESS().config == {
        "method": "LESS",
        "scale": "rank_only",
        "projector": {"kind": "adam_direction", "projector": KroneckerProjector(8192).config},
    }
