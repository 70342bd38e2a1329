"""Our methods, as the table of methods calls them."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from methods_runs import Run, quiet
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_attr import AttributionTrainer
from lightning_attr.methods import AttributionMethod

Make = Callable[..., AttributionMethod]
Scores = Callable[
    ..., Tensor
]  # (run, own, **settings) -> (n_train, n_target), or self-influence (n_train,) where `own`


def ours(make: Make, snapshots: bool = False) -> Scores:
    """`trainer.attribute` with the method at the trained module, or at the snapshots of its run.

    Nothing is featurized beforehand; a copy of the store keeps the features of other rows out. For self-influence there
    is one target.
    """

    def attribute(run: Run, own: bool, **settings: Any) -> Tensor:
        data = run.data
        shown = slice(1) if own else slice(None)
        targets = TensorDataset(data.x_target[shown], data.y_target[shown])
        with TemporaryDirectory() as folder:
            path = None
            if snapshots:
                path = Path(folder) / "store"
                shutil.copytree(run.path, path)
            result = AttributionTrainer(**quiet()).attribute(
                model=copy.deepcopy(run.module),
                train_dataloaders=DataLoader(TensorDataset(data.x, data.y), 512),
                target_dataloaders=DataLoader(targets, 512),
                method=make(**settings),
                store=path,
            )
            return result.self_influence if own else result.scores.values

    return attribute
