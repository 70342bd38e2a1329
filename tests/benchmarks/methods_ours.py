"""Our methods, as the table of methods calls them."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from methods_runs import Run, subset_truth
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_attr.methods import AttributionMethod

Make = Callable[..., AttributionMethod]
Scores = Callable[..., Tensor]
"""(run, own, **settings) -> (n_train, n_target), or self-influence (n_train,) where `own`."""


def ours(make: Make, snapshots: str | None = None) -> Scores:
    """`trainer.attribute` with the method at the trained module, or at the snapshots of its run, by their schedule.

    Nothing is featurized beforehand; a copy of the store keeps the features of other rows out. For self-influence there
    is one target.
    """

    def attribute(run: Run, own: bool, **settings: Any) -> Tensor:
        data = run.data
        shown = slice(1) if own else slice(None)
        targets = TensorDataset(data.x_target[shown], data.y_target[shown])
        with TemporaryDirectory() as folder:
            path = None
            if snapshots is not None:
                path = Path(folder) / "store"
                shutil.copytree(run.paths[snapshots], path)
            result = run.trainer.attribute(
                model=copy.deepcopy(run.module),
                train_dataloaders=DataLoader(TensorDataset(data.x, data.y), 512),
                target_dataloaders=DataLoader(targets, 512),
                method=make(**settings),
                store=path,
            )
            return result.self_influence if own else result.scores.values

    return attribute


def equal_sum(**parts: Scores) -> Scores:
    """Sum of the scores of several methods, each divided by its standard deviation; a setting is a part's damping."""

    def call(run: Run, own: bool, **settings: float) -> Tensor:
        found = [scores(run, own, damping=settings[name]) for name, scores in parts.items()]
        total = found[0] / found[0].std()
        for scores in found[1:]:
            total += scores / scores.std()
        return total

    return call


def fitted(make: Make) -> Scores:
    """A method on retrained models, those of the `tune` subsets: none is among what is measured."""

    def call(run: Run, own: bool) -> Tensor:
        masks, outputs = subset_truth(run.setting, "tune", run.cache)
        every = outputs.shape[-1] // len(run.data.x_target)
        return ours(lambda: make((masks, outputs[..., ::every])))(run, own)

    return call
