"""Brittleness by retraining: which sets to remove, and the curve from what retraining without them gave."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lightning_attr.arguments.checks import check_instance, check_int, check_numbers
from lightning_attr.arguments.listed import check_ints
from lightning_attr.arguments.messages import argument_message
from lightning_attr.evaluation.ground_truth import GroundTruth
from lightning_attr.metrics.brittleness import FlipCurve, brittleness_curve
from lightning_attr.results.score_matrix import ScoreMatrix
from lightning_attr.results.top_scores import TopScores

_DEPTH = "Each target has so many scores: of all training samples, or the `topk` of this result."


def proponent_sets(scores: ScoreMatrix | TopScores, targets: Sequence[int], counts: Sequence[int]) -> list[list[int]]:
    """List what to remove for a brittleness curve: the top proponents of each target, fewest first.

    Args:
        scores: all scores, or top scores with at least ``max(counts)`` a target.
        targets: columns of the scores.
        counts: how many proponents to remove, ascending.

    Returns:
        ``len(targets) * len(counts)`` sets of indices into the training data, target after target, for
        :func:`lightning_attr.evaluation.retrain_without`. A set is smaller than its count where a target has fewer
        samples of positive score.

    Raises:
        ValueError: if ``counts`` are not ascending from 1 to the number of training samples or ``topk``, a target is
            out of range, or has no proponents.

    Example:
        >>> scores = ScoreMatrix(torch.tensor([[1.0, -2.0], [3.0, 4.0], [2.0, 1.0]]))
        >>> proponent_sets(scores, targets=[0, 1], counts=[1, 2])
        [[1], [1, 2], [1], [1, 2]]
    """
    owner = "proponent_sets"
    check_instance(owner, "scores", scores, (ScoreMatrix, TopScores), "the `scores` of a result")
    columns = check_ints(owner, "targets", targets, 0, scores.shape[1] - 1, "a list of columns")
    counts = ascending_counts(owner, counts)
    check_int(owner, "counts[-1]", counts[-1], maximum=scores.depth, remedy=_DEPTH)
    indices, values = scores.topk(counts[-1])
    sets = []
    for target in columns:
        proponents = indices[target][values[target] > 0].tolist()
        if not proponents:
            raise ValueError(f"Expected targets with proponents, but no score of target {target} is positive.")
        sets += [proponents[:count] for count in counts]
    return sets


def ascending_counts(owner: str, counts: Any) -> list[int]:
    """Check how many samples are removed.

    Example:
        >>> ascending_counts("brittleness", (1, 5))
        [1, 5]
    """
    expected = "a list of ascending positive integers"
    found = check_numbers(owner, "counts", counts, expected)
    whole = found.ndim == 1 and len(found) > 0 and found.dtype != torch.bool and not found.is_floating_point()
    if not whole or found[0] < 1 or (found.diff() <= 0).any():
        raise ValueError(argument_message(owner, "counts", expected, counts))
    return [int(count) for count in found]


def brittleness(
    ground_truth: GroundTruth,
    targets: Sequence[int],
    counts: Sequence[int],
    random: GroundTruth | None = None,
) -> FlipCurve:
    """Give the share of targets that retraining without their top proponents gets wrong.

    A target is right while its output is positive, as :func:`lightning_attr.metrics.brittleness_curve` says: the margin
    of :class:`lightning_attr.outputs.MulticlassMargin` is positive only where the right class is likelier than all
    others together.

    Args:
        ground_truth: retrained without the sets of :func:`proponent_sets` for these targets and counts.
        targets: columns, as there.
        counts: as there.
        random: retrained without as many random sets, in the same order, for comparison.

    Returns:
        The curve.

    Raises:
        ValueError: if the sets are not ``len(counts)`` nested ones for each target, of at most these sizes; or as
            :func:`lightning_attr.metrics.brittleness_curve`.

    Example:
        >>> from pathlib import Path
        >>> masks = torch.tensor([[True, True, True], [False, True, True], [False, True, False]])  # all, two sets
        >>> outputs = torch.tensor([[[2.0], [1.0], [-0.5]]])
        >>> truth = GroundTruth(Path(), "without", masks, outputs, torch.zeros(1, 3, dtype=torch.int64), {})
        >>> brittleness(truth, targets=[0], counts=[1, 2]).success["method"]
        tensor([0., 1.], dtype=torch.float64)
    """
    remedy = "Open a directory with `GroundTruth.open(dirpath)`."
    check_instance("brittleness", "ground_truth", ground_truth, GroundTruth, "a GroundTruth", remedy)
    counts = ascending_counts("brittleness", counts)
    columns = list(targets)
    before = ground_truth.reference[:, columns]
    method = _after("ground_truth", ground_truth, columns, counts)
    other = None if random is None else _after("random", random, columns, counts)
    return brittleness_curve(counts, before, method, other)


def _after(name: str, truth: GroundTruth, targets: list[int], counts: Sequence[int]) -> Tensor:
    """Give the output of each target after its own removals, ``(seeds, counts, targets)``."""
    removed = truth.removed
    if len(removed) != len(targets) * len(counts):
        raise ValueError(
            f"Expected argument `{name}` with {len(targets)} x {len(counts)} removed sets, one a target and count, but "
            f"{truth.dirpath} has {len(removed)}. Retrain without the sets of `proponent_sets`."
        )
    for number, target in enumerate(targets):
        own = removed[number * len(counts) : (number + 1) * len(counts)]
        nested = name == "random" or all(set(a) <= set(b) for a, b in pairwise(own))
        if not nested or any(len(one) > count for one, count in zip(own, counts, strict=True)):
            raise ValueError(
                f"Expected argument `{name}` with sets of at most {list(counts)} samples for each target, each holding "
                f"the one before, but those of target {target} have {[len(one) for one in own]} and are "
                f"{'' if nested else 'not '}nested. Retrain without the sets of `proponent_sets`, in their order."
            )
    after = truth.outputs[:, 1:].unflatten(1, (len(targets), len(counts)))  # (seeds, targets, counts, n_target)
    return torch.stack([after[:, number, :, target] for number, target in enumerate(targets)], dim=2)
