"""What faults.py damages: a small run with its store, a ground truth and saved results, and how each is read whole."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_attr import AttributionMixin, AttributionResult, AttributionTrainer, FeatureStore
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.evaluation.ground_truth import GroundTruth, Records
from lightning_attr.evaluation.subsets import random_subsets
from lightning_attr.features.snapshot_model import SnapshotModel
from lightning_attr.files.io import read_tensors
from lightning_attr.methods import TRAK, Influence

__all__ = ["KINDS", "Reading", "data", "fit", "kind_of", "make", "read"]

Reading = dict[str, Any]
"""All that a directory gives: tensors and plain values by name."""
_ROWS = 1040  # three shards


class Classifier(AttributionMixin, L.LightningModule):
    """A small network, with Adam."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def data() -> TensorDataset:
    """Two classes, the same each time."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(2, (_ROWS,), generator=generator)
    return TensorDataset(torch.randn(_ROWS, 4, generator=generator) + y[:, None], y)


def fit(path: Path, epochs: int = 2, seed: int = 0, on_start: Callable[[], None] = lambda: None) -> L.Trainer:
    """Train with the callback, always the same."""
    callback = AttributionCallback(path, TRAK(8), "all", log=False, batch_size=128, optimizer_state=True)

    class Started(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            on_start()

    trainer = AttributionTrainer(
        max_epochs=epochs, accelerator="cpu", devices=1, logger=False, callbacks=[Started(), callback],
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    torch.manual_seed(1)
    trainer.fit(Classifier(seed), DataLoader(data(), batch_size=104))
    return trainer


def make(folder: Path) -> None:
    """Two of each, ``a`` and ``b``, so that files can be swapped between them."""
    targets = DataLoader(TensorDataset(*data()[:6]), batch_size=6)
    for seed, name in enumerate("ab"):
        trainer = fit(folder / "store" / name, seed=seed)
        trainer.attribute(method=Influence(solver="ekfac"), target_dataloaders=targets)  # keeps its factors
        for kind, topk in (("result", None), ("top", 2)):
            trainer.attribute(target_dataloaders=targets, topk=topk).save(folder / kind / name)
        plan = random_subsets(20, num_subsets=3, alpha=0.5, repeats=2, seed=seed)
        records = Records.prepare(folder / "truth" / name, plan, {"n_train": 20, "n_target": 4})
        for i, retraining in enumerate(records.plan):
            records.write(retraining, torch.randn(4, generator=torch.Generator().manual_seed(10 * seed + i)))
    for place in (folder / "store").glob("*/claims"):
        shutil.rmtree(place)


# Reading ------------------------------------------------------------------------------------------------------------


def read_store(path: Path) -> Reading:
    """All that attribution reads of a store: what the manifest says, weights, moments, columns, factors."""
    store = FeatureStore.open(path, writer=False)
    found: Reading = {"manifest": store.manifest, "id": store.manifest.id}
    batch = next(iter(DataLoader(data(), batch_size=2)))
    model = SnapshotModel.of(Classifier().eval(), [batch], [batch])
    for key in (snapshot.key for snapshot in store.snapshots):
        found |= {f"{key} {name}": tensor for name, tensor in store.weights(key).items()}
        for name, moments in store.optimizer_state(key).moments.items():
            found |= {f"{key} {name} {part}": value for part, value in vars(moments).items()}
        found |= {f"{key} column {name}": store.column(key, name) for name in store.shard(key, 0)}
        found |= {f"{key} basis {name}": tensor for name, tensor in (store.basis(key) or {}).items()}
        place, digest = store.place(key, "computed"), store.fingerprint.data
        own = replace(
            model, folder=path / "snapshots" / key / "computed", place=place, train_digest=digest, writer=False
        )
        for name, shapes in _FACTORS.items():
            # Where it is gone it is computed again: no damage.
            found |= {f"{key} {name} {part}": value for part, value in own.kept(name, dict, shapes).items()}
    return found


_FACTORS: dict[str, dict[str, tuple[int, ...]]] = {}
"""Names of the files in ``computed/``, which depend on the versions of all that they are computed with, and shapes."""


def read_truth(path: Path) -> Reading:
    """The outputs of every retraining; one without a file counts as not finished, and is repeated."""
    truth = GroundTruth.open(path)
    outputs = {f"{r} {s}": truth.outputs[r, s] for r, s in truth.finished.nonzero().tolist()}
    return {"masks": truth.masks, "seeds": truth.seeds, "kind": truth.kind, "recipe": truth.provenance, **outputs}


def read_result(path: Path) -> Reading:
    """Scores, columns, provenance and metrics."""
    result = AttributionResult.load(path)
    return {**vars(result), **{f"scores {name}": value for name, value in vars(result.scores).items()}, "scores": 0}


@dataclass(frozen=True)
class Kind:
    """A kind of directory: how it is read, and the kinds of files in it, by the end of their paths."""

    read: Callable[[Path], Reading]
    files: dict[str, str]


KINDS = {
    "store": Kind(
        read_store,
        {
            "manifest": "manifest.json",
            "weights": "weights.safetensors",
            "optimizer": "optimizer.safetensors",
            "basis": "basis.safetensors",
            "features": "features/*.safetensors",
            "factors": "computed/*.safetensors",
        },
    ),
    "truth": Kind(
        read_truth, {"manifest": "manifest.json", "masks": "masks.safetensors", "retraining": "runs/*.safetensors"}
    ),
    "result": Kind(read_result, {"scores": "scores.*", "columns": "result.safetensors", "metrics": "metrics.json"}),
    "top": Kind(read_result, {"scores": "*scores.*", "columns": "result.safetensors", "metrics": "metrics.json"}),
}


def read(kind: str, path: Path) -> Reading:
    """Read a directory of a kind."""
    return KINDS[kind].read(path)


def kind_of(file: Path, folder: Path) -> str:
    """Name the kind of a file of :func:`make`, such as "store features"."""
    kind = file.relative_to(folder).parts[0]
    own = next(name for name, pattern in KINDS[kind].files.items() if file.match(pattern))
    return f"{kind} {own}"


def know_factors(folder: Path) -> None:
    """Note what the files of factors are called, and the shapes in them."""
    _FACTORS.clear()
    for file in sorted(folder.rglob("computed/*.safetensors")):
        _FACTORS[file.stem] = {name: tuple(tensor.shape) for name, tensor in read_tensors(file).items()}
