"""scikit-learn's digits: data, models, one training recipe, and the ground truth by retraining on half subsets.

The models train one after another: trained together under `vmap`, the MLPs took 0.25 ms per step instead of 0.42, but
the CNNs 3 ms instead of 2.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits  # type: ignore[import-untyped]  # ships no types
from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]  # ships no types
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

from lightning_attr import AttributionMixin

N_TRAIN, N_TARGET = 1437, 360
SPLIT_SEED = 0
BATCH_SIZE = 64
LEARNING_RATE = 0.05
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-3

N_SUBSETS = 100
N_RUNS = 3  # trainings of each subset, from different seeds
SUBSET_SIZE = N_TRAIN // 2
SUBSET_SEEDS = {"tune": 1, "report": 2}  # defaults are chosen on "tune", numbers are reported on "report"
CACHE = Path.home() / ".cache" / "lightning_attr"


def mlp() -> nn.Sequential:
    """17k parameters, test accuracy about 0.96."""
    return nn.Sequential(
        nn.Linear(64, 128),
        nn.ReLU(),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def cnn() -> nn.Sequential:
    """10k parameters, test accuracy about 0.98."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.GroupNorm(4, 32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


@dataclass(frozen=True)
class Setting:
    """A network, the shape of its inputs, how long it trains, on which batches; the rest is the same for all."""

    name: str
    network: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    epochs: int
    batch_size: int = BATCH_SIZE


SETTINGS = {
    "mlp": Setting("mlp", mlp, (64,), epochs=20),
    "cnn": Setting("cnn", cnn, (1, 8, 8), epochs=25),
    "mlp32": Setting("mlp32", mlp, (64,), epochs=40, batch_size=32),
}


def load(setting: Setting) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fixed split: x_train (N_TRAIN, *input_shape) float32 in [0, 1], x_test, y_train (N_TRAIN,) int64, y_test."""
    pixels, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(pixels / 16).float().reshape(-1, *setting.input_shape)
    x_train, x_test, y_train, y_test = train_test_split(
        x, torch.from_numpy(labels), test_size=N_TARGET, random_state=SPLIT_SEED
    )
    return x_train, x_test, y_train, y_test


def sgd(parameters: Iterator[nn.Parameter], steps: int) -> tuple[SGD, LambdaLR]:
    """The recipe's optimizer, its learning rate falling linearly to 0 over `steps`."""
    optimizer = SGD(parameters, LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True)
    return optimizer, LambdaLR(optimizer, lambda step: 1 - step / steps)


def shuffled_batches(n: int, epochs: int, batch_size: int = BATCH_SIZE) -> list[Tensor]:
    """Indices of every batch of a training, shuffled anew each epoch; the last, smaller batch is kept."""
    return [batch for _ in range(epochs) for batch in torch.randperm(n).split(batch_size)]


def train(model: nn.Module, x: Tensor, y: Tensor, batches: Sequence[Tensor]) -> None:
    """Trains `model` in place, one step per batch of indices."""
    optimizer, schedule = sgd(model.parameters(), len(batches))
    for batch in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        schedule.step()


def trained(setting: Setting, x: Tensor, y: Tensor, seed: int) -> nn.Module:
    """A network trained by the recipe; `seed` fixes its initialization and the order of its batches."""
    torch.manual_seed(seed)
    model = setting.network()
    train(model, x, y, shuffled_batches(len(x), setting.epochs, setting.batch_size))
    return model.eval()


def margin(scores: Tensor, y: Tensor) -> Tensor:
    """Multiclass margin s_y - log sum_{j != y} exp(s_j): scores (b, classes), labels (b,) -> (b,)."""
    own = F.one_hot(y, scores.shape[1]).bool()
    return scores[own] - scores.masked_fill(own, -math.inf).logsumexp(1)


def subset_masks(seed: int) -> Tensor:
    """Random half subsets, (N_SUBSETS, N_TRAIN) bool, True where a sample is in."""
    ranks = np.random.default_rng(seed).random((N_SUBSETS, N_TRAIN)).argsort(1).argsort(1)
    return torch.from_numpy(ranks < SUBSET_SIZE)


def cache_path(setting: Setting, subsets: str, cache: Path) -> Path:
    """Where a ground truth is kept; its name holds a hash of all that its numbers depend on."""
    recipe = (
        *(str(setting.network()), setting.epochs, setting.batch_size, LEARNING_RATE, MOMENTUM, WEIGHT_DECAY),
        *(SPLIT_SEED, N_TRAIN, N_SUBSETS, N_RUNS, SUBSET_SIZE, SUBSET_SEEDS[subsets]),
    )
    return (
        cache / f"digits-{setting.name}-{subsets}-{hashlib.sha256(repr(recipe).encode()).hexdigest()[:12]}.safetensors"
    )


def ground_truth(setting: Setting, subsets: str, cache: Path = CACHE) -> tuple[Tensor, Tensor]:
    """Margins of the targets after retraining on half subsets, from the cache or, the first time, by training.

    Training takes half a minute for the MLP, about three minutes for the CNN, on one CPU core.

    Args:
        setting: The network and its recipe.
        subsets: Which of the two independent sets of subsets, "tune" or "report".
        cache: Directory that keeps the result between runs.

    Returns:
        The subsets (N_SUBSETS, N_TRAIN) bool, and the margins (N_RUNS, N_SUBSETS, n_target) float32.
    """
    path = cache_path(setting, subsets, cache)
    if not path.exists():
        print(f"Training {N_RUNS * N_SUBSETS} models for {path}", file=sys.stderr, flush=True)
        masks = subset_masks(SUBSET_SEEDS[subsets])
        outputs = retrain(setting, masks, SUBSET_SEEDS[subsets])
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"masks": masks, "outputs": outputs}, path)
    tensors = load_file(path)
    return tensors["masks"], tensors["outputs"]


@torch.no_grad()
def retrain(setting: Setting, masks: Tensor, seed: int) -> Tensor:
    """Margins (N_RUNS, N_SUBSETS, n_target) of models trained on each subset, every one from a seed of its own."""
    x_train, x_test, y_train, y_test = load(setting)
    outputs = torch.empty(N_RUNS, len(masks), len(x_test))
    for run in range(N_RUNS):
        for k, mask in enumerate(masks):
            model_seed = int(np.random.SeedSequence((seed, run, k)).generate_state(1)[0])
            with torch.enable_grad():
                model = trained(setting, x_train[mask], y_train[mask], model_seed)
            outputs[run, k] = margin(model(x_test), y_test)
    return outputs


class DigitsData(L.LightningDataModule):
    """The same split as a datamodule."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.batch_size = setting.batch_size
        x_train, x_test, y_train, y_test = load(setting)
        self.train_set = TensorDataset(x_train, y_train)
        self.test_set = TensorDataset(x_test, y_test)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.train_set, self.batch_size, shuffle=True)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.test_set, self.batch_size)


class DigitsClassifier(AttributionMixin, L.LightningModule):
    """The same recipe as a LightningModule, to be trained with `max_epochs=setting.epochs`."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.network = setting.network()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)  # type: ignore[no-any-return]  # torch types a module's call as Any

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> Any:
        optimizer, schedule = sgd(self.parameters(), int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class DigitsMLP(DigitsClassifier):
    def __init__(self) -> None:
        super().__init__(SETTINGS["mlp"])


class DigitsCNN(DigitsClassifier):
    def __init__(self) -> None:
        super().__init__(SETTINGS["cnn"])
