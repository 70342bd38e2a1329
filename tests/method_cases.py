"""What the contract tests run on: one recorded run, and the methods that are enrolled, a line each.

It is a module of its own, so that processes started by the tests can import it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from truths import truth_of

from cases import loader_of, quiet_trainer
from lightning_attr import AttributionMixin, AttributionResult, FeatureStore, attribute
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.evaluation import GroundTruth
from lightning_attr.methods import (
    EKFAC,
    GAS,
    LESS,
    MAGIC,
    RPS,
    SOURCE,
    TRAK,
    Astra,
    AttributionMethod,
    ConjugateGradient,
    Datamodel,
    DropoutEnsemble,
    EmpiricalInfluence,
    FactGraSS,
    GradCos,
    GradDot,
    Influence,
    KNNShapley,
    LiSSA,
    LoGra,
    ProjectedInfluence,
    ProjectedSOURCE,
    RepresentationSimilarity,
    SoftThreshold,
    TracIn,
    TrackStar,
    TrajectoryInfluence,
)
from lightning_attr.projectors import IdentityProjector, LayerSubset
from lightning_attr.store import feature_store as store

N_TRAIN, N_TARGET = 24, 5
TWINS = (20, 3)
"""Two training samples that are the same."""
COPY, FLIPPED = 22, 23
"""Training copies of target 0: with its label, and with the other one."""


@dataclass(frozen=True)
class Case:
    """A method, and the clauses of the contract that do not hold for it, each with its reason."""

    name: str
    make: Callable[[], AttributionMethod]
    except_for: Mapping[str, str] = field(default_factory=dict)


OF_THE_RUN = {
    "order": "the run drew samples by row number",
    "twins": "the run drew them in different steps",
    "sign": "the run decides which of like samples mattered",
    "batches": "batches are those of the run",
    "resuming": "nothing is kept that another attempt could take up",
}


def random_truth() -> GroundTruth:
    """Models that were never retrained: something to choose by."""
    return truth_of(torch.randn(N_TRAIN, N_TARGET, generator=torch.Generator().manual_seed(0)))


CASES = [
    Case("TRAK", lambda: TRAK(projector=IdentityProjector())),
    Case("TRAK, projected", lambda: TRAK(proj_dim=16)),
    Case("TRAK, as published", lambda: TRAK(projector=IdentityProjector(), newton_weights=False)),
    Case("TRAK, exact", lambda: TRAK(proj_dim=67, exact=True)),
    Case("TRAK, exact, as published", lambda: TRAK(proj_dim=67, exact=True, newton_weights=False)),
    Case("TRAK, leave-one-out", lambda: TRAK(projector=IdentityProjector(), loo_correction=True)),
    Case(
        "TRAK, damping chosen",
        lambda: TRAK(projector=IdentityProjector(), damping="auto", truth=random_truth()),
        {"order": "the truth is of one order", "diagonal": "the truth is of the targets"},
    ),
    Case("soft threshold", lambda: SoftThreshold(TRAK(projector=IdentityProjector()), 0.01)),
    Case(
        "soft threshold, some kept",
        lambda: SoftThreshold(TRAK(projector=IdentityProjector()), keep=10),
        {"diagonal": "the threshold is of the target"},
    ),
    Case(
        "soft threshold, chosen",
        lambda: SoftThreshold(TRAK(projector=IdentityProjector()), truth=random_truth()),
        {"order": "the truth is of one order", "diagonal": "the truth is of the targets"},
    ),
    Case("soft threshold, exact", lambda: SoftThreshold(TRAK(exact=True), 0.01)),
    Case("dropout ensemble", lambda: DropoutEnsemble(TRAK(projector=IdentityProjector()), masks=2)),
    Case(
        "dropout ensemble, forward only",
        lambda: DropoutEnsemble(TRAK(projector=IdentityProjector()), masks=3, rate=0.2, forward_only=True),
    ),
    Case("GradDot", lambda: GradDot(IdentityProjector())),
    Case("GradCos", lambda: GradCos(IdentityProjector())),
    Case("TracIn", lambda: TracIn(IdentityProjector())),
    Case(
        "TracIn of the last layer",
        lambda: TracIn(LayerSubset(IdentityProjector(), ["network.3"])),
        {"sign": "behind the hidden layer, like samples with a larger loss are beyond a copy"},
    ),
    Case("TracIn in Adam's metric", lambda: TracIn(IdentityProjector(), preconditioner="adam")),
    Case("GAS", lambda: GAS(IdentityProjector())),
    Case("GAS layer by layer", lambda: GAS(IdentityProjector(), layerwise=True)),
    Case("GradDot, exact", lambda: GradDot(exact=True)),
    Case("GradCos, exact", lambda: GradCos(exact=True)),
    Case("TracIn, exact", lambda: TracIn(exact=True)),
    Case("GAS layer by layer, exact", lambda: GAS(layerwise=True, exact=True)),
    Case("LESS", lambda: LESS(IdentityProjector())),
    Case("influence, EK-FAC", lambda: Influence(solver=EKFAC(labels="exact"))),
    Case(
        "influence, K-FAC, sampled labels",
        lambda: Influence(solver="kfac"),
        {"order": "labels are drawn by row number"},
    ),
    Case("influence, explicit", lambda: Influence(solver="explicit")),
    Case("influence, CG", lambda: Influence(solver=ConjugateGradient(tolerance=1e-6))),
    Case("influence, LiSSA", lambda: Influence(solver=LiSSA(iterations=10))),
    Case("influence, Arnoldi", lambda: Influence(solver="arnoldi")),
    Case("influence, DataInf", lambda: Influence(solver="datainf")),
    Case("influence, Astra", lambda: Influence(solver=Astra(batch_size=N_TRAIN))),
    Case(
        "influence, Astra by SGD",
        lambda: Influence(solver=Astra("sgd", steps=3, batch_size=16)),
        {"order": "batches are drawn by row number"},
    ),
    Case("influence, RelatIF", lambda: Influence("empirical_fisher", "explicit", relative="theta", snapshots="all")),
    Case("SOURCE", lambda: SOURCE(2, EKFAC(labels="exact"))),
    Case("SOURCE, SGD", lambda: SOURCE([0.5], "kfac", "empirical_fisher", "sgd", 0.9)),
    Case("projected SOURCE", lambda: ProjectedSOURCE(IdentityProjector(), optimizer="adam")),
    Case(
        "projected SOURCE, SGD",
        lambda: ProjectedSOURCE(IdentityProjector(), "empirical_fisher", "sgd", 0.9, 0.01, per_layer=True),
    ),
    Case("MAGIC", lambda: MAGIC(self_influence=True), OF_THE_RUN),
    Case("trajectory influence", lambda: TrajectoryInfluence("gram", self_influence=True), OF_THE_RUN),
    Case("projected influence", lambda: ProjectedInfluence(IdentityProjector())),
    Case("projected influence, RelatIF", lambda: ProjectedInfluence(IdentityProjector(), relative="loss")),
    Case("TrackStar", lambda: TrackStar(IdentityProjector())),
    Case(
        "TrackStar in Adam's scale",
        lambda: TrackStar(IdentityProjector(), preconditioner="adam", per_layer=False, snapshots="all"),
    ),
    Case("LoGra", lambda: LoGra(proj_dim=16)),
    Case("FactGraSS", lambda: FactGraSS(proj_dim=16)),
    Case("RPS", lambda: RPS(), {"sign": "labels of training samples do not enter"}),
    Case(
        "RPS, cosine of the predicted class",
        lambda: RPS(target_class="prediction", normalize=True, snapshots="all"),
        {"sign": "labels of training samples do not enter"},
    ),
    Case("representations", lambda: RepresentationSimilarity(), {"sign": "labels do not enter"}),
    Case("KNN-Shapley", lambda: KNNShapley(k=3)),
    Case(
        "empirical influence",
        lambda: EmpiricalInfluence(random_truth()),
        dict.fromkeys(("sign", "order", "twins", "diagonal"), "the truth is of its own, in one order"),
    ),
    Case(
        "datamodel",
        lambda: Datamodel(random_truth(), "ridge"),
        dict.fromkeys(("sign", "order", "twins", "diagonal"), "the truth is of its own, in one order"),
    ),
]


class Classifier(AttributionMixin, L.LightningModule):
    """A small MLP for two classes, with dropout while it trains."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.network = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.1), nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.02)


