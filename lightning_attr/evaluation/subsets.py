"""What is to be retrained: on which training samples, how often, and from which seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_attr.arguments.checks import check_float, check_instance, check_int, check_numbers, check_seed
from lightning_attr.randomness.streams import hashed_seed, random_words


@dataclass(frozen=True)
class Retraining:
    """One training from scratch.

    Args:
        subset: row of the plan's masks.
        repeat: how many trainings of this subset come before it.
        seed: of everything that is random in it, in ``[0, 2**32)``.

    Example:
        >>> Retraining(3, 0, 17).name
        'subset=3-repeat=0'
    """

    subset: int
    repeat: int
    seed: int

    @property
    def name(self) -> str:
        """Its name in files."""
        return f"subset={self.subset}-repeat={self.repeat}"

    def __str__(self) -> str:
        return f"subset {self.subset}, repeat {self.repeat}"


@dataclass(frozen=True)
class RetrainingPlan:
    """All retrainings of a ground truth.

    Args:
        kind: "lds", "loo" or "without"; the last two have the full set as subset 0, and the same seeds for every
            subset, so that differences between them are less noisy.
        masks: ``(num_subsets, n_train)``, bool, True where a sample is in.
        repeats: trainings of each subset.
        seed: what all other seeds depend on.

    Raises:
        ValueError: if ``repeats`` is not positive.

    Example:
        >>> plan = removals(3, [[0], [1, 2]], repeats=2, seed=0)
        >>> plan.masks
        tensor([[ True,  True,  True],
                [False,  True,  True],
                [ True, False, False]])
        >>> [retraining.name for retraining in plan][:3]
        ['subset=0-repeat=0', 'subset=1-repeat=0', 'subset=2-repeat=0']
    """

    kind: str
    masks: Tensor
    repeats: int
    seed: int

    def __post_init__(self) -> None:
        check_int("retrain_*", "seeds", self.repeats, minimum=1)

    def __len__(self) -> int:
        return self.repeats * len(self.masks)

    def __iter__(self) -> Iterator[Retraining]:
        """Go through all subsets once, then through all again with other seeds: a part of it is of use early."""
        for repeat in range(self.repeats):
            for subset in range(len(self.masks)):
                yield Retraining(subset, repeat, self.seed_of(subset, repeat))

    def seed_of(self, subset: int, repeat: int) -> int:
        """Hash a seed.

        Returns an integer in ``[0, 2**32)``, which is what ``seed_everything`` takes.
        """
        key = (subset, repeat) if self.kind == "lds" else (repeat,)
        return hashed_seed("retraining", self.seed, *key) % 2**32


def random_subsets(n_train: int, num_subsets: int, alpha: float, repeats: int, seed: int) -> RetrainingPlan:
    """Draw subsets of equal size, each without replacement."""
    check_plan(repeats, seed, num_subsets, alpha)
    size = int(alpha * n_train)
    if size == 0:
        raise ValueError(
            f"Expected argument `alpha` to leave at least one sample in a subset, but {alpha} of {n_train} training "
            "samples is less than one: a subset would be empty."
        )
    masks = torch.zeros(num_subsets, n_train, dtype=torch.bool)
    for subset in range(num_subsets):
        order = np.argsort(random_words(n_train, "subset", seed, subset), kind="stable")
        masks[subset, torch.from_numpy(order[:size])] = True
    return RetrainingPlan("lds", masks, repeats, seed)


def check_plan(
    repeats: Any, seed: Any, num_subsets: Any = 1, alpha: Any = 0.5, indices: Any = (0,), index_sets: Any = ((0,),)
) -> None:
    """Check what can be told before the training data are there.

    Example:
        >>> check_plan(repeats=3, seed=0, alpha=0.5)
    """
    check_int("retrain_*", "seeds", repeats, minimum=1)
    check_seed("retrain_*", seed)
    check_int("retrain_lds", "num_subsets", num_subsets, minimum=1)
    check_float("retrain_lds", "alpha", alpha, above=0, below=1, remedy="It is the share of the samples in a subset.")
    check_instance("retrain_without", "index_sets", index_sets, (list, tuple), "a list of sets of indices")
    for name, one in {"indices": indices, **{f"index_sets[{i}]": one for i, one in enumerate(index_sets)}}.items():
        check_numbers("retrain_*", name, one, "a list of indices of training samples")


def leave_one_out(n_train: int, indices: Sequence[int] | Tensor, repeats: int, seed: int) -> RetrainingPlan:
    """Leave each of some samples out, alone; the full set comes first."""
    checked = _checked("indices", indices, n_train)
    if n_train == 1:
        raise ValueError("Expected more than one training sample, but got 1: what is left would be empty.")
    return RetrainingPlan("loo", _without(n_train, [[index] for index in checked]), repeats, seed)


def removals(n_train: int, index_sets: Sequence[Sequence[int] | Tensor], repeats: int, seed: int) -> RetrainingPlan:
    """Remove each of some sets of samples; the full set comes first."""
    check_instance("retrain_without", "index_sets", index_sets, (list, tuple), "a list of sets of indices")
    if len(index_sets) == 0:
        raise ValueError("Expected argument `index_sets` to hold at least one set of indices, but it is empty.")
    checked = [_checked(f"index_sets[{number}]", one, n_train) for number, one in enumerate(index_sets)]
    for number, one in enumerate(checked):
        if len(one) == n_train:
            raise ValueError(
                f"Expected argument `index_sets[{number}]` to leave some training samples, but it removes all "
                f"{n_train}: what is left would be empty."
            )
    return RetrainingPlan("without", _without(n_train, checked), repeats, seed)


def _without(n_train: int, index_sets: Sequence[Sequence[int]]) -> Tensor:
    masks = torch.ones(1 + len(index_sets), n_train, dtype=torch.bool)
    for row, indices in enumerate(index_sets, start=1):
        masks[row, list(indices)] = False
    return masks


def _checked(name: str, indices: Sequence[int] | Tensor, n_train: int) -> list[int]:
    if isinstance(indices, Tensor) and (indices.ndim != 1 or indices.dtype == torch.bool):
        raise ValueError(
            f"Expected argument `{name}` to hold indices of training samples, but got a tensor of {indices.dtype} and "
            f"shape {tuple(indices.shape)}. Turn a mask into indices with `mask.nonzero().flatten()`."
        )
    values = check_numbers("retrain_*", name, indices, "a list of indices of training samples")
    found = [check_int("retrain_*", f"{name}[{place}]", index) for place, index in enumerate(values.flatten().tolist())]
    if not found:
        raise ValueError(f"Expected argument `{name}` to name at least one training sample, but it is empty.")
    outside = [index for index in found if not 0 <= index < n_train]
    if outside:
        raise ValueError(f"Expected argument `{name}` to hold indices from 0 to {n_train - 1}, but got {outside[0]}.")
    if len(set(found)) < len(found):
        twice = next(index for index in found if found.count(index) > 1)
        raise ValueError(f"Expected argument `{name}` to name each training sample once, but {twice} is there twice.")
    return found
