"""Parameters that are frozen and unfrozen while a run goes on: each snapshot counts those that it was trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor, nn
from torch.nn import functional as F

from cases import blobs, loader_of, quiet_trainer
from lightning_attr import AttributionMixin
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.errors import StoreMismatchError
from lightning_attr.methods import TRAK, GradDot, Influence, TracIn
from lightning_attr.parameters.weights import load_weights
from lightning_attr.projectors import IdentityProjector
from lightning_attr.store.feature_store import FeatureStore

N, M = 20, 6
BODY, HEAD = ("body.0.weight", "body.0.bias"), ("head.weight", "head.bias")


class Net(AttributionMixin, L.LightningModule):
    def __init__(self, frozen: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body, self.head = nn.Sequential(nn.Linear(4, 6), nn.Tanh()), nn.Linear(6, 3)
        self.body.requires_grad_(not frozen)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(filter(lambda p: p.requires_grad, self.parameters()), lr=0.1)


class Unfreeze(BaseFinetuning):
    """Lightning's own way: the frozen part joins the optimizer later, at a rate of its own."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.body)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.body, optimizer, lr=0.02)


class ByHand(Net):
    """All parameters are the optimizer's, frozen or not."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.body.requires_grad_(not self.body[0].weight.requires_grad)


def fit(folder: Path | None, module: Net, *callbacks: L.Callback, **settings: Any) -> Any:
    L.seed_everything(1, verbose=False)
    own = [] if folder is None else [AttributionCallback(folder, snapshots="all", **settings)]
    trainer = quiet_trainer(max_epochs=2, callbacks=[*callbacks, *own])
    trainer.fit(module, loader_of(blobs(N), shuffle=True))
    return trainer


def by_hand(store: FeatureStore, weigh: Any, targets: Any) -> Tensor:
    """Sum over the snapshots of the products of gradients, one sample after the other."""
    module, total = Net(), torch.zeros(N, M)

    def rows(data: Any, value: Any, names: Any) -> dict[str, Tensor]:
        own = [dict(module.named_parameters())[name] for name in names]
        found = [torch.autograd.grad(value(x[None], y[None]).sum(), own) for x, y in data]
        return {name: torch.stack([row[i].flatten() for row in found]) for i, name in enumerate(names)}

    for snapshot in store.snapshots:
        load_weights(module, store.weights(snapshot.key))
        names = snapshot.trainable or (*BODY, *HEAD)
        loss = rows(blobs(N), lambda x, y: F.cross_entropy(module(x), y), names)
        output = rows(targets, lambda x, y: module.model_output.output(module(x), y), names)
        total -= sum(weigh(snapshot, name) * loss[name] @ output[name].T for name in names)
    return total


@pytest.mark.parametrize("way", ["finetuning", "unfrozen by hand", "frozen by hand"])
@pytest.mark.parametrize("exact", [False, True])
def test_each_snapshot_counts_what_it_was_trained_with(tmp_path: Path, way: str, exact: bool) -> None:
    modules = {"finetuning": Net, "unfrozen by hand": lambda: ByHand(frozen=True), "frozen by hand": ByHand}
    callbacks = [Unfreeze()] if way == "finetuning" else []
    plain, module = modules[way](), modules[way]()
    fit(None, plain, *callbacks)
    method = TracIn(exact=True) if exact else TracIn(IdentityProjector())
    trainer = fit(tmp_path, module, *callbacks, method=method, feature_dtype="float32")
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), module.parameters(), strict=True))

    store = FeatureStore.open(tmp_path)
    first, second = store.snapshots
    expected = (None, HEAD) if way == "frozen by hand" else (HEAD, None)
    assert (first.trainable, second.trainable) == expected
    rates = {"finetuning": (0.1, 0.02), "unfrozen by hand": (0.1, 0.1), "frozen by hand": (0.1, 0.1)}[way]

    targets = blobs(M, seed=1)
    flags = [p.requires_grad for p in module.parameters()]
    for weights in ("integrated", "uniform"):
        own = TracIn(None if exact else IdentityProjector(), weights, exact=exact)
        found = trainer.attribute(target_dataloaders=loader_of(targets), method=own).scores.values

        def weigh(snapshot: Any, name: str, weights: str = weights) -> float:
            return 1.0 if weights == "uniform" else 3 * rates[name in BODY] / N  # three steps per epoch

        torch.testing.assert_close(found, by_hand(store, weigh, targets), rtol=1e-4, atol=1e-6)
    assert [p.requires_grad for p in module.parameters()] == flags


@pytest.mark.parametrize(
    "method",
    [TRAK(16), TRAK(exact=True), Influence("empirical_fisher", damping=0.1, snapshots="all"), GradDot(exact=True)],
    ids=lambda method: type(method).__name__,
)
def test_flags_at_the_end_do_not_matter(tmp_path: Path, method: Any) -> None:
    """Another process has the module as its constructor leaves it; what counts is what the snapshots say."""
    trainer = fit(tmp_path, Net(), Unfreeze(), featurize=False)
    targets = loader_of(blobs(M, seed=1))
    found = trainer.attribute(target_dataloaders=targets, method=method)
    for module in (Net(), Net().requires_grad_(False)):
        again = quiet_trainer().attribute(
            model=module,
            train_dataloaders=loader_of(blobs(N)),
            target_dataloaders=targets,
            store=tmp_path,
            method=method,
        )
        torch.testing.assert_close(again.scores.values, found.scores.values)
    assert found.scores.values.isfinite().all()


def test_another_model_is_still_refused(tmp_path: Path) -> None:
    class Wider(Net):
        def __init__(self) -> None:
            super().__init__()
            self.body[0].requires_grad_(False)
            self.body.append(nn.Linear(6, 6).requires_grad_(False))

    trainer = fit(tmp_path, Net(), Unfreeze())
    with pytest.raises(StoreMismatchError, match=r"another model: it has no parameter `body\.2\.weight`"):
        trainer.attribute(model=Wider(), train_dataloaders=loader_of(blobs(N)), targets="train")
