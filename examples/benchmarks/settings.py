"""The settings: data, model and recipe as published, and a reduced form of each for the stand-ins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import images
import lightning as L
import midi
import stand_ins
import texts
from data import Pair
from logistic_regression import LogisticRegression
from mlp import MLP
from music_transformer import MusicTransformer
from nanogpt import NanoGPT
from resnet9 import BasicBlockResNet9, FastResNet9
from torch.utils.data import Dataset, TensorDataset


@dataclass(frozen=True)
class Recipe:
    """A model, how much data it sees, how it is trained, and how often for the ground truth.

    Args:
        module: makes a model with new weights.
        n_train: the first samples of the training data.
        n_targets: the first samples of the test data.
        batch_size: of training and of featurizing.
        trainer: settings of Lightning's Trainer.
        proj_dim: of the features.
        subsets: half subsets of the ground truth.
        seeds: trainings of each.
        reduced: how the model differs from the published one, empty if it does not.
    """

    module: Callable[[], L.LightningModule]
    n_train: int
    n_targets: int
    batch_size: int
    trainer: dict[str, Any]
    proj_dim: int
    subsets: int = 100
    seeds: int = 1
    reduced: str = ""


@dataclass(frozen=True)
class Setting:
    """A setting of the field, on its data and on a stand-in.

    Args:
        title: data and model.
        read: reads the data from a folder.
        recipe: as published.
        stand_in: makes data of the same kind.
        stand_in_recipe: for these, within about a minute on one core.
        prepare: what happens to samples after labels are flipped.
        augment: what happens to them each time they are read for training.
        classes: number of labels, None where there are none.
        flipped: share of labels that are flipped by default.
        published: figures to compare with.
    """

    title: str
    read: Callable[[Path], Pair]
    recipe: Recipe
    stand_in: Callable[[], Pair]
    stand_in_recipe: Recipe
    prepare: Callable[[TensorDataset], TensorDataset] = field(default=lambda dataset: dataset)
    augment: Callable[[TensorDataset], Dataset[Any]] = field(default=lambda dataset: dataset)
    classes: int | None = None
    flipped: float = 0.0
    published: str = ""


CAT_AND_DOG = (3, 5)  # digits 3 and 5 stand in for them
MNIST_NORMAL = images.Normalised([0.1307], [0.3081])
HALF_NORMAL = images.Normalised([0.5] * 3, [0.5] * 3)
CIFAR_NORMAL = images.Normalised([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010])
NARROW = "width 8 instead of 64"


def dattri_cifar(classes: int, kept: tuple[int, ...] | None, epochs: int, **rest: Any) -> Setting:
    return Setting(
        read=partial(images.cifar10, classes=kept),
        recipe=Recipe(partial(BasicBlockResNet9, classes), 5000, 500, 64, {"max_epochs": epochs}, 512),
        stand_in=partial(stand_ins.digits, 3, 32, kept),
        stand_in_recipe=Recipe(
            partial(BasicBlockResNet9, classes, width=8), 200, 40, 32, {"max_epochs": 3}, 512, 6, 2, NARROW
        ),
        prepare=HALF_NORMAL,
        classes=classes,
        **rest,
    )


def trak_cifar(classes: int, kept: tuple[int, ...] | None, n_train: int, **rest: Any) -> Setting:
    return Setting(
        read=partial(images.cifar10, classes=kept),
        recipe=Recipe(partial(FastResNet9, classes), n_train, 2000, 512, {"max_epochs": 24}, 4096),
        stand_in=partial(stand_ins.digits, 3, 32, kept),
        stand_in_recipe=Recipe(
            partial(FastResNet9, classes, width=8, learning_rate=0.1),
            200,
            40,
            32,
            {"max_epochs": 4},
            512,
            6,
            2,
            f"{NARROW}, learning rate 0.1 at the peak instead of 0.4",
        ),
        prepare=CIFAR_NORMAL,
        augment=images.RandomFlips,
        classes=classes,
        **rest,
    )


SETTINGS = {
    "mnist-lr": Setting(
        title="MNIST-10, logistic regression",
        read=images.mnist,
        recipe=Recipe(LogisticRegression, 5000, 500, 32, {"max_epochs": 20}, 512),
        stand_in=partial(stand_ins.digits, 1, 28),
        stand_in_recipe=Recipe(LogisticRegression, 500, 100, 32, {"max_epochs": 10}, 512, 20, 2),
        prepare=MNIST_NORMAL,
        classes=10,
        published="dattri: LDS .80 CG, .33 TracIn, .415 TRAK-1, .645 TRAK-10; AUROC .98 of all but Grad-Cos",
    ),
    "mnist-mlp": Setting(
        title="MNIST-10, MLP",
        read=images.mnist,
        recipe=Recipe(MLP, 5000, 500, 64, {"max_epochs": 50}, 512),
        stand_in=partial(stand_ins.digits, 1, 28),
        stand_in_recipe=Recipe(MLP, 500, 100, 64, {"max_epochs": 20}, 512, 16, 2),
        prepare=MNIST_NORMAL,
        classes=10,
        published="dattri: LDS .26 CG, .15 TracIn, .11 TRAK-1, .33 TRAK-10, .45 TRAK-50; AUROC .98 TRAK-1",
    ),
    "cifar2-dattri": dattri_cifar(
        2,
        CAT_AND_DOG,
        epochs=10,
        title="CIFAR-2 (cats, dogs), dattri's ResNet-9",
        published="dattri: LDS .07 TracIn, .10 TRAK-1, .26 TRAK-10, .37 TRAK-50; GraSS: .48 FJLT of 8,192",
    ),
    "cifar10-dattri": dattri_cifar(
        10,
        None,
        epochs=3,
        title="CIFAR-10, dattri's ResNet-9",
        flipped=0.1,
        published="dattri: AUROC .51 TracIn, .66 TRAK-1, .67 TRAK-50",
    ),
    "cifar2-trak": trak_cifar(
        2, CAT_AND_DOG, 10_000, title="CIFAR-2 (cats, dogs), TRAK's ResNet-9", published="TRAK: no table known"
    ),
    "cifar10-trak": trak_cifar(10, None, 50_000, title="CIFAR-10, TRAK's ResNet-9", published="TRAK: no table known"),
    "maestro": Setting(
        title="MAESTRO, Music Transformer",
        read=midi.maestro,
        recipe=Recipe(MusicTransformer, 5000, 178, 64, {"max_epochs": 20}, 2048),
        stand_in=partial(stand_ins.melodies, 96, 24, length=64),
        stand_in_recipe=Recipe(
            partial(MusicTransformer, length=64, width=64, hidden=128, learning_rate=1e-3),
            96,
            24,
            16,
            {"max_epochs": 4},
            512,
            6,
            2,
            "width 64 instead of 512, blocks of 64 events instead of 256, learning rate 1e-3 instead of 1e-4",
        ),
        published="dattri: LDS .13 TracIn, .07 TRAK-1, .22 TRAK-10, .32 TRAK-50",
    ),
    "shakespeare": Setting(
        title="Shakespeare, nanoGPT",
        read=texts.shakespeare,
        recipe=Recipe(
            partial(NanoGPT, texts.VOCABULARY), 3921, 435, 32, {"max_steps": 5000, "gradient_clip_val": 1.0}, 2048
        ),
        stand_in=partial(stand_ins.documentation, 64),
        stand_in_recipe=Recipe(
            partial(NanoGPT, texts.VOCABULARY, block=64, width=48),
            128,
            24,
            16,
            {"max_steps": 24, "gradient_clip_val": 1.0},
            512,
            6,
            2,
            "width 48 instead of 384, blocks of 64 characters instead of 256",
        ),
        published="dattri: LDS .09 TracIn, .04 TRAK-1, .11 TRAK-10, .23 TRAK-50",
    ),
}
