"""Wrong calls with the error inside: nested values, numpy's scalars, classes for objects, and what surrounds a call."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from truths import truth_of
from wrong_calls import NAN, SCORES, Data, N, WrongCall, calls, saved

from cases import BlobClassifier, blobs, loader_of, quiet_trainer
from lightning_attr import AttributionResult, ScoreMatrix, attribute, evaluation, func, methods, metrics, testing
from lightning_attr import outputs as model_outputs
from lightning_attr import projectors as p
from lightning_attr.callbacks import AttributionCallback, AttributionMonitor
from lightning_attr.interop import dattri_task
from lightning_attr.modalities import trajectories
from lightning_attr.pilots import Pilots
from lightning_attr.report import AudioRenderer, ImageRenderer, TabularRenderer, TextRenderer, highlights
from lightning_attr.results import TopScores

__all__ = ["nested_wrong_calls"]

NUMBER = (np.float64(2.5), np.bool_(True), torch.tensor([2, 3]), complex(1), b"2", "two", {})
"""No whole number, each in its own way."""
REAL = (np.float32("inf"), np.bool_(True), torch.tensor([0.5, 0.5]), complex(1), b"2", "half", {})
STRING = (b"loss", None, 0, ["loss"], "LOSS ", str)
WORDS = (np.array(["a", "b"]), ["a"], {"a": 1}, b"ab")
LONG = torch.arange(N)


def nested_wrong_calls() -> Iterator[WrongCall]:
    """Go through all of them."""
    yield from _of_methods()
    yield from _of_projectors_and_outputs()
    yield from _of_results()
    yield from _of_metrics()
    yield from _of_evaluation()
    yield from _of_callbacks()
    yield from _of_reports()
    yield from _of_attribute()


def _of_methods() -> Iterator[WrongCall]:
    m = methods
    yield from calls(m.TRAK, {"proj_dim": NUMBER[:-1], "kernel": STRING, "directions": (0, "two", np.float64(2))})
    yield from calls(m.TRAK, {"sampling": ("yes", 0, []), "truth": (truth_of, truth_of(SCORES).masks)})
    yield from calls(m.TRAK, {"truth": (SCORES, "truth")}, damping="auto")
    yield from calls(m.TracIn, {"weights": ([[0.1]], [None], (NAN, 1.0), {1: 0.1}, torch.ones(2, 2), iter([0.1]))})
    yield from calls(m.TracIn, {"normalize": (2, "Layer", [True]), "preconditioner": ("Adam", True, torch.optim.Adam)})
    yield from calls(m.GradDot, {"projector": (p, [p.IdentityProjector()], p.Projector)})
    yield from calls(m.Influence, {"solver": ([m.EKFAC()], torch.linalg.solve, "EKFAC ", None)})
    yield from calls(m.Influence, {"damping": (REAL[0], *REAL[2:], [0.1, 0.2]), "weight_decay": REAL})
    yield from calls(m.ConjugateGradient, {"tolerance": REAL, "preconditioner": ({}, True, 0)})
    yield from calls(m.LiSSA, {"scale": REAL, "iterations": NUMBER})
    yield from calls(m.KNNShapley, {"k": NUMBER, "layer": (nn.Linear(2, 2), b"head", ("a",))})
    yield from calls(m.RPS, {"l2": REAL, "layer": (nn.Linear, True)})
    yield from calls(m.DropoutEnsemble, {"method": (m, [m.TRAK()], m.EKFAC()), "masks": NUMBER[:5]})
    yield from calls(
        m.SoftThreshold,
        {"method": (None, m.EKFAC()), "threshold": REAL},
        method=m.TRAK(),
        threshold=0.1,
    )
    one, two = truth_of(SCORES).masks, truth_of(SCORES).outputs
    wrong = ((one,), (two, one, two), [one, "outputs"], (one, two[:, :3]), (one, two * NAN), {"masks": one})
    yield from calls(m.EmpiricalInfluence, {"truth": wrong})
    yield from calls(m.Datamodel, {"truth": wrong, "strength": REAL}, truth=(one, two))
    yield from calls(m.soft_threshold, {"threshold": ("auto", [0.1], torch.ones(2, 2))}, scores=ScoreMatrix(SCORES))


def _of_projectors_and_outputs() -> Iterator[WrongCall]:
    for projector in (p.KroneckerProjector, p.GaussianProjector, p.EigenProjector, p.FactoredSJLTProjector):
        yield from calls(projector, {"proj_dim": NUMBER[:3], "seed": (np.float64(1.0), torch.tensor(1.5))})
    yield from calls(p.EigenProjector, {"samples": (0, *NUMBER)})
    yield from calls(
        p.LayerSubset,
        {"layers": ("head", b"head", [""], [None], {}, [["head"]], nn.Linear), "projector": (None, [])},
        projector=p.IdentityProjector(),
        layers=["head"],
    )
    o = model_outputs
    yield from calls(o.MulticlassMargin, {"temperature": REAL})
    yield from calls(o.Regression, {"variance": (*REAL, -1)})
    yield from calls(o.LanguageModel, {"kind": STRING, "shift": ("left", None), "ignore_index": (None, [0], True)})
    yield from calls(o.PixelMargin, {"ignore_index": (None, [255], True, NAN)})
    logits, labels = torch.zeros(3, 2), torch.tensor([0, 1, 0])
    yield from calls(
        testing.check_model_output,
        {"model_output": (o.MulticlassMargin, "margin", None), "dtype": ("float64", 64)},
        model_output=o.MulticlassMargin(),
        outputs=logits,
        targets=labels,
    )


def _of_results() -> Iterator[WrongCall]:
    scores, result = saved()
    own = torch.rand(N)
    yield from calls(
        ScoreMatrix,
        {
            "values": (SCORES[0], SCORES.tolist(), SCORES.to(torch.complex64), SCORES.bool(), SCORES[..., None]),
            "train_indices": (torch.rand(N), LONG[:2], "all"),
            "target_indices": (torch.rand(3), [0, 1, 2], LONG),
            "provenance": ("TRAK", [1]),
            "trained_on": (LONG, [True], torch.ones(2, dtype=torch.bool)),
        },
        values=SCORES,
    )
    yield from calls(
        AttributionResult,
        {
            "scores": (SCORES, None, "scores", ScoreMatrix),
            "self_influence": (own[:3], own.tolist(), None, own[:, None]),
            "loss": (own[:3], "loss"),
            "labels": (LONG[:2], "labels"),
            "noise_mask": (LONG, own, [True]),
        },
        scores=scores,
        self_influence=own,
        loss=own,
    )
    yield from calls(scores.topk, {"k": NUMBER})
    yield from calls(scores.bottomk, {"k": NUMBER[:3]})
    yield from calls(result.select, {"fraction": REAL, "per_class": ("yes", 1, None), "by": STRING}, fraction=0.5)
    folder = Path(tempfile.gettempdir()) / "lightning_attr-never"
    for load in (AttributionResult.load, ScoreMatrix.load, TopScores.load):
        yield from calls(load, {"path": (b"x", ["x"], "", 1.5)})
    for save in (result.save, scores.save):
        yield from calls(save, {"path": (b"x", ["x"], "", folder.name.split)})
    images = torch.rand(N, 4, 4)
    yield from calls(
        result.plot_proponents,
        {"targets": ("all", [1.5], [N], [[0]]), "k": NUMBER[:3], "width": ("wide", 0, NAN)},
        train_images=images,
        target_images=images[:3],
        targets=[0],
    )


def _of_metrics() -> Iterator[WrongCall]:
    x, own, mask = metrics, torch.rand(N), LONG < 4
    odd = (own.numpy(), own.to(torch.complex64), own[None], iter(own), torch.Tensor)
    for metric in (x.noisy_label_auroc, x.noisy_label_precision_curve, x.noisy_label_recall_area):
        yield from calls(
            metric, {"self_influence": odd, "noise_mask": (mask.float() * NAN, [mask], mask[None], b"")},
            self_influence=own, noise_mask=mask,
        )  # fmt: skip
    for metric in (x.NoisyLabelPrecision, x.NoisyLabelRecall):
        yield from calls(metric, {"fraction": REAL})
    for metric in (x.LinearDatamodelingScore, x.QueryLossDifference):
        yield from calls(metric, {"bootstrap": NUMBER, "confidence": REAL, "seed": (np.float64(1), b"1", [0])})
    truth = truth_of(SCORES)
    yield from calls(
        x.linear_datamodeling_score,
        {
            "scores": (SCORES.T, SCORES.numpy(), SCORES.to(torch.complex64)),
            "masks": (truth.masks.float() * 0.5, truth.masks[:, :3], truth.masks.numpy()),
            "outputs": (truth.outputs[:, :3], truth.outputs.numpy(), truth.outputs.to(torch.complex64)),
        },
        scores=SCORES,
        masks=truth.masks,
        outputs=truth.outputs,
    )
    for rank in (x.spearman, x.kendall):
        yield from calls(rank, {"a": (own.numpy(), own.to(torch.complex64)), "b": (own[:3], "b")}, a=own, b=own)
    yield from calls(x.plot_samples, {"samples": ([3], ["a"], [(torch.rand(4, 4), 3)], {}), "columns": NUMBER[:3]},
                     samples=[(torch.rand(4, 4), "a")])  # fmt: skip
    yield from calls(x.plot_image_grid, {"rows": ([3], [[3]], [], [["a"]], [[("a", 3)]])})
    curves = (x.plot_brittleness_curve, x.plot_selection_curve)
    for plot in curves:
        yield from calls(plot, {"curve": (None, "curve", SCORES)})
    for plot in (x.plot_datamodeling_score, x.plot_leave_one_out_correlation, x.plot_retrieval):
        yield from calls(plot, {"score": (None, 0.5, SCORES)})
    yield from calls(x.plot_output_change, {"change": (None, SCORES)})
    yield from calls(x.plot_rank_agreement, {"agreement": (None, SCORES)})
    yield from calls(x.plot_datamodeling_score_against_cost, {"rows": ([], {}, {"a": 1}, {"a": (1, 2)}, "rows")})


def _of_evaluation() -> Iterator[WrongCall]:
    e, truth, (scores, result) = evaluation, truth_of(SCORES), saved()
    yield from calls(
        e.evaluate,
        {
            "result": (None, [result], AttributionResult, truth),
            "ground_truth": (None, [truth], result),
            "bootstrap": NUMBER,
        },
        result=result,
        ground_truth=truth,
    )
    yield from calls(
        e.proponent_sets,
        {"targets": ([0, 0.5], [True], torch.rand(2), "0"), "counts": ([0.5], [True], [0], [N + 1], np.array(["a"]))},
        scores=scores,
        targets=[0],
        counts=[1],
    )
    yield from calls(e.GroundTruth.open, {"dirpath": (b"x", "", ["x"], None)})
    right = {
        "module": BlobClassifier,
        "trainer": functools.partial(quiet_trainer, max_epochs=1),
        "datamodule": Data,
        "dirpath": "never",
    }
    wrong: dict[str, tuple[Any, ...]] = {
        "module": ([BlobClassifier], None, nn.Linear(2, 2)),
        "trainer": (None, "auto", {}),
        "datamodule": (3, "data", [blobs(8)]),
        "dirpath": (b"x", "", ["x"]),
        "seeds": (*NUMBER, NAN),
        "num_subsets": NUMBER,
        "alpha": REAL,
    }
    yield from calls(e.retrain_lds, wrong, **right)
    sets = ([[0.5]], [[True]], [["0"]], [[N]], [[-1 - N]], [None], [[0, 0]], torch.rand(2, 2), "all", {})
    yield from calls(e.retrain_without, {"index_sets": sets}, index_sets=[[0]], **right)
    yield from calls(e.retrain_loo, {"indices": ([0.5], [True], ["0"], [0, 0], torch.rand(2), {}, "all")}, **right)
    yield from calls(Pilots, {"count": NUMBER, "module": (3, "net"), "trainer": (3, "auto"), "epochs": NUMBER}, count=1)


def _of_callbacks() -> Iterator[WrongCall]:
    yield from calls(
        AttributionCallback,
        {
            "dirpath": (b"x", ["x"], 1.5),
            "method": ([methods.TRAK()], methods, p.IdentityProjector()),
            "snapshots": (["all"], [None], [[0]], np.array([0.5]), "Geometric ", NAN, (1, "2")),
            "noise_mask": ([[True]], torch.rand(3), {"a": True}, b""),
            "batch_size": NUMBER,
            "memory_budget": NUMBER,
            "mode": (True, b"eval", "Eval "),
            "on_error": (True, Warning, b"warn"),
            "feature_dtype": (16, np.float16, None),
            "optimizer_state": (None, "adam", np.int64(1)),
        },
    )
    yield from calls(AttributionMonitor, {"k": NUMBER[:5], "figure": ("png", None, 2)})


class Noisy(nn.Linear):
    """Looks like a diffusion model."""

    scheduler = None

    def __init__(self) -> None:
        super().__init__(1, 1)


def _of_reports() -> Iterator[WrongCall]:
    _, result = saved()
    where = Path(tempfile.gettempdir()) / "lightning_attr-never.html"
    yield from calls(
        result.report,
        {
            "path": (3, None, b"x", ""),
            "k": (0, *NUMBER),
            "renderer": ("image", ImageRenderer, 3),
            "classes": (3, "names", {"a": "b"}),
            "title": (3, None),
            "train": (blobs(3), 3, iter([])),
            "targets": (blobs(1), 3),
        },
        path=where,
        train=blobs(N),
        targets=blobs(3),
    )
    yield from calls(AudioRenderer, {"sample_rate": (0, *NUMBER), "seconds": (0, *REAL)}, sample_rate=8000)
    yield from calls(ImageRenderer, {"size": (0, *NUMBER)})
    yield from calls(TextRenderer, {"width": (0, *NUMBER)})
    yield from calls(TabularRenderer, {"names": (3, "ab", [1]), "most": (0, *NUMBER)})
    yield from calls(
        highlights.HighlightedText,
        {"tokens": (3, "ab", [1]), "contributions": ([0.1, 0.2], ["a"], [None]), "caption": (3,), "score": ("high",)},
        tokens=["a"],
        contributions=[1.0],
    )
    yield from calls(
        trajectories.sample_trajectory,
        {"module": ("net", None, nn.Linear), "shape": (3, "abc", [1.5], [0, 4], [True]), "conditioning": (3, ["a"])},
        module=Noisy(),
        shape=(1, 4, 4),
        count=1,
    )
    yield from calls(dattri_task, {"store": (3, None, b"x"), "train": STRING}, store=where, module=BlobClassifier())


def _of_attribute() -> Iterator[WrongCall]:
    right = {"trainer": quiet_trainer(), "datamodule": Data(), "model": BlobClassifier()}
    loaders = {
        "train_dataloaders": (iter(loader_of(blobs(8))), 3, "train", DataLoader, blobs(8), []),
        "target_dataloaders": (3, "test", DataLoader, blobs(8), (row for row in [])),
    }
    right_loaders = {**right, "datamodule": None, "train_dataloaders": loader_of(blobs(N))}
    yield from calls(attribute, loaders, **{**right_loaders, "target_dataloaders": loader_of(blobs(3))})
    yield from calls(
        attribute,
        {
            "model": (None, [BlobClassifier()]),
            "datamodule": ([Data()], {"train": Data()}),
            "method": ([methods.TRAK()], methods.EKFAC(), p.IdentityProjector(), "TRAK", methods),
            "targets": (None, 0, ["test"], "train "),
            "ckpt_path": (3, b"x", [3], [], "", ["a", None], {}),
            "store": (b"x", [], 1.5),
            "topk": NUMBER,
            "memory_budget": NUMBER,
            "mode": (True, "Train ", b"train"),
            "pilots": (-1, "two", 2.5, [Pilots(1)], Pilots, True),
            "target_function": ([len], "f", 3),
            "noise_mask": ([[True] * N], torch.rand(N), {}, LONG),
        },
        **right,
    )
    at = (torch.ones(2),)
    yield from calls(func.hvp, {"argnums": ((0, 1), np.float64(0), b"0"), "damping": REAL}, func=torch.sum)
    yield from calls(func.ihvp_explicit, {"argnums": (-1, None), "damping": REAL}, func=torch.sum)
    yield from calls(func.group_influence, {"in_dims": ("a", [0.5], 3.5)}, func=lambda x: x.sum())
    yield from calls(func.hvp_at_x, {"x": (torch.Tensor, [1.0], [], (["a"],))}, func=torch.sum, x=at)
