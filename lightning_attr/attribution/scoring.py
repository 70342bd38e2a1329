"""Runs a method over all training rows and targets, a tile at a time, in bounded memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lightning_attr.attribution.ensemble import Ensemble
from lightning_attr.methods import AttributionMethod, ScoreBlock, SnapshotFeatures, TracIn
from lightning_attr.results.reranked_scores import CandidateScores
from lightning_attr.results.score_matrix import ScoreMatrix, zeros
from lightning_attr.results.top_scores import TopScores, TopScoresSum

log = logging.getLogger(__name__)

_TARGET_ELEMENTS = 2**28
"""Target features at once, over all snapshots: 1 GiB of float32."""
_MOST_TARGETS = 2**14
_TILE_ELEMENTS = 2**25
"""Scores of a tile, and training features of its rows over all snapshots: 128 MiB of float32 each."""


def score(
    method: AttributionMethod | Ensemble,
    snapshots: Sequence[SnapshotFeatures],
    n_train: int,
    topk: int | None = None,
    folder: Callable[[], Path] = Path.cwd,
    share: tuple[int, int] = (0, 1),
    trained_on: Tensor | None = None,
    slopes: Tensor | None = None,
    candidates: CandidateScores | None = None,
) -> tuple[ScoreMatrix | TopScores, Tensor]:
    """Score every training row for every target.

    Memory beside the result: a tile of scores, its training features at every snapshot, the target features of
    the tile, and what the method keeps of a snapshot.

    Shapes: trained_on (n_train,), slopes (m,). Returns the scores, of the candidates alone where there are any, and
    self-influence ``(n_train,)``, float32; the same in all processes.
    """
    if n_train == 0:
        raise ValueError("Expected at least one training sample to score, but the store has no rows.")
    _tell_of_undrawn_rows(method, snapshots, trained_on)
    m = len(snapshots[0].targets["features"])
    k = max(snapshot.numel for snapshot in snapshots)
    reduce = snapshots[0].reduce
    if topk is not None and trained_on is not None:
        topk = min(topk, int(trained_on.sum()))
    found = TopScoresSum(n_train, m, topk, slopes) if topk is not None else None
    values = zeros(n_train, m if found is None and candidates is None else 0, folder)
    self_influence = torch.zeros(n_train)
    ensemble = method if isinstance(method, Ensemble) else Ensemble(method)
    most = min(_MOST_TARGETS, ensemble.most_targets(n_train))
    width = max(1, min(m, most, _TARGET_ELEMENTS // max(1, len(snapshots) * k)))
    height = max(1, _TILE_ELEMENTS // max(width, len(snapshots) * k))
    ensemble.method.prepare(snapshots)
    for start in range(0, m, width):
        targets = slice(start, min(start + width, m))
        for block in ensemble.score([_tile(snapshot, targets, height) for snapshot in snapshots]):
            rows = slice(block.rows.start, block.rows.stop)
            left_out = None if trained_on is None else ~trained_on[rows]
            own = block if left_out is None else _without(block, left_out)
            self_influence[rows] = own.self_influence
            if candidates is not None:
                candidates.add(own.rows, targets, own.scores.cpu())
            elif found is not None:
                found.add(own.rows, targets, own.scores.cpu(), left_out)  # where the extremes are kept
            else:
                values[rows, targets] = own.scores
    if candidates is not None:
        return candidates.total(reduce), reduce(self_influence)
    if found is not None:
        return found.total(share, reduce), reduce(self_influence)
    scores = ScoreMatrix(reduce(values), trained_on=trained_on, target_slopes=slopes)
    return scores, reduce(self_influence)


def _without(block: ScoreBlock, left_out: Tensor) -> ScoreBlock:
    """Set the scores of some rows of a block to zero."""
    left_out = left_out.to(block.scores.device)
    scores = block.scores.masked_fill(left_out[:, None], 0)
    return ScoreBlock(block.rows, scores, block.self_influence.masked_fill(left_out.to(block.self_influence.device), 0))


def _tell_of_undrawn_rows(
    method: AttributionMethod | Ensemble, snapshots: Sequence[SnapshotFeatures], trained_on: Tensor | None
) -> None:
    """Say where samples that training never draws have a part in what a method learns of the training set."""
    method = method.method if isinstance(method, Ensemble) else method
    runs_module = snapshots[0].model is not None and not isinstance(method, TracIn)  # which learns nothing
    if runs_module and trained_on is not None and not trained_on.all():
        log.warning(
            "%s runs the module on all %d training samples: the %d that training never draws get scores of zero, but "
            "count in what it learns of the training set (curvature, kernel, head or neighbours). Give the run a data "
            "set without them (torch.utils.data.Subset) to leave them out.",
            type(method).__name__,
            len(trained_on),
            int((~trained_on).sum()),
        )


def score_self_influence(method: AttributionMethod, snapshot: SnapshotFeatures, n_train: int) -> Tensor:
    """Score every training row for its own model output alone.

    Returns self-influence ``(n_train,)``, float32.
    """
    self_influence = torch.zeros(n_train)
    for block in method.score([_tile(snapshot, slice(0, 0), _TILE_ELEMENTS)]):
        self_influence[block.rows.start : block.rows.stop] = block.self_influence
    return self_influence


def _tile(snapshot: SnapshotFeatures, targets: slice, height: int) -> SnapshotFeatures:
    """Restrict a snapshot to some targets, and its blocks to so many rows."""

    def blocks() -> Iterator[tuple[range, Mapping[str, Tensor]]]:
        for rows, columns in snapshot.blocks():
            for start in range(0, len(rows), height):
                part = slice(start, start + height)
                yield rows[part], {name: values[part] for name, values in columns.items()}

    columns = {name: values[targets] for name, values in snapshot.targets.items()}
    return replace(snapshot, blocks=blocks, targets=columns, target_rows=snapshot.target_rows[targets])
