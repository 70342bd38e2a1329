"""The settings of `lds.py`: data, module, recipe, and the models retrained on half subsets of each.

The digits and the characters of Python's documentation come with Python and scikit-learn. Real data come from a folder
that holds `mnist/t10k-*.gz`, `cifar/cifar10_subset.zip` (`train/cat/0000.jpg`, ...) and `shakespeare/input.txt`; there
are no `tune` subsets of them, since nothing is chosen on them. Modules are those of `examples/benchmarks`.
"""

from __future__ import annotations

import hashlib
import io
import math
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import language_model
import lightning as L
import numpy as np
import one_run_text
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import digits
from lightning_attr.outputs import LanguageModel

EXAMPLES = Path(__file__).parents[2] / "examples" / "benchmarks"
sys.path.append(str(EXAMPLES))
from images import read_idx  # noqa: E402  # a script of that folder
from logistic_regression import LogisticRegression  # noqa: E402
from mlp import MLP  # noqa: E402
from nanogpt import NanoGPT  # noqa: E402
from resnet9 import BasicBlockResNet9  # noqa: E402
from texts import VOCABULARY, split  # noqa: E402

Truth = tuple[Tensor, Tensor]
"""Subsets (m, n_train) bool, and outputs of the targets (runs, m, n_target) float32."""


@dataclass(frozen=True, eq=False)
class LdsSetting:
    """One setting.

    Args:
        name: as the command line has it.
        title: data and model, and what is smaller than published.
        train: training samples.
        targets: what is predicted.
        module: makes a module with new weights, which has its network in `network` where that takes inputs alone.
        epochs: of a training.
        batch_size: of a training.
        truth: trains the ground truth of a family of subsets, or reads it from a folder.
    """

    name: str
    title: str
    train: TensorDataset
    targets: TensorDataset
    module: Callable[[], L.LightningModule]
    epochs: int
    batch_size: int
    truth: Callable[[LdsSetting, str, Path], Truth]

    @property
    def classifies(self) -> bool:
        """Whether samples are `(x, label)`."""
        return len(self.train.tensors) == 2 and self.train.tensors[1].ndim == 1

    def datamodule(self) -> LdsData:
        return LdsData(self)

    def trained(self, data: TensorDataset, seed: int) -> Any:
        """A module trained in a plain loop by the Trainer's recipe; the seed fixes weights, order and dropout."""
        torch.manual_seed(seed)
        module = self.module().train()
        batches = [rows for _ in range(self.epochs) for rows in torch.randperm(len(data)).split(self.batch_size)]
        module.trainer = steps = Steps(len(batches))
        made = module.configure_optimizers()
        optimizer, schedule = (made["optimizer"], made["lr_scheduler"]) if isinstance(made, dict) else (made, None)
        for rows in batches:
            optimizer.zero_grad()
            module.training_step(tuple(tensor[rows] for tensor in data.tensors), 0).backward()
            optimizer.step()
            if schedule is not None:
                schedule["scheduler"].step()
        del steps  # the module has only a weak reference
        return module.eval()


class Steps:
    """Stands in for the Trainer where a module asks how long it will train."""

    def __init__(self, steps: int) -> None:
        self.estimated_stepping_batches = steps


class LdsData(L.LightningDataModule):
    def __init__(self, setting: LdsSetting) -> None:
        super().__init__()
        self.train, self.targets, self.batch_size = setting.train, setting.targets, setting.batch_size

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.targets, self.batch_size)


class SmallGPT(NanoGPT):
    """What is attributed is the mean log-likelihood of a block."""

    model_output = LanguageModel(kind="mean_loss", shift=False)


# Ground truth ---------------------------------------------------------------------------------------------------------


def retrained(subsets: int, runs: int, setting: LdsSetting, family: str, cache: Path) -> Truth:
    """Train `runs` models on each of `subsets` halves; each run is a file of its own, so that it may be killed."""
    if family != "report":
        raise SystemExit(f"Expected --subsets report with --setting {setting.name}: nothing is chosen on real data.")
    n = len(setting.train)
    ranks = np.random.default_rng(digits.SUBSET_SEEDS[family]).random((subsets, n)).argsort(1).argsort(1)
    masks = torch.from_numpy(ranks < n // 2)
    paths = [truth_path(setting, family, masks, run, cache) for run in range(runs)]
    for run, path in enumerate(paths):
        if not path.exists():
            print(f"Training {subsets} models for {path}", file=sys.stderr, flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"outputs": one_run(setting, masks, run, digits.SUBSET_SEEDS[family])}, path)
    return masks, torch.stack([load_file(path)["outputs"] for path in paths])


def one_run(setting: LdsSetting, masks: Tensor, run: int, seed: int) -> Tensor:
    outputs = torch.empty(len(masks), len(setting.targets))
    for k, mask in enumerate(masks):
        model_seed = int(np.random.SeedSequence((seed, run, k)).generate_state(1)[0])
        subset = TensorDataset(*(tensor[mask] for tensor in setting.train.tensors))
        module = setting.trained(subset, model_seed)
        with torch.no_grad():
            outputs[k] = module.model_output.output(*module.attribution_step(setting.targets.tensors))
    return outputs


