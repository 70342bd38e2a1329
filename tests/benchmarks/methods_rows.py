"""The rows of the table of methods: a method, by whom, and how it is called. To add a method, add a line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import methods_dattri as dattri
import methods_peers as peers
from methods_ours import Scores, equal_sum, fitted, ours

from digits import WEIGHT_DECAY
from lightning_attr.methods import (
    EKFAC,
    GAS,
    RPS,
    TRAK,
    Arnoldi,
    ConjugateGradient,
    Datamodel,
    EmpiricalInfluence,
    FactGraSS,
    GradCos,
    GradDot,
    Influence,
    KNNShapley,
    LiSSA,
    LoGra,
    ProjectedInfluence,
    RepresentationSimilarity,
    TracIn,
)
from lightning_attr.projectors import FactGraSSProjector, KroneckerProjector, LayerSubset, Projector

Grid = Sequence[Mapping[str, Any]]
NETWORKS = ("lr", "mlp", "cnn")


def over(name: str, *values: Any) -> Grid:
    """One setting that is tuned, or none for a single value."""
    return [{name: value} for value in values]


@dataclass(frozen=True)
class Row:
    """A method by somebody, and how it is measured.

    Args:
        grid: the settings among which `--tune` chooses.
        networks: on which.
        own: whether self-influence is measured, in a run with flipped labels; not where a method has none, or solves
            for each training sample, which takes minutes.
        every: measure every so many targets, and once; for methods that solve for each target.
        fitted: whether it takes retrained models, whose price is then added.
    """

    method: str
    by: str
    scores: Scores
    grid: Grid = ({},)
    networks: Sequence[str] = NETWORKS
    own: bool = True
    every: int = 1
    fitted: bool = False

    @property
    def name(self) -> str:
        return f"{self.method}, {self.by}"


def influence(curvature: str | None, solver: Any, **others: Any) -> Callable[..., Influence]:
    return partial(Influence, curvature, solver, **others)


def on_linear_layers(projector: Projector) -> Callable[..., ProjectedInfluence]:
    """What dattri's LoGra and FactGraSS see of the CNN: its only linear layer."""
    return partial(ProjectedInfluence, LayerSubset(projector, ["network.7"]), "empirical_fisher", True)


