"""What faults.py damages: a small run with its store, a ground truth and saved results, and how each is read whole."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_attr import AttributionMixin, AttributionResult, AttributionTrainer, FeatureStore
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.errors import AttributionError
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
        self.save_hyperparameters()  # pilots are made of them
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Adapted(Classifier):
    """Most of its weights are frozen, so that snapshots share a file of them."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(4, 20), nn.Tanh(), nn.Linear(20, 4)).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.body(x))


def data() -> TensorDataset:
    """Two classes, the same each time."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(2, (_ROWS,), generator=generator)
    return TensorDataset(torch.randn(_ROWS, 4, generator=generator) + y[:, None], y)


class Started(L.Callback):
    """Says when training begins."""

    def __init__(self, tell: Callable[[], None]) -> None:
        self.tell = tell

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.tell()


def fit(
    path: Path,
    epochs: int = 2,
    seed: int = 0,
    module: type[Classifier] = Classifier,
    on_start: Callable[[], None] | None = None,
) -> L.Trainer:
    """Train with the callback, always the same."""
    callbacks: list[L.Callback] = [] if on_start is None else [Started(on_start)]
    callbacks.append(AttributionCallback(path, TRAK(8), "all", log=False, batch_size=128, optimizer_state=True))
    trainer = AttributionTrainer(max_epochs=epochs, callbacks=callbacks, enable_checkpointing=False, **_QUIET)
    torch.manual_seed(1)
    trainer.fit(module(seed), DataLoader(data(), batch_size=104))
    return trainer


_QUIET: dict[str, Any] = {"accelerator": "cpu", "devices": 1}
_QUIET |= dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)


def make(folder: Path, kinds: Collection[str] | None = None) -> None:
    """Two of each kind, ``a`` and ``b``, so that files can be swapped between them."""
    for kind in KINDS if kinds is None else kinds:
        for seed, name in enumerate("ab"):
            KINDS[kind].make(folder / kind / name, seed)
            shutil.rmtree(folder / kind / name / "claims", ignore_errors=True)


def make_store(path: Path, seed: int) -> None:
    """A run, and what EK-FAC keeps of it."""
    fit(path, seed=seed).attribute(method=Influence(solver="ekfac"), target_dataloaders=targets())


def make_pilots(path: Path, seed: int) -> None:
    """A run, and a pilot that was trained like it."""
    fit(path, seed=seed).attribute(target_dataloaders=targets(), pilots=1)


def make_merged(path: Path, seed: int) -> None:
    """Two runs in one store."""
    parts = [path.with_name(f".{path.name}{run}") for run in range(2)]
    for run, part in enumerate(parts):
        fit(part, 1, seed=2 * seed + run, module=Adapted)
    FeatureStore.merge(parts, path)
    for part in parts:
        shutil.rmtree(part)


def make_of_checkpoints(path: Path, seed: int) -> None:
    """A run without the callback, and the files of its checkpoints."""
    with tempfile.TemporaryDirectory() as files:
        kept = ModelCheckpoint(files, filename="{epoch}", save_top_k=-1)
        trainer = L.Trainer(max_epochs=2, callbacks=[kept], **_QUIET)
        trainer.fit(Classifier(seed), DataLoader(data(), batch_size=104))
        FeatureStore.from_checkpoints(
            sorted(Path(files).glob("*.ckpt")), Classifier(), dirpath=path, method=TRAK(8), optimizer_state=True,
            train_dataloaders=DataLoader(data(), batch_size=104), trainer=L.Trainer(**_QUIET),
        )  # fmt: skip


def make_truth(path: Path, seed: int) -> None:
    """Six retrainings."""
    plan = random_subsets(20, num_subsets=3, alpha=0.5, repeats=2, seed=seed)
    records = Records.prepare(path, plan, {"n_train": 20, "n_target": 4})
    for i, retraining in enumerate(records.plan):
        records.write(retraining, torch.randn(4, generator=torch.Generator().manual_seed(10 * seed + i)))


def make_result(path: Path, seed: int, topk: int | None = None) -> None:
    """What `attribute` found."""
    with tempfile.TemporaryDirectory() as store:
        fit(Path(store), seed=seed).attribute(target_dataloaders=targets(), topk=topk).save(path)


def targets() -> DataLoader[Any]:
    """Six of the samples."""
    return DataLoader(TensorDataset(*data()[:6]), batch_size=6)


# Reading ------------------------------------------------------------------------------------------------------------


def read_store(path: Path) -> Reading:
    """All that attribution reads of a store: what the manifest says, weights, moments, columns, factors."""
    store = FeatureStore.open(path, writer=False)
    found: Reading = {"manifest": store.manifest, "id": store.manifest.id}
    batch = next(iter(DataLoader(data(), batch_size=2)))
    model = SnapshotModel.of(Classifier().eval(), [batch], [batch])
    for key in (snapshot.key for snapshot in store.snapshots):
        found |= {f"{key} {name}": tensor for name, tensor in store.weights(key).items()}
        state = store.optimizer_state(key).moments if store.snapshot(key).optimizer else {}  # pilots have none
        for name, moments in state.items():
            found |= {f"{key} {name} {part}": value for part, value in vars(moments).items()}
        found |= {f"{key} column {name}": store.column(key, name) for name in store.shard(key, 0)}
        found |= {f"{key} basis {name}": tensor for name, tensor in (store.basis(key) or {}).items()}
        place, digest = store.place(key, "computed"), store.fingerprint.data
        own = replace(
            model, folder=path / "snapshots" / key / "computed", place=place, train_digest=digest, writer=False
        )
        for name, shapes in _FACTORS.items() if own.folder.exists() else ():
            # Where it is gone it is computed again: no damage.
            found |= {f"{key} {name} {part}": value for part, value in own.kept(name, dict, shapes).items()}
    return found | read_journal(store)


def read_journal(store: FeatureStore) -> Reading:
    """The samples and settings of each step; steps that are missing say so, as those who read it ask for them."""
    journal, taken = store.journal(), max(s.global_step for s in store.snapshots if s.pilot is None)
    if journal is None:
        return {}
    gap = journal.gap(taken)
    if gap is not None:
        raise AttributionError(f"The journal in {store.path}: {gap}.")
    steps = {f"step {s.global_step}": (*(rows.tolist() for rows in s.rows), s.groups) for s in journal.steps()}
    return {"exposure": journal.exposure(_ROWS), "unknown": journal.unknown, "settings": journal.settings, **steps}


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
    """A kind of directory: how it is made and read, and the kinds of files in it, by the end of their paths."""

    make: Callable[[Path, int], None]
    read: Callable[[Path], Reading]
    files: dict[str, str]


_OF_STORE = {
    "manifest": "manifest.json",
    "weights": "weights.safetensors",
    "frozen": "frozen.safetensors",
    "optimizer": "optimizer.safetensors",
    "basis": "basis.safetensors",
    "features": "features/*.safetensors",
    "factors": "computed/*.safetensors",
    "journal": "journal/*/*",
}
_OF_TRUTH = {"manifest": "manifest.json", "masks": "masks.safetensors", "retraining": "runs/*.safetensors"}
_OF_RESULT = {"scores": "*scores.*", "columns": "result.safetensors", "metrics": "metrics.json"}
KINDS = {
    "store": Kind(make_store, read_store, _OF_STORE),
    "pilots": Kind(make_pilots, read_store, _OF_STORE),
    "merged": Kind(make_merged, read_store, _OF_STORE),
    "checkpoints": Kind(make_of_checkpoints, read_store, _OF_STORE),
    "truth": Kind(make_truth, read_truth, _OF_TRUTH),
    "result": Kind(make_result, read_result, _OF_RESULT),
    "top": Kind(partial(make_result, topk=2), read_result, _OF_RESULT),
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