def truth_path(setting: LdsSetting, family: str, masks: Tensor, run: int, cache: Path) -> Path:
    """Where a run is kept; its name holds a hash of all that its numbers depend on."""
    module = setting.module()
    module.trainer = steps = Steps(1)
    made = module.configure_optimizers()
    optimizer = made["optimizer"] if isinstance(made, dict) else made
    parts = (repr(module), repr(optimizer), setting.epochs, setting.batch_size, type(module).__name__)
    del steps
    known = hashlib.sha256(repr(parts).encode())
    for tensor in (masks, *setting.train.tensors, *setting.targets.tensors):
        known.update(tensor.numpy().tobytes())
    return cache / f"{setting.name}-{family}-run{run}-{known.hexdigest()[:12]}.safetensors"


# Settings -------------------------------------------------------------------------------------------------------------


def of_digits(name: str, folder: Path | None) -> LdsSetting:
    setting = digits.SETTINGS[name]
    x_train, x_test, y_train, y_test = digits.load(setting)
    return LdsSetting(
        *(name, f"digits {name}", TensorDataset(x_train, y_train), TensorDataset(x_test, y_test)),
        *(partial(digits.DigitsClassifier, setting), setting.epochs, setting.batch_size),
        lambda _, family, cache: digits.ground_truth(setting, family, cache),
    )


def of_text(folder: Path | None) -> LdsSetting:
    train, targets, vocabulary = one_run_text.load()
    epochs, batch_size = one_run_text.EPOCHS, one_run_text.BATCH_SIZE
    module = partial(language_model.CharacterModule, vocabulary, epochs * math.ceil(len(train) / batch_size))
    return LdsSetting(
        *("text", "characters of Python's documentation, transformer of 2 layers", TensorDataset(train)),
        *(TensorDataset(targets), module, epochs, batch_size),
        lambda _, family, cache: one_run_text.ground_truth(family, cache),
    )


def of_mnist(name: str, folder: Path | None) -> LdsSetting:
    """dattri's recipes, on the first 5,000 and the next 500 of the 10,000 test images."""
    found = part(folder, "mnist", "t10k-images-idx3-ubyte.gz")
    x = (read_idx(found).unsqueeze(1) / 255 - 0.1307) / 0.3081
    y = read_idx(found.with_name("t10k-labels-idx1-ubyte.gz")).long()
    train, targets = TensorDataset(x[:5000], y[:5000]), TensorDataset(x[5000:5500], y[5000:5500])
    module, epochs, batch_size = {"mnist-lr": (LogisticRegression, 20, 32), "mnist-mlp": (MLP, 50, 64)}[name]
    title = f"MNIST-10 {name[6:].upper()}, dattri's recipe"
    return LdsSetting(name, title, train, targets, module, epochs, batch_size, partial(retrained, 50, 2))


def of_cifar(folder: Path | None) -> LdsSetting:
    """Cats and dogs of 16 x 16 pixels: each the mean of 2 x 2."""
    from PIL import Image

    sets = []
    with zipfile.ZipFile(part(folder, "cifar", "cifar10_subset.zip")) as archive:
        for half, count in (("train", 2500), ("test", 250)):
            images, labels = [], []
            for label, kind in enumerate(("cat", "dog")):
                names = sorted(name for name in archive.namelist() if name.startswith(f"{half}/{kind}/"))[:count]
                images += [np.array(Image.open(io.BytesIO(archive.read(name))).convert("RGB")) for name in names]
                labels += [label] * len(names)
            x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
            sets.append(TensorDataset(torch.nn.functional.avg_pool2d(x, 2)[order], torch.tensor(labels)[order]))
    return LdsSetting(
        *("cifar2", "CIFAR-2 ResNet-9: width 8 instead of 64, 16 x 16 pixels", *sets),
        *(partial(BasicBlockResNet9, 2, width=8), 10, 64, partial(retrained, 30, 2)),
    )


def of_shakespeare(folder: Path | None) -> LdsSetting:
    text = part(folder, "shakespeare", "input.txt").read_text("utf-8")
    train, targets = split(text, length=64)
    sets = [TensorDataset(*(t[:count] for t in each.tensors)) for each, count in ((train, 1024), (targets, 128))]
    module = partial(SmallGPT, VOCABULARY, block=64, layers=2, heads=4, width=64, dropout=0.0, learning_rate=3e-3)
    title = "tiny Shakespeare nanoGPT: 2 layers of width 64, 1,024 blocks of 64 characters"
    return LdsSetting("shakespeare", title, *sets, module, 10, 16, partial(retrained, 30, 2))


def part(folder: Path | None, name: str, file: str) -> Path:
    """A file of the folder of real data."""
    if folder is None or not (folder / name / file).is_file():
        raise SystemExit(f"Expected --data FOLDER with {name}/{file} in it, but got {folder}.")
    return folder / name / file


SETTINGS: dict[str, Callable[[Path | None], LdsSetting]] = {
    **{name: partial(of_digits, name) for name in digits.SETTINGS},
    "text": of_text,
    **{name: partial(of_mnist, name) for name in ("mnist-lr", "mnist-mlp")},
    "cifar2": of_cifar,
    "shakespeare": of_shakespeare,
}
