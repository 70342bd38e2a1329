"""The rows of the leaderboard that this package, counting words, and chance give; each `(N_TRAIN, queries)`.

Scores are of all queries, those to tune on first. Methods with a damping have a row for each of its values; the table
shows the one that the queries to tune on choose.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from leaderboard_text import EPOCHS, N_TRAIN, VOCABULARY, TextData, Writer, load
from torch import Tensor
from torch.nn import functional as F

from lightning_attr import AttributionTrainer, FeatureStore
from lightning_attr.callbacks import AttributionCallback
from lightning_attr.methods import (
    MAGIC,
    SOURCE,
    TRAK,
    Astra,
    AttributionMethod,
    GradCos,
    GradDot,
    Influence,
    TracIn,
    TrackStar,
    TrajectoryInfluence,
)
from lightning_attr.parameters.weights import load_weights

DAMPINGS = (0.01, 0.1, 1.0, 10.0)

Row = Callable[[Path], Tensor]
"""Takes the folder of the recorded run."""


def quiet_trainer(**options: Any) -> AttributionTrainer:
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return AttributionTrainer(accelerator="cpu", max_epochs=EPOCHS, **dict.fromkeys(off, False), **options)


def queries() -> Tensor:
    text = load()
    return torch.cat([text.tune, text.report])


def record(folder: Path, seed: int) -> None:
    """Train once with the callback."""
    L.seed_everything(seed, verbose=False)
    callback = AttributionCallback(folder, snapshots="start+geometric", featurize=False, optimizer_state=True)
    quiet_trainer(callbacks=[callback]).fit(Writer(seed), datamodule=TextData(seed, queries()))


def recorded(run: Path) -> Writer:
    """The model at the end of the recorded run."""
    module, store = Writer(0), FeatureStore.open(run)
    load_weights(module, store.weights(store.snapshots[-1].key))
    return module


def attributed(run: Path, method: AttributionMethod) -> Tensor:
    """Score by a method on the recorded run."""
    options = {"model": recorded(run), "store": run, "method": method}
    scores: Tensor = quiet_trainer().attribute(TextData(0, queries()), **options).scores.values
    return scores


# Without a model ------------------------------------------------------------------------------------------------------


def chance(run: Path) -> Tensor:
    text = load()
    return torch.randn(len(text.train), len(queries()), generator=torch.Generator().manual_seed(0))


def bm25(run: Path, saturation: float = 1.5) -> Tensor:
    r"""Okapi BM25 over tokens.

    :math:`\sum_w \log(1 + \frac{N - n_w + 1/2}{n_w + 1/2}) \, \frac{f_w (k + 1)}{f_w + k}` over the query's tokens.
    """
    counts, asked = (F.one_hot(tokens, VOCABULARY).sum(1).float() for tokens in (load().train, queries()))
    holding = (counts > 0).sum(0)
    rarity = (1 + (N_TRAIN - holding + 0.5) / (holding + 0.5)).log()
    found = rarity * counts * (saturation + 1) / (counts + saturation)  # all chunks have one length
    return found @ (asked > 0).float().T


def embeddings(run: Path) -> Tensor:
    """Cosines of the mean of the last layer's outputs."""
    network = recorded(run).network
    with torch.no_grad():
        train, asked = (
            F.normalize(network.transformer(tokens).last_hidden_state.mean(1), dim=1)
            for tokens in (load().train, queries())
        )
    return train @ asked.T


def damped(make: Callable[[float], AttributionMethod]) -> dict[float, Row]:
    return {damping: partial(attributed, method=make(damping)) for damping in DAMPINGS}


ROWS: dict[str, Row | dict[float, Row]] = {
    "random": chance,
    "BM25": bm25,
    "embedding similarity": embeddings,
    "GradDot": partial(attributed, method=GradDot(exact=True)),
    "GradCos": partial(attributed, method=GradCos(exact=True)),
    "TracIn": partial(attributed, method=TracIn(exact=True)),
    "TRAK()": partial(attributed, method=TRAK()),
    "TRAK(exact=True)": partial(attributed, method=TRAK(exact=True)),
    "TrackStar": partial(attributed, method=TrackStar()),
    "SOURCE": partial(attributed, method=SOURCE()),
    'SOURCE(optimizer="sgd")': partial(attributed, method=SOURCE(optimizer="sgd", momentum=0.0)),
    "Influence, EK-FAC": damped(lambda damping: Influence(damping=damping)),
    "Influence, EK-FAC, all snapshots": damped(lambda damping: Influence(damping=damping, snapshots="all")),
    "Influence, Astra": damped(lambda damping: Influence(solver=Astra(), damping=damping, self_influence="ekfac")),
    "TrajectoryInfluence": partial(attributed, method=TrajectoryInfluence()),
    'TrajectoryInfluence("gram")': partial(attributed, method=TrajectoryInfluence("gram")),
    "MAGIC": partial(attributed, method=MAGIC()),
}
