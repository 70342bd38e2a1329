"""What the table of methods measures on: recorded runs of three networks, and the retrained models behind its figures.

The MLP and the CNN follow `digits.py`. Logistic regression is trained to convergence: L-BFGS on all samples, until the
gradient vanishes, with weight decay in the objective, so that retraining has no noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import lightning as L
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import digits
from digits import (
    SETTINGS,
    WEIGHT_DECAY,
    DigitsClassifier,
    Setting,
    ground_truth,
    load,
    margin,
    subset_masks,
    trained,
)
from lightning_attr import AttributionTrainer, FeatureStore
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.methods import TRAK
from lightning_attr.parameters.weights import load_weights

LEFT_OUT = 100  # training samples that logistic regression is retrained without, one after the other
FLIPPED_LABELS = 0.1
SCHEDULES = ("geometric", "start+geometric")


def regression() -> nn.Sequential:
    """650 parameters, test accuracy about 0.96."""
    return nn.Sequential(nn.Linear(64, 10))


LR = Setting("lr", regression, (64,), epochs=30, batch_size=digits.N_TRAIN)
NETWORKS = {"lr": LR, "mlp": SETTINGS["mlp32"], "cnn": SETTINGS["cnn"]}


class Data(NamedTuple):
    """Training samples, with their right labels or not, and targets."""

    x: Tensor
    y: Tensor
    x_target: Tensor
    y_target: Tensor


def clean(setting: Setting) -> Data:
    """The fixed split."""
    x, x_target, y, y_target = load(setting)
    return Data(x, y, x_target, y_target)


def noisy(data: Data) -> tuple[Data, Tensor]:
    """The same with some training labels flipped, and which they are, (n_train,) bool."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(len(data.y), generator=generator) < FLIPPED_LABELS
    shift = torch.randint(1, 10, (len(data.y),), generator=generator)
    return data._replace(y=torch.where(mask, (data.y + shift) % 10, data.y)), mask


def penalty(module: nn.Module) -> Tensor:
    """Weight decay as a term of the objective, ()."""
    return 0.5 * WEIGHT_DECAY * torch.stack([p.square().sum() for p in module.parameters()]).sum()


def lbfgs(module: nn.Module) -> torch.optim.LBFGS:
    """25 steps of it converge."""
    return torch.optim.LBFGS(
        module.parameters(), max_iter=20, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe"
    )


def converged(x: Tensor, y: Tensor, start: nn.Module | None = None) -> nn.Module:
    """Logistic regression at its optimum, in float64; from `start` it is there sooner."""
    network = regression().double()
    if start is None:
        for parameter in network.parameters():
            nn.init.zeros_(parameter)
    else:
        network.load_state_dict(start.state_dict())
    optimizer = lbfgs(network)
    inputs = x.double()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(network(inputs), y) + penalty(network)
        loss.backward()
        return loss

    for _ in range(100):
        optimizer.step(closure)
        closure()
        if max(float(p.grad.abs().max()) for p in network.parameters()) < 1e-8:
            return network
    raise RuntimeError("logistic regression has not converged")


def retrained(setting: Setting, x: Tensor, y: Tensor, seed: int) -> nn.Module:
    """A network trained without Lightning; the seed does not change logistic regression."""
    return converged(x, y).float() if setting.name == "lr" else trained(setting, x, y, seed)


class Regression(DigitsClassifier):
    """Logistic regression as a LightningModule."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + penalty(self)

    def configure_optimizers(self) -> Any:
        return lbfgs(self)


@dataclass
class Run:
    """A trained module, a trainer, the data that it was trained on, targets, and the snapshots of its training."""

    setting: Setting
    data: Data
    trainer: AttributionTrainer
    module: DigitsClassifier
    paths: Mapping[str, Path]  # of the stores, by their schedule
    cache: Path  # of what is retrained

    @property
    def path(self) -> Path:
        """Of the snapshots that peers get too."""
        return self.paths["geometric"]

    @cached_property
    def store(self) -> FeatureStore:
        return FeatureStore.open(self.path, writer=False)

    @cached_property
    def states(self) -> list[dict[str, Tensor]]:
        """The network's weights at each snapshot."""
        module = type(self.module)(self.setting)
        states = []
        for snapshot in self.store.snapshots:
            load_weights(module, self.store.weights(snapshot.key))
            states.append({name: value.clone() for name, value in module.network.state_dict().items()})
        return states

    def network(self) -> nn.Sequential:
        """A copy of the trained network, for peers."""
        network = self.setting.network()
        network.load_state_dict(self.module.network.state_dict())
        return network.eval()

    def loaders(self, batch_size: int | None = None) -> tuple[DataLoader[Any], DataLoader[Any]]:
        """Of training samples and targets, each in one batch unless said otherwise."""
        data = self.data
        return (
            DataLoader(TensorDataset(data.x, data.y), batch_size or len(data.x)),
            DataLoader(TensorDataset(data.x_target, data.y_target), batch_size or len(data.x_target)),
        )


