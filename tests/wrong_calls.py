"""Wrong calls of everything public: what each must say, and how many do not."""

# tables
from __future__ import annotations

import functools
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn
from truths import truth_of

from cases import BlobClassifier, blobs, loader_of, quiet_trainer
from lightning_attr import AttributionResult, FeatureStore, ScoreMatrix, attribute, evaluation, func, methods, metrics
from lightning_attr import outputs as model_outputs
from lightning_attr import projectors as p
from lightning_attr.callbacks import AttributionCallback, AttributionMonitor
from lightning_attr.errors import AttributionError
from lightning_attr.store.manifest import Fingerprint

INF, NAN = float("inf"), float("nan")
N, M = 40, 3
SCORES = torch.linspace(-1, 1, N * M).reshape(N, M).sin()
MASK = torch.arange(N) < 4


class Data(L.LightningDataModule):
    """Points, as training data and as targets."""

    def train_dataloader(self) -> Any:
        return loader_of(blobs(N))

    def predict_dataloader(self) -> Any:
        return loader_of(blobs(5, seed=1))


@dataclass(frozen=True)
class WrongCall:
    """One argument of one call that cannot be right."""

    owner: str
    argument: str
    value: Any
    call: Callable[[], Any]

    def __str__(self) -> str:
        shown = self.value.__name__ if isinstance(self.value, type) else repr(self.value)
        shown = "tensor" if isinstance(self.value, torch.Tensor) else shown.split(" at 0x")[0]
        return f"{self.owner}({self.argument}={' '.join(shown.split())[:30]})"

    def verdict(self) -> tuple[str, str]:
        """Give "named", "raw" or "accepted", and the message."""
        try:
            self.call()
        except Exception as error:
            place = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
            ours = "lightning_attr" in place.parts or place.parent.name == "callbacks"
            told = isinstance(error, (TypeError, ValueError, AttributionError)) and f"`{self.argument}" in str(error)
            return "named" if ours and told else "raw", f"{type(error).__name__}: {error} ({place.name})"
        return "accepted", ""


def counts() -> dict[str, int]:
    """Count the wrong calls that were tried, named, raw and accepted."""
    found = [call.verdict()[0] for call in wrong_calls()]
    return {"tried": len(found), **{verdict: found.count(verdict) for verdict in ("named", "raw", "accepted")}}


# What is wrong, by the kind of argument ----------------------------------------------------------------------------

COUNT = (0, -3, 2.5, "5", True)
FLAG = ("no", 1, None)
SEED = ("a", 1.5, -1, True)
DAMPING = (INF, NAN, -1.0, "best", True)
NAME = ("nonsense", 3, ["last"])
METHOD = (methods.TRAK, "TRAK", 1.0)
PROJECTOR = (p.KroneckerProjector, "kronecker", 512)
TRUTH = ("truth", 3)
TENSOR = ("scores", 1.0, None)
LAYER = (3, ["head"])


