"""What attribution costs beside the training itself: callback and a whole `attribute`, in plain passes and trainings.

Run `python tests/benchmarks/whole_cost.py [--setting cnn | mlp | mlp-32k | mlp-100k] [--method "TRAK()"] [--profile]`.
A plain pass is forward and backward over all training samples, in batches of the recipe. All figures are processor
seconds (`time.process_time`) of one process, so that other jobs on the machine disturb them little.
"""

from __future__ import annotations

import argparse
import cProfile
import logging
import pstats
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from digits import SETTINGS, DigitsClassifier, DigitsData
from lightning_attr import attribute, methods
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.methods import AttributionMethod

N_TARGET = 360


@dataclass(frozen=True)
class Recipe:
    """A module, its training loader, the loader of its targets, and how long it trains."""

    module: Callable[[], L.LightningModule]
    train: DataLoader[Any]
    targets: DataLoader[Any]
    epochs: int


class Classifier(DigitsClassifier):
    """The digits MLP, trained by plain SGD."""

    def __init__(self) -> None:
        super().__init__(SETTINGS["mlp"])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.05, 0.9)


def clouds(n: int, seed: int) -> TensorDataset:
    """Ten overlapping clouds in 64 dimensions, `n` samples."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(10, (n,), generator=generator)
    return TensorDataset(0.2 * centres[labels] + torch.randn(n, 64, generator=generator) / 2, labels)


def recipe(name: str) -> Recipe:
    if name in SETTINGS:
        setting = SETTINGS[name]
        data = DigitsData(setting)
        return Recipe(
            lambda: DigitsClassifier(setting), data.train_dataloader(), data.test_dataloader(), setting.epochs
        )
    n = 1000 * int(name.removeprefix("mlp-").removesuffix("k"))
    train = DataLoader(clouds(n, 1), 256, shuffle=True)
    return Recipe(Classifier, train, DataLoader(clouds(N_TARGET, 2), 256), epochs=8)


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.process_time()
    found = function()
    return time.process_time() - begin, found


def trainer(epochs: int, callbacks: list[Any]) -> L.Trainer:
    return L.Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def plain_pass(module: nn.Module, loader: DataLoader[Any]) -> None:
    x, y = loader.dataset.tensors  # type: ignore[attr-defined]  # of a TensorDataset
    for inputs, labels in zip(x.split(loader.batch_size), y.split(loader.batch_size), strict=True):
        module.zero_grad()
        F.cross_entropy(module(inputs), labels).backward()


def fit(own: Recipe, epochs: int, callbacks: list[Any]) -> tuple[L.Trainer, L.LightningModule]:
    L.seed_everything(0, verbose=False)
    module, fitting = own.module(), trainer(epochs, callbacks)
    fitting.fit(module, own.train)
    return fitting, module


def scored(run: L.Trainer, own: Recipe, **arguments: Any) -> Tensor:
    """Scores of a recorded run, or with `model` at its current weights."""
    train = {"train_dataloaders": own.train} if arguments else {}
    return attribute(run, target_dataloaders=own.targets, **train, **arguments).scores.values


def once(own: Recipe, make: Callable[[], AttributionMethod]) -> dict[str, float]:
    """Seconds of everything, and how many snapshots there were."""
    plain, (_, module) = timed(lambda: fit(own, own.epochs, []))
    found = {"fit": plain, "pass": min(timed(lambda: plain_pass(module, own.train))[0] for _ in range(3))}
    found["one"] = timed(lambda: scored(trainer(1, []), own, model=module, method=make()))[0]
    with tempfile.TemporaryDirectory() as folder:
        callback = AttributionCallback(Path(folder) / "store", make())
        found["recorded"], (run, _) = timed(lambda: fit(own, own.epochs, [callback]))
        found["attribute"] = timed(lambda: scored(run, own))[0]
        return {**found, "snapshots": len(callback.store.snapshots)}


def measure(own: Recipe, make: Callable[[], AttributionMethod], repeats: int) -> dict[str, float]:
    """The least of so many repeats."""
    fit(own, 1, [])  # warm-up: imports, kernels
    found = [once(own, make) for _ in range(repeats)]
    return {name: min(each[name] for each in found) for name in found[0]}


def report(name: str, text: str, found: dict[str, float]) -> None:
    callback = found["recorded"] - found["fit"]
    print(
        f"{name}, {text}: a plain pass {found['pass']:.3f} s, the training {found['fit']:.2f} s; callback "
        f"{callback:.2f} s ({100 * callback / found['recorded']:.0f} % of its fit), attribute over "
        f"{found['snapshots']:.0f} snapshots {found['attribute']:.2f} s "
        f"({found['attribute'] / found['snapshots'] / found['pass']:.1f} passes a snapshot), both "
        f"{(callback + found['attribute']) / found['fit']:.2f} trainings; attribute at the last weights alone "
        f"{found['one']:.2f} s ({found['one'] / found['pass']:.1f} passes)",
        flush=True,
    )


def profile(own: Recipe, make: Callable[[], AttributionMethod], lines: int = 45) -> None:
    """Print what takes longest in an attribute at one snapshot."""
    _, module = fit(own, 1, [])
    scored(trainer(1, []), own, model=module, method=make())
    profiler = cProfile.Profile()
    profiler.enable()
    scored(trainer(1, []), own, model=module, method=make())
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(20)
    pstats.Stats(profiler).sort_stats("cumulative").print_stats("lightning_attr", lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", action="append", choices=["mlp", "cnn", "mlp-32k", "mlp-100k"])
    parser.add_argument("--method", action="append", help="such as TRAK(exact=True); TRAK() by default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # Lightning's advice on workers
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in arguments.setting or ["cnn", "mlp-32k"]:
        for text in arguments.method or ["TRAK()"]:
            own, make = recipe(name), lambda text=text: eval(text, vars(methods))
            if arguments.profile:
                profile(own, make)
            else:
                report(name, text, measure(own, make, arguments.repeats))


if __name__ == "__main__":
    main()