RELATIVE = over("damping", 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # of the mean eigenvalue
CONVEX = {
    "damping": 0.01,
    "weight_decay": WEIGHT_DECAY,
}  # at an optimum; 0, 0.01 and 0.1 score 0.964 to 0.965 on `tune`
STRONG = over("damping", 1.0, 3.0, 10.0, 30.0)  # 15 steps of CG solve no weaker one
ABSOLUTE = (0.001, 0.003, 0.01, 0.03, 0.1)
SOLVED = {"own": False, "every": 6}
RUN, WHOLE_RUN = "geometric", "start+geometric"
DEEP = ["mlp", "cnn"]
SMALL = ["lr", "mlp"]  # on the CNN, CG took 91 trainings for a sixth of the targets, and dattri's 23 GB

ROWS = [
    # The TRAK family
    Row("TRAK, one model", "ours", ours(TRAK), over("damping", 0.1, 0.3, 1.0, 3.0)),
    Row(
        "TRAK, one model", "dattri", partial(dattri.trak, snapshots=False), over("regularization", 1e-3, 1e-2, 0.1, 1.0)
    ),
    Row("TRAK, one model", "traker", peers.traker),
    Row("TRAK, one run", "ours", ours(TRAK, RUN), over("damping", 0.1, 0.3, 1.0, 3.0)),
    Row("TRAK, one run", "dattri", partial(dattri.trak, snapshots=True), over("regularization", 1e-3, 1e-2, 0.1, 1.0)),
    Row("TRAK, one run from the start", "ours", ours(TRAK, WHOLE_RUN), over("damping", 0.1, 0.3, 1.0, 3.0)),
    Row("TRAK, exact, one model", "ours", ours(partial(TRAK, exact=True)), over("damping", 0.3, 1.0, 3.0)),
    Row("TRAK, exact, one run", "ours", ours(partial(TRAK, exact=True), RUN), over("damping", 0.3, 1.0, 3.0)),
    Row(
        "TRAK, exact, one run from the start",
        "ours",
        ours(partial(TRAK, exact=True), WHOLE_RUN),
        over("damping", 0.3, 1.0, 3.0),
    ),
    Row(
        "TRAK + EK-FAC, one run from the start",
        "ours",
        equal_sum(
            trak=ours(partial(TRAK, exact=True), WHOLE_RUN),
            ekfac=ours(influence("ggn", "ekfac", snapshots="all"), WHOLE_RUN),
        ),
        [{"trak": t, "ekfac": e} for t in (0.3, 1.0) for e in (0.01, 0.03, 0.1)],
    ),
    # Influence functions
    Row("IF explicit (Hessian)", "ours", ours(influence("hessian", "explicit", **CONVEX)), networks=["lr"]),
    Row(
        "IF explicit (Hessian)",
        "dattri",
        partial(dattri.influence("Explicit"), regularization=WEIGHT_DECAY),  # 0.964; 0.934 with 0.003
        networks=["lr"],
    ),
    Row(
        "IF explicit (Hessian)",
        "captum",
        partial(peers.captum_influence("naive"), projection_dim=650, hessian_inverse_tol=0.0),
        over("hessian_reg", 1e-6, WEIGHT_DECAY),
        ["lr"],
    ),
    Row(
        "IF CG (Hessian)",
        "ours",
        ours(influence("hessian", ConjugateGradient(preconditioner=EKFAC()), **CONVEX, self_influence="ekfac")),
        networks=["lr"],
        **SOLVED,
    ),
    Row(
        "IF CG (Hessian)",
        "dattri",
        partial(dattri.influence("CG", 60), regularization=WEIGHT_DECAY),
        over("max_iter", 10, 20, 40),  # it does not stop: past convergence it divides 0 by 0
        ["lr"],
        **SOLVED,
    ),
    Row(
        "IF CG",
        "ours",
        ours(influence("ggn", ConjugateGradient(tolerance=1e-2, max_iterations=15), self_influence="ekfac")),
        STRONG,
        ["mlp"],
        **SOLVED,
    ),
    Row(
        "IF CG",
        "dattri",
        partial(dattri.influence("CG", 60), max_iter=10),
        over("regularization", *ABSOLUTE),
        ["mlp"],
        **SOLVED,
    ),
    Row(
        "IF LiSSA",
        "ours",
        ours(influence("ggn", LiSSA(iterations=200, batch_size=64), self_influence="ekfac")),
        RELATIVE,
        SMALL,
        **SOLVED,
    ),
    Row(
        "IF LiSSA",
        "dattri",
        partial(dattri.influence("LiSSA", 60), batch_size=64, recursion_depth=200),
        [{"scaling": s, "damping": d} for s in (10.0, 50.0) for d in (0.0, 0.001, 0.01)],
        SMALL,
        **SOLVED,
    ),
    Row("IF Arnoldi", "ours", ours(influence("ggn", Arnoldi())), RELATIVE, SMALL),
    Row(
        "IF Arnoldi",
        "dattri",
        partial(dattri.influence("Arnoldi"), proj_dim=100, max_iter=200),
        over("regularization", 0.0, *ABSOLUTE),
        SMALL,
    ),
    Row(
        "IF Arnoldi",
        "captum",
        partial(peers.captum_influence("arnoldi"), projection_dim=100),
        over("hessian_reg", 1e-3, 1e-2),
        SMALL,
    ),
    Row("DataInf", "ours", ours(influence(None, "datainf", self_influence="ekfac")), RELATIVE, **SOLVED),
    Row("DataInf", "dattri", dattri.influence("DataInf", 24), over("regularization", *ABSOLUTE), **SOLVED),
    Row("K-FAC", "ours", ours(influence("ggn", "kfac")), RELATIVE),
    Row("K-FAC", "kronfluence", peers.kronfluence("kfac"), over("damping", None, *ABSOLUTE)),
    Row("EK-FAC", "ours", ours(influence("ggn", "ekfac")), RELATIVE),
    Row("EK-FAC", "kronfluence", peers.kronfluence("ekfac"), over("damping", None, *ABSOLUTE)),
    Row("EK-FAC", "dattri", dattri.ekfac, over("damping", *ABSOLUTE)),
    Row("EK-FAC, one run", "ours", ours(influence("ggn", "ekfac", snapshots="all"), RUN), RELATIVE),
    Row("LoGra", "ours", ours(LoGra), RELATIVE),
    Row("LoGra, linear layers", "ours", ours(on_linear_layers(KroneckerProjector(1024))), RELATIVE, ["cnn"]),
    Row("LoGra", "dattri", dattri.blocks("LoGra"), over("damping", *ABSOLUTE, 0.3, 1.0)),
    Row("FactGraSS", "ours", ours(FactGraSS), RELATIVE),
    Row(
        "FactGraSS, linear layers",
        "ours",
        ours(on_linear_layers(FactGraSSProjector(1024, per_layer=True))),
        RELATIVE,
        ["cnn"],
    ),
    Row("FactGraSS", "dattri", dattri.blocks("FactGraSS"), over("damping", *ABSOLUTE, 0.3, 1.0)),
    # Gradient similarity
    Row("GradDot", "ours", ours(partial(GradDot, exact=True))),
    Row("GradDot", "dattri", partial(dattri.tracin, snapshots=False)),
    Row("GradCos", "ours", ours(partial(GradCos, exact=True))),
    Row("GradCos", "dattri", partial(dattri.tracin, snapshots=False, normalized=True)),
    Row("TracIn, one run", "ours", ours(partial(TracIn, exact=True), RUN)),
    Row("TracIn, one run", "dattri", partial(dattri.tracin, snapshots=True)),
    Row("TracIn, one run", "captum", partial(peers.captum_tracin, fast=False)),
    Row("TracIn, one run, projected", "ours", ours(TracIn, RUN)),
    Row("TracIn, one run, last layer", "captum", partial(peers.captum_tracin, fast=True)),
    Row("GAS, one run", "ours", ours(partial(GAS, exact=True), RUN)),
    Row("GAS, one run", "dattri", partial(dattri.tracin, snapshots=True, normalized=True)),
    # Representations; the self-influence of a similarity says nothing of labels
    Row("RPS", "ours", ours(RPS), over("l2", 3e-4, 3e-3, 3e-2)),
    Row("RPS", "dattri", dattri.rps, over("l2", 3e-4, 3e-3, 3e-2)),
    Row("Similarity, dot", "ours", ours(RepresentationSimilarity), own=False),
    Row("Similarity, cosine", "ours", ours(partial(RepresentationSimilarity, similarity="cosine")), own=False),
    Row("Similarity, cosine", "captum", partial(peers.captum_similarity, similarity="cos"), networks=DEEP, own=False),
    Row("Similarity, distance", "ours", ours(partial(RepresentationSimilarity, similarity="l2")), own=False),
    Row("Similarity, distance", "captum", partial(peers.captum_similarity, similarity="l2"), networks=DEEP, own=False),
    Row("KNN-Shapley", "ours", ours(KNNShapley)),
    Row("KNN-Shapley", "dattri", partial(dattri.knn_shapley, neighbors=10), own=False),  # loops in Python: minutes
    # Models retrained on other subsets
    Row("Empirical influence", "ours", fitted(EmpiricalInfluence), own=False, fitted=True),
    Row("Datamodel, lasso", "ours", fitted(Datamodel), own=False, fitted=True),
    Row("Datamodel, ridge", "ours", fitted(partial(Datamodel, penalty="ridge")), own=False, fitted=True),
]
