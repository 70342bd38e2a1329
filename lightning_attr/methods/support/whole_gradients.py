"""Inner products of whole gradients, multiplied as the module gives them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from lightning_attr.methods.base import ScoreBlock, SnapshotFeatures
from lightning_attr.methods.support.module_method import model_of

_SHORTEST = 1e-12
"""As `torch.nn.functional.normalize` has it: a gradient of zeros has the cosine zero with all others."""


def exact_scores(
    snapshot: SnapshotFeatures,
    weight: float = 1.0,
    normalize: bool | str = False,
    rates: Mapping[str, float] | None = None,
) -> Iterator[ScoreBlock]:
    r"""Score by :math:`-\omega \nabla\ell_i \cdot \nabla f_j` at one snapshot.

    Yields blocks of this process's training rows.
    """
    model = model_of(snapshot)
    factors = model.gradient_factors(rates)
    parts = factors.of_layers() if normalize == "layer" else [factors]
    shares = [part.weight if normalize == "layer" else 1.0 for part in parts]
    targets = model.targets(factors, snapshot.target_rows)["features"]
    lengths = [_lengths(part.squares(targets)) for part in parts]
    for rows, columns in model.train(factors):
        features, out_to_loss = columns["features"], columns["out_to_loss"]
        squares = [part.squares(features) for part in parts]
        if not normalize:
            out_to_loss = weight * out_to_loss
            yield ScoreBlock(
                rows, factors.products(features, targets).mul_(out_to_loss[:, None]), out_to_loss * squares[0]
            )
            continue
        out_to_loss = weight * out_to_loss.sign() / len(parts)
        own = [_lengths(square) for square in squares]
        cosines = sum(
            share * part.products(features, targets) / (length[:, None] * of_targets)
            for part, length, of_targets, share in zip(parts, own, lengths, shares, strict=True)
        )
        norms = sum(
            share * square / length.square() for square, length, share in zip(squares, own, shares, strict=True)
        )
        yield ScoreBlock(rows, out_to_loss[:, None] * cosines, out_to_loss * norms)


def exact_sum(
    snapshots: Sequence[SnapshotFeatures],
    weights: Sequence[float],
    normalize: bool | str = False,
    rates: Sequence[Mapping[str, float] | None] | None = None,
) -> Iterator[ScoreBlock]:
    """Add up the scores of several snapshots, one after the other: weights are loaded once.

    Yields blocks of this process's training rows: of a single snapshot as they come, of several when all are there.
    """
    rates = rates or [None] * len(snapshots)
    if len(snapshots) == 1:
        yield from exact_scores(snapshots[0], weights[0], normalize, rates[0])
        return
    total: list[ScoreBlock] = []
    for snapshot, weight, own in zip(snapshots, weights, rates, strict=True):
        for place, block in enumerate(exact_scores(snapshot, weight, normalize, own)):
            if place == len(total):
                total.append(block)
            else:
                total[place].scores.add_(block.scores)
                total[place].self_influence.add_(block.self_influence)
    yield from total


def _lengths(squares: Tensor) -> Tensor:
    return squares.sqrt().clamp(min=_SHORTEST)