@contextmanager
def recorded(setting: Setting, data: Data, cache: Path, seed: int = 0) -> Iterator[Run]:
    """Train, with the callback taking snapshots of the weights only; once for each schedule, to the same weights."""
    with TemporaryDirectory() as folder:
        paths = {schedule: Path(folder) / schedule for schedule in SCHEDULES}
        for schedule, path in paths.items():
            L.seed_everything(seed, verbose=False)
            module = Regression(setting) if setting.name == "lr" else DigitsClassifier(setting)
            callback = AttributionCallback(path, method=TRAK(), featurize=False, snapshots=schedule)
            trainer = AttributionTrainer(max_epochs=setting.epochs, callbacks=[callback], **quiet())
            shuffled = setting.name != "lr"
            trainer.fit(module, DataLoader(TensorDataset(data.x, data.y), setting.batch_size, shuffle=shuffled))
        yield Run(setting, data, AttributionTrainer(**quiet()), module.eval(), paths, cache)


def thinned(run: Run, every: int) -> Run:
    """The same run with fewer targets."""
    data = run.data
    return replace(run, data=data._replace(x_target=data.x_target[::every], y_target=data.y_target[::every]))


def quiet() -> dict[str, Any]:
    """Options of trainers that print and keep nothing."""
    return {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }


def subset_truth(setting: Setting, subsets: str, cache: Path) -> tuple[Tensor, Tensor]:
    """Half subsets (m, n_train) and the targets' margins (seeds, m, n_target); logistic regression has one "seed"."""
    if setting.name != "lr":
        return ground_truth(setting, subsets, cache)
    masks, data = subset_masks(digits.SUBSET_SEEDS[subsets]), clean(setting)
    return masks, _cached(cache, f"lr-{subsets}", lambda: _margins(data, list(masks)))[None]


def leave_one_out_truth(cache: Path) -> tuple[Tensor, Tensor]:
    """Left-out training samples (k,) of logistic regression, and what each adds to the targets' margins, (k, m)."""
    data = clean(LR)
    rows = torch.randperm(len(data.x), generator=torch.Generator().manual_seed(3))[:LEFT_OUT]
    keep = [torch.arange(len(data.x)) != row for row in rows]
    whole = torch.ones(len(data.x), dtype=torch.bool)
    margins = _cached(cache, "lr-left-out", lambda: _margins(data, [whole, *keep]))
    return rows, margins[0] - margins[1:]


@torch.no_grad()
def _margins(data: Data, masks: list[Tensor]) -> Tensor:
    """Margins (len(masks), m), float64, of logistic regression on each subset."""
    with torch.enable_grad():
        start = converged(data.x, data.y)
    found = []
    for mask in masks:
        with torch.enable_grad():
            network = converged(data.x[mask], data.y[mask], start)
        found.append(margin(network(data.x_target.double()), data.y_target))
    return torch.stack(found)


def _cached(cache: Path, name: str, compute: Any) -> Tensor:
    recipe = (WEIGHT_DECAY, digits.SPLIT_SEED, digits.N_TRAIN, digits.N_SUBSETS, digits.SUBSET_SEEDS, LEFT_OUT)
    path = cache / f"digits-{name}-{hashlib.sha256(repr(recipe).encode()).hexdigest()[:12]}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"outputs": compute()}, path)
    return load_file(path)["outputs"]