def training_data() -> TensorDataset:
    """Two noisy classes, a pair of twins, and both copies of target 0."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(N_TRAIN) % 2
    x = torch.randn(N_TRAIN, 4, generator=generator) + (2 * y[:, None] - 1) * torch.tensor([1.0, 0, 0, 0])
    x[TWINS[0]], y[TWINS[0]] = x[TWINS[1]], y[TWINS[1]]
    target, label = target_data()[0]
    x[COPY], y[COPY] = target, label
    x[FLIPPED], y[FLIPPED] = target, 1 - label
    return TensorDataset(x, y)


def target_data() -> TensorDataset:
    """The first far from all training samples but its copies."""
    x = torch.randn(N_TARGET, 4, generator=torch.Generator().manual_seed(1))
    x[0] = torch.tensor([0.5, 0.0, 4.0, -4.0])
    return TensorDataset(x, torch.tensor([1, 0, 1, 0, 1]))


def record(folder: Path, shard_rows: int = 8) -> Path:
    """Train once; the store has snapshots only, and takes any order of the training samples."""
    callback = AttributionCallback(
        folder, method=TRAK(proj_dim=4), snapshots=[-1, 0, 3, 9], featurize=False, log=False, optimizer_state=True
    )
    trainer = quiet_trainer(max_epochs=10, callbacks=[callback])
    torch.manual_seed(0)
    trainer.fit(Classifier(), loader_of(training_data(), shuffle=True))
    found = FeatureStore.open(folder)
    found.manifest = replace(found.manifest, fingerprint=replace(found.fingerprint, data=None), shard_rows=shard_rows)
    found._save(found.manifest)
    return folder


def scored(method: AttributionMethod, path: Path | None, **settings: Any) -> AttributionResult:
    """Attribute the targets of the recorded run."""
    trainer = settings.pop("trainer", None) or quiet_trainer()
    train, batch_size = settings.pop("train", training_data()), settings.pop("batch_size", 8)
    targets = loader_of(settings.pop("targets", target_data()), batch_size=settings.pop("target_batch_size", 2))
    settings = {"train_dataloaders": loader_of(train, batch_size=batch_size), "target_dataloaders": targets, **settings}
    return attribute(trainer, model=Classifier(), method=method, store=path, **settings)


def main(stores: Path, results: Path) -> None:
    """What each of two processes runs: every case, on a store of its own."""
    torch.set_num_threads(1)
    store._SHARD_ROWS = 8
    for i, case in enumerate(CASES):
        if "two processes" not in case.except_for:
            trainer = quiet_trainer(strategy="ddp", devices=2)
            scored(case.make(), stores / str(i), trainer=trainer).save(results / f"{i}-{trainer.global_rank}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