def wrong_calls() -> list[WrongCall]:
    """All of them, the same in every process: their names are those of tests."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [*_wrong_calls()]


def _wrong_calls() -> Iterator[WrongCall]:
    yield from _of_classes()
    yield from _of_functions()
    yield from _of_attribute()
    from wrong_calls_more import more_wrong_calls  # which is made of the same parts

    yield from more_wrong_calls()
    from wrong_calls_nested import nested_wrong_calls

    yield from nested_wrong_calls()


def calls(target: Callable[..., Any], wrong: dict[str, tuple[Any, ...]], **right: Any) -> Iterator[WrongCall]:
    owner = getattr(target, "__name__", None) or type(target).__name__
    for argument, values in wrong.items():
        for value in values:
            yield WrongCall(owner, argument, value, functools.partial(target, **{**right, argument: value}))


def _of_classes() -> Iterator[WrongCall]:
    m = methods
    snapshots = {"snapshots": NAME}
    flags = ("newton_weights", "per_layer", "loo_correction", "balanced", "exact")
    yield from calls(
        m.TRAK,
        {"proj_dim": COUNT, "projector": PROJECTOR, "damping": DAMPING, "seed": SEED, **dict.fromkeys(flags, FLAG)},
    )
    yield from calls(m.TRAK, {"truth": TRUTH}, damping="auto")
    yield from calls(
        m.ProjectedInfluence, {"curvature": NAME, "relative": ("rank", 1), "projector": PROJECTOR, **snapshots}
    )
    yield from calls(
        m.TrackStar,
        {"projector": PROJECTOR, "mixing": (-0.1, 1.1, NAN, "a"), "damping": (-1.0, "auto", NAN), "per_layer": FLAG},
    )
    yield from calls(m.TrackStar, {"preconditioner": ("sgd", 1), **snapshots})
    yield from calls(m.LoGra, {"proj_dim": COUNT, "seed": SEED, "damping": DAMPING})
    yield from calls(m.FactGraSS, {"mask_factor": COUNT})
    yield from calls(
        m.TracIn,
        {"weights": ("adam", 1.0, [NAN]), "preconditioner": ("sgd", 1), "normalize": ("row", 1), "exact": FLAG},
    )
    yield from calls(m.GradDot, {"projector": PROJECTOR, "exact": FLAG})
    yield from calls(m.GradCos, {"projector": PROJECTOR})
    yield from calls(m.GAS, {"layerwise": FLAG})
    yield from calls(m.LESS, {"projector": PROJECTOR})
    yield from calls(m.MAGIC, {"tolerance": (-1.0, NAN, "a"), "probe": FLAG, "self_influence": FLAG})
    yield from calls(m.TrajectoryInfluence, {"hessian": NAME, "self_influence": FLAG})
    yield from calls(
        m.Influence,
        {
            "curvature": NAME,
            "solver": ("lu", m.EKFAC, 3),
            "damping": DAMPING,
            "weight_decay": (-1.0, INF, "a"),
            "relative": ("all", 1),
            "seed": SEED,
            "self_influence": NAME,
            **snapshots,
        },
    )
    yield from calls(
        m.SOURCE,
        {
            "segments": (0, 1.5, "two", [], [1.0], [0.5, 0.5]),
            "solver": ("cg", m.EKFAC, 3),
            "curvature": NAME,
            "optimizer": NAME,
            "momentum": (1.0, -0.1, NAN, "a"),
            "weight_decay": (-1.0, INF, "a"),
            "seed": SEED,
        },
    )
    yield from calls(
        m.ProjectedSOURCE,
        {"projector": PROJECTOR, "curvature": NAME, "optimizer": NAME, "momentum": (1.0, NAN, "a"), "per_layer": FLAG},
    )
    yield from calls(m.ProjectedSOURCE, {"weight_decay": (-1.0, INF, "a")})
    yield from calls(m.EKFAC, {"labels": NAME})
    yield from calls(
        m.ConjugateGradient,
        {"max_iterations": COUNT, "tolerance": (-1.0, NAN, "a"), "preconditioner": ("ekfac", m.EKFAC)},
    )
    yield from calls(m.LiSSA, {"scale": (0.0, NAN, "a"), "iterations": COUNT, "batch_size": COUNT, "repeats": COUNT})
    yield from calls(
        m.Astra, {"refinement": NAME, "steps": COUNT, "batch_size": COUNT, "learning_rate": (0.0, NAN, "a")}
    )
    yield from calls(m.Astra, {"momentum": (1.0, -0.1, "a"), "preconditioner": ("ekfac", m.EKFAC, m.Explicit())})
    yield from calls(m.Explicit, {"max_parameters": COUNT})
    yield from calls(m.Arnoldi, {"iterations": COUNT, "rank": COUNT})
    yield from calls(m.KNNShapley, {"k": COUNT, "layer": LAYER, **snapshots})
    yield from calls(m.RPS, {"l2": (0.0, INF, "a"), "layer": LAYER, "target_class": NAME, "normalize": FLAG})
    yield from calls(m.RepresentationSimilarity, {"layer": LAYER, "similarity": NAME, "tokens": NAME})
    yield from calls(
        m.DropoutEnsemble,
        {"method": METHOD, "masks": COUNT, "rate": (1.0, -0.1, "a"), "seed": SEED, "forward_only": FLAG},
    )
    yield from calls(m.SoftThreshold, {"method": METHOD, "threshold": (-1.0, NAN, "a")}, method=m.TRAK(), threshold=0.1)
    yield from calls(m.SoftThreshold, {"keep": COUNT, "truth": TRUTH}, method=m.TRAK())
    yield from calls(m.EmpiricalInfluence, {"truth": ("truth", 3, (1.0, 2.0))})
    pair = (truth_of(SCORES).masks, truth_of(SCORES).outputs)
    yield from calls(m.Datamodel, {"penalty": NAME, "strength": (0.0, NAN, "best")}, truth=pair)
    for projector in (p.KroneckerProjector, p.RademacherProjector, p.SJLTProjector, p.GraSSProjector):
        yield from calls(projector, {"proj_dim": (1.5, 0), "seed": ("a",)})
    yield from calls(p.RademacherProjector, {"cache_bytes": (-1, "1GB")})
    yield from calls(p.SJLTProjector, {"nonzeros": COUNT, "cache_bytes": (1.5,)})
    yield from calls(p.FactoredSJLTProjector, {"side": COUNT})
    yield from calls(p.FactGraSSProjector, {"mask_factor": COUNT, "per_layer": FLAG})
    yield from calls(
        p.LayerSubset,
        {"projector": PROJECTOR, "layers": ("head", [], [3], 3)},
        projector=p.IdentityProjector(),
        layers=["a"],
    )
    o = model_outputs
    yield from calls(o.MulticlassMargin, {"temperature": (0.0, INF, "a")})
    yield from calls(o.Regression, {"variance": (0.0, NAN, "a")})
    yield from calls(o.NegativeLoss, {"loss_fn": ("mse", None)})
    yield from calls(o.LanguageModel, {"kind": NAME, "positions": NAME, "shift": FLAG, "ignore_index": ("pad", 1.5)})
    yield from calls(o.PixelMargin, {"ignore_index": ("pad",)})
    yield from calls(o.ContrastiveMargin, {"halved": FLAG})
    yield from calls(
        AttributionCallback,
        {
            "dirpath": (3, ""),
            "method": METHOD,
            "snapshots": ("often", 0, [0.5], {}),
            "featurize": ("no", 1),
            "log": FLAG,
            "noise_mask": ("mask", ["a"]),
            "batch_size": COUNT,
            "feature_dtype": ("half", torch.float16),
            "memory_budget": ("1GB", 0, 1.5),
            "optimizer_state": FLAG,
            "on_error": NAME,
            "mode": NAME,
        },
    )
    yield from calls(AttributionMonitor, {"k": COUNT, "figure": FLAG})


def saved() -> tuple[ScoreMatrix, AttributionResult]:
    """Scores, and a result with them."""
    scores = ScoreMatrix(SCORES)
    return scores, AttributionResult(scores, torch.rand(N), torch.rand(N))


def _of_functions() -> Iterator[WrongCall]:
    scores, result = saved()
    for extreme in (scores.topk, scores.bottomk):
        yield from calls(extreme, {"k": (*COUNT, N + 1)})
    yield from calls(ScoreMatrix, {"values": TENSOR, "train_indices": ([1, 2], torch.arange(3))}, values=SCORES)
    yield from calls(
        result.select, {"fraction": (0, 1.5, NAN, "a"), "by": NAME, "per_class": FLAG, "objective": NAME}, fraction=0.5
    )
    yield from calls(result.plot, {"kind": NAME})
    for write in (result.save, scores.save, AttributionResult.load, ScoreMatrix.load):
        yield from calls(write, {"path": (3, None)})
    print_ = Fingerprint(N, None, {"w": (2,)}, None)
    yield from calls(
        FeatureStore.create,
        {"path": (3,), "fingerprint": ("net",), "batch_size": COUNT, "feature_dtype": NAME},
        path=Path(tempfile.gettempdir()) / "lightning_attr-never",
        fingerprint=print_,
    )
    yield from calls(FeatureStore.open, {"path": (3,)})
    truth = truth_of(SCORES)
    trak = methods.TRAK()
    yield from calls(
        methods.choose_damping, {"method": METHOD, "grid": ([], [NAN], ["a"])}, method=trak, snapshots=[], truth=truth
    )
    yield from calls(methods.soft_threshold, {"scores": TENSOR, "threshold": (-1.0, "a")}, scores=scores, threshold=0.1)
    yield from _of_evaluation(scores, result)
    yield from _of_metrics()
    yield from _of_func()


def _of_evaluation(scores: ScoreMatrix, result: AttributionResult) -> Iterator[WrongCall]:
    e, truth = evaluation, truth_of(SCORES)
    yield from calls(
        e.evaluate,
        {
            "result": ("result", SCORES),
            "ground_truth": ("truth", e.GroundTruth),
            "bootstrap": (-1, 1.5, "a"),
            "confidence": (0, 1.0, "a"),
            "seed": SEED,
        },
        result=result,
        ground_truth=truth,
    )
    yield from calls(
        e.proponent_sets,
        {"scores": TENSOR, "targets": ([99], ["a"], 3), "counts": ([], [2, 1], ["a"], 3)},
        scores=scores,
        targets=[0],
        counts=[1],
    )
    yield from calls(
        e.brittleness, {"ground_truth": ("truth",), "counts": (["a"],)}, ground_truth=truth, targets=[0], counts=[1]
    )
    yield from calls(e.GroundTruth.open, {"dirpath": (3,)})
    shared = {
        "module": (BlobClassifier(), "net"),
        "trainer": (quiet_trainer(), 3),
        "datamodule": (loader_of(blobs(8)), blobs(8)),
        "dirpath": (3, None),
        "seeds": COUNT,
        "seed": SEED,
        "targets": NAME,
        "num_workers": COUNT,
        "vectorise": ("always", 1, None),
        "keep_checkpoints": FLAG,
        "progress": FLAG,
        "verbose": FLAG,
    }
    own: dict[Any, tuple[dict[str, Any], dict[str, Any]]] = {
        e.retrain_lds: ({**shared, "num_subsets": COUNT, "alpha": (0, 1.0, NAN, "a")}, {}),
        e.retrain_loo: ({"indices": ([], [99], ["a"], MASK, 3), "seeds": (0,)}, {"indices": [0]}),
        e.retrain_without: ({"index_sets": ([], [[]], [["a"]], 3, [3])}, {"index_sets": [[0]]}),
    }
    for retrain, (wrong, right) in own.items():
        right = {
            **right,
            "module": BlobClassifier,
            "trainer": functools.partial(quiet_trainer, max_epochs=1),
            "datamodule": Data,
            "dirpath": "never",
        }
        yield from calls(retrain, wrong, **right)


def _of_metrics() -> Iterator[WrongCall]:
    x, own, value, masks = metrics, torch.rand(N), torch.rand(N), truth_of(SCORES).masks
    outputs, changes = truth_of(SCORES).outputs, torch.rand(3, M)
    for metric in (x.noisy_label_auroc, x.noisy_label_recall, x.noisy_label_precision, x.noisy_label_recall_curve):
        yield from calls(
            metric,
            {"self_influence": (*TENSOR, SCORES), "noise_mask": ("mask", torch.arange(N), MASK[:3])},
            self_influence=own,
            noise_mask=MASK,
        )
    for metric in (x.noisy_label_recall, x.noisy_label_precision):
        yield from calls(metric, {"fraction": (0, 1.5, NAN, "a")}, self_influence=own, noise_mask=MASK)
    for metric in (x.share_harmful, x.share_helpful, x.effective_proponents):
        yield from calls(metric, {"scores": (*TENSOR, own)})
    yield from calls(
        x.overlap,
        {"self_influence": TENSOR, "data_value": TENSOR, "fraction": ("a",)},
        self_influence=own,
        data_value=value,
    )
    for rank in (x.spearman, x.kendall):
        yield from calls(rank, {"a": TENSOR, "b": TENSOR}, a=own, b=value)
    interval = {"bootstrap": (-1, 1.5, "a"), "confidence": (0, 1.0, "a"), "seed": SEED}
    yield from calls(
        x.linear_datamodeling_score,
        {"scores": TENSOR, "masks": TENSOR, "outputs": TENSOR, **interval},
        scores=SCORES,
        masks=masks,
        outputs=outputs,
    )
    yield from calls(
        x.leave_one_out_correlation,
        {"scores": TENSOR, "differences": TENSOR},
        scores=SCORES,
        differences=outputs[:, :N],
    )
    yield from calls(
        x.rank_agreement, {"first": TENSOR, "second": TENSOR, "k": (*COUNT, 99)}, first=SCORES, second=SCORES
    )
    yield from calls(
        x.recall_at_k,
        {"scores": TENSOR, "relevant": ("all", 3, [[0]]), "k": (*COUNT, 99)},
        scores=SCORES,
        relevant=SCORES > 0,
    )
    yield from calls(x.mean_reciprocal_rank, {"scores": TENSOR}, scores=SCORES, relevant=SCORES > 0)
    for change in (x.tail_patch, x.query_loss_difference):
        yield from calls(
            change, {"before": TENSOR, "method": TENSOR, "random": TENSOR}, before=own, method=value, random=own
        )
    yield from calls(
        x.data_selection_curve,
        {"fractions": TENSOR, "method": TENSOR, "kind": NAME},
        fractions=torch.tensor([0.2, 0.5, 1.0]),
        method=changes.T,
        random=changes.T,
    )
    yield from calls(
        x.brittleness_curve,
        {"counts": ("a", [0], 3), "before": TENSOR},
        counts=[1, 2, 3],
        before=torch.rand(M),
        method=changes,
    )
    for metric in (x.LinearDatamodelingScore, x.LeaveOneOutCorrelation, x.TailPatch, x.MeanReciprocalRank):
        yield from calls(metric, interval)
    for metric in (x.RecallAtK, x.RankAgreement):
        yield from calls(metric, {"k": COUNT})
    yield from calls(x.NoisyLabelRecall, {"fraction": (0, "a")})
    yield from calls(x.DataSelectionCurve, {"kind": NAME})
    yield from calls(x.BrittlenessCurve, {"counts": ([], "a", 3)})
    yield from calls(
        x.plot_image_grid, {"rows": ("a", 3), "opponents": (9, 1.5, "a")}, rows=[[(torch.rand(4, 4), "a")]]
    )
    yield from calls(x.plot_samples, {"samples": (3, []), "columns": COUNT}, samples=[(torch.rand(4, 4), "a")])
    yield from calls(x.plot_score_heatmap, {"scores": TENSOR, "max_cells": COUNT}, scores=SCORES)
    yield from calls(x.plot_self_influence, {"self_influence": TENSOR})


def _of_func() -> Iterator[WrongCall]:
    f, at = func, torch.ones(2)

    def square(x: torch.Tensor) -> torch.Tensor:
        return x.square().sum()

    damping, argnums = {"damping": (INF, NAN, -1.0, "a")}, {"argnums": ("a", 1.5, True)}
    for make in (f.hvp, f.ihvp_explicit, f.ihvp_cg, f.ihvp_arnoldi, f.ihvp_lissa, f.ifvp_explicit, f.ifvp_datainf):
        yield from calls(make, {"func": ("f", None), **damping, **argnums}, func=square)
    yield from calls(f.ihvp_cg, {"tolerance": (-1.0, "a"), "max_iterations": COUNT}, func=square)
    yield from calls(f.ihvp_arnoldi, {"iterations": COUNT, "top_k": COUNT, "seed": SEED}, func=square)
    yield from calls(
        f.ihvp_lissa,
        {"scale": (0.0, "a"), "iterations": COUNT, "batch_size": COUNT, "repeats": COUNT, "seed": SEED},
        func=square,
    )
    yield from calls(f.group_influence, {"func": ("f",), "order": COUNT, **damping}, func=square)
    yield from calls(f.hvp_at_x, {"x": (at, 3), "argnums": (5,)}, func=square, x=(at,))
    yield from calls(
        f.random_project,
        {"feature": ("a", None), "projector": PROJECTOR},
        feature=torch.ones(3, 4),
        projector=p.KroneckerProjector(2),
    )
    batch = [(torch.ones(4, 2), torch.tensor([0, 1, 1, 0]))]
    yield from calls(
        f.ekfac,
        {
            "module": ("net", nn.Linear),
            "loss": ("mse",),
            "batches": (3, []),
            "labels": NAME,
            "method": NAME,
            **damping,
            "weight_decay": (-1.0, "a"),
            "seed": SEED,
        },
        module=nn.Linear(2, 2),
        loss=model_outputs.MulticlassMargin(),
        batches=batch,
    )
    yield from calls(_entered, {"module": ("net",), "seed": SEED}, module=nn.Sequential(nn.Dropout()).eval(), seed=0)


def _entered(**arguments: Any) -> None:
    with func.dropout_ensemble(**arguments):
        pass


def _of_attribute() -> Iterator[WrongCall]:
    data = {"datamodule": Data(), "model": BlobClassifier()}
    yield from calls(attribute, {"candidates": COUNT}, trainer=quiet_trainer(), rerank=methods.GradDot(), **data)
    yield from calls(
        attribute,
        {
            "trainer": ("gpu", L.Trainer),
            "datamodule": (Data, loader_of(blobs(8)), blobs(8), BlobClassifier(), "data"),
            "model": (BlobClassifier, "net"),
            "targets": NAME,
            "method": METHOD,
            "store": (3,),
            "noise_mask": ("mask", ["a"], MASK[:3], torch.arange(N)),
            "topk": (*COUNT, N + 1),
            "memory_budget": ("1GB", 0, 1.5),
            "target_function": ("margin", 3),
            "rerank": METHOD,
        },
        trainer=quiet_trainer(),
        **data,
    )
