"""Further wrong calls: what surrounds a run, and values that look right at first sight."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from truths import truth_of
from wrong_calls import INF, NAN, SCORES, WrongCall, calls, saved

from lightning_attr import FeatureStore, methods, outputs, projectors
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.modalities import token_dataset as tokens
from lightning_attr.modalities import trajectories
from lightning_attr.report import highlights

ARRAY = np.array([1.0, 2.0])
BYTES = b"x"

__all__ = ["more_wrong_calls"]


def more_wrong_calls() -> Iterator[WrongCall]:
    """Go through all of them."""
    yield from _of_methods()
    yield from _of_results()
    yield from _of_sequences()


def _of_methods() -> Iterator[WrongCall]:
    m = methods
    for method in (m.TRAK, m.LoGra, m.FactGraSS, m.ProjectedInfluence, m.Influence):
        yield from calls(method, {"damping": (ARRAY, torch.ones(2), [1.0], np.float32("nan"), b"1")})
    for method in (m.TracIn, m.GAS):
        yield from calls(method, {"weights": ([], {}, BYTES, {"a": 1.0}, [True], ["a"], ARRAY * NAN)})
    yield from calls(outputs.NegativeLoss, {"loss_fn": (nn.CrossEntropyLoss, dict, "cross_entropy", 3)})
    yield from calls(AttributionCallback, {"snapshots": (BYTES, [True], [1.5], {}, NAN, -1, [-2], ["a"])})
    yield from calls(m.DropoutEnsemble, {"rate": (NAN, INF, True, [0.1], 1)}, method=m.TRAK())
    yield from calls(m.KNNShapley, {"k": (np.float64(3), ARRAY, None, torch.tensor(3.5))})
    yield from calls(projectors.KroneckerProjector, {"proj_dim": (None, [8], ARRAY, -8, "8"), "seed": (None, [1], NAN)})
    yield from calls(m.RPS, {"l2": (None, [0.1], ARRAY, True)})


def _of_results() -> Iterator[WrongCall]:
    scores, result = saved()
    yield from calls(scores.topk, {"k": (None, [3], ARRAY, "all", NAN)})
    yield from calls(result.select, {"fraction": (None, [0.5], True, INF, -0.1, ARRAY)})
    yield from calls(result.select, {"by": ("loss", None, ["loss"])}, fraction=0.5)
    texts = [f"sample {i}" for i in range(len(SCORES))]
    yield from calls(
        result.proponent_texts,
        {"k": (0, 2.5, "a"), "width": (0, "a", 2.5), "targets": (3, ["a"], [99], [1.5])},
        train_texts=texts,
        target_texts=texts,
        targets=[0],
    )
    yield from calls(FeatureStore.merge, {"stores": ([], 3)}, stores=[], path=_NEVER)
    truth = truth_of(SCORES)
    yield from calls(methods.EmpiricalInfluence, {"truth": (truth.masks, [truth.masks], "truth", None)})


def _of_sequences() -> Iterator[WrongCall]:
    yield from calls(
        tokens.LossTokens,
        {"dataset": (3, None), "shift": ("no", 1), "ignore_index": ("pad", 1.5, True), "decoder_start": ("a", 1.5)},
        dataset=[{"labels": [1, 2]}],
    )
    images = torch.rand(2, 1, 4, 4)
    yield from calls(trajectories.GeneratedSamples, {"clean": ("images", None)}, clean=images)
    yield from calls(
        trajectories.sample_trajectory,
        {"count": (0, 2.5, "a", True), "steps": (0, 2.5, "a"), "seed": (-1, "a", 1.5)},
        module=nn.Linear(1, 1),
        shape=(1, 4, 4),
        count=1,
    )
    yield from calls(highlights.HighlightedText, {"contributions": ("a", None)}, tokens=["a"], contributions=[1.0])
    yield from calls(highlights.TextHighlights, {"width": (0, "a", 2.5)}, blocks=[])


_NEVER: Any = Path(tempfile.gettempdir()) / "lightning_attr-never"
