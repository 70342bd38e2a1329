"""Choosing how much damping a method adds to its curvature."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lightning_attr.arguments.checks import check_float
from lightning_attr.methods.base import AttributionMethod, SnapshotFeatures, check_method
from lightning_attr.methods.cache import CacheKey
from lightning_attr.methods.support.subset_truth import SubsetTruth, check_subset_truth, mask_digests
from lightning_attr.metrics.correlation import correlation_score

_DAMPING: CacheKey[float] = CacheKey("damping")
_GRID = (1e-3, 1e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
_SHARE, _FEWEST, _MOST = 0.1, 16, 1024
"""Targets to choose by: this share of them, but not fewer nor more."""


@dataclass(frozen=True)
class DampingChoice:
    """A damping, and why it was chosen.

    Args:
        damping: the one chosen.
        grid: all that were tried.
        lds: linear datamodeling score of each on the held-out targets.
        targets: rows of these targets, which are not for reporting.

    Example:
        >>> DampingChoice(0.1, [0.1, 1.0], [0.5, 0.4], range(0, 20, 7)).record
        {'damping': 0.1, 'grid': [0.1, 1.0], 'lds': [0.5, 0.4], 'targets': [0, 7, 14]}
    """

    damping: float
    grid: Sequence[float]
    lds: Sequence[float]
    targets: range

    @property
    def record(self) -> dict[str, Any]:
        """The same as plain values, for the provenance of a result."""
        return {name: list(values) if name != "damping" else values for name, values in vars(self).items()}


def choose_damping(
    method: AttributionMethod,
    snapshots: Sequence[SnapshotFeatures],
    truth: SubsetTruth,
    grid: Sequence[float] = _GRID,
) -> DampingChoice:
    """Choose the damping whose scores predict retraining best, on a small share of the targets.

    A tenth of the targets decides, or some 16 where they are few: every p-th one, with p prime, so that no regular
    order of the classes falls into step with it. Nothing is featurized again; each damping costs a solve and the scores
    for these targets.

    Args:
        method: any method with an attribute ``damping``.
        snapshots: with all targets.
        truth: models retrained on at least 20 subsets, which are not to be reported on.
        grid: dampings to try.

    Returns:
        The one with the highest linear datamodeling score; of equals the highest.

    Raises:
        AttributionError: if the truth is not finished.
        StoreMismatchError: if it is of other data.
        ValueError: if there are fewer than 20 subsets, the grid is empty, or no damping gives a score.

    Example:
        >>> from types import SimpleNamespace
        >>> from lightning_attr.methods import TRAK
        >>> phi = torch.linspace(-1, 1, 60).reshape(30, 2).sin()
        >>> train = {"features": phi, "out_to_loss": torch.ones(30), "newton_weight": torch.ones(30)}
        >>> snapshot = SnapshotFeatures.of(train, {"features": phi[:5]})
        >>> masks = torch.rand(20, 30, generator=torch.Generator().manual_seed(0)) < 0.5
        >>> outputs = (masks.float() @ phi @ phi[:5].T)[None]                # where Grad-Dot is right
        >>> truth = SimpleNamespace(kind="lds", masks=masks, outputs=outputs)
        >>> choose_damping(TRAK(), [snapshot], truth, grid=[0.01, 1.0, 100.0]).damping
        100.0
    """
    check_method("choose_damping", method)
    grid = [check_float("choose_damping", "grid", damping, minimum=0) for damping in grid]
    if not grid:
        raise ValueError("Expected argument `grid` to hold at least one damping, but it is empty.")
    n_target = len(snapshots[0].targets["features"])
    check_subset_truth("choose_damping", truth, snapshots[0].n_train or None, n_target)
    targets = _held_out(n_target)
    parts = [
        replace(
            snapshot,
            targets={name: values[targets.start :: targets.step] for name, values in snapshot.targets.items()},
            target_rows=snapshot.target_rows[targets.start :: targets.step],
        )
        for snapshot in snapshots
    ]
    lds = [_datamodeling_score(method, damping, parts, truth) for damping in grid]
    defined = [(score, damping) for score, damping in zip(lds, grid, strict=True) if not math.isnan(score)]
    if not defined:
        raise ValueError(
            "Expected argument `truth` to tell dampings apart, but on the held-out targets its outputs, or the scores, "
            "are constant over the subsets."
        )
    return DampingChoice(max(defined)[1], list(grid), lds, targets)


def check_damping(owner: object, damping: float | str, truth: SubsetTruth | None) -> float | str:
    """Check a method's arguments."""
    if isinstance(damping, str) and damping == "auto":
        if truth is None:
            raise ValueError(
                'Expected argument `truth` with `damping="auto"`, models retrained on subsets to choose by, but got '
                "none. Pass `truth=GroundTruth.open(...)`, or a number."
            )
        check_subset_truth(owner, truth)
        return damping
    damping = check_float(owner, "damping", damping, minimum=0, also="'auto'")
    if truth is not None:
        raise ValueError(f'Expected argument `truth` only with `damping="auto"`, but got `damping={damping}`.')
    return damping


class DampedMethod(AttributionMethod):
    """A method with a damping, which may be "auto": then :meth:`prepare` chooses it.

    Its constructor sets ``damping`` and ``truth``, once :func:`check_damping` has seen them, and its ``score`` asks for
    :meth:`damping_at`. What it keeps in a snapshot's ``cache`` serves every damping.

    Attributes:
        damping: a number, or "auto".
        truth: what "auto" chooses by.
        usual_damping: what is used, and suggested, where there is nothing to choose by.

    Example:
        >>> from lightning_attr.methods import TRAK
        >>> isinstance(TRAK(), DampedMethod)
        True
    """

    damping: float | str
    truth: SubsetTruth | None
    usual_damping: float = 1.0

    def prepare(self, snapshots: Sequence[SnapshotFeatures]) -> None:
        """Choose the damping, if that is wanted; see :meth:`AttributionMethod.prepare`.

        Args:
            snapshots: with all targets.
        """
        if self.truth is not None:
            choice = choose_damping(self, snapshots, self.truth)
            for snapshot in snapshots:
                snapshot.cache.keep(_DAMPING, choice.damping)
                snapshot.evidence["damping_choice"] = choice.record

    def damping_at(self, snapshot: SnapshotFeatures) -> float:
        """Give the damping as a number.

        Args:
            snapshot: that is scored.

        Returns:
            The one given or chosen; :attr:`usual_damping` for "auto" without targets, as for self-influence alone.

        Raises:
            ValueError: if it was not chosen yet.
        """
        if not isinstance(self.damping, str):
            return self.damping
        chosen = snapshot.cache.find(_DAMPING)
        if chosen is not None:
            return chosen
        if len(snapshot.targets["features"]):
            raise ValueError('Expected a damping, but with `damping="auto"` it is still to be chosen: call `prepare`.')
        return self.usual_damping

    @property
    def config(self) -> dict[str, Any]:
        """Name and arguments; of the truth, the digests of its masks, ``fitted_on``."""
        config = {name: value for name, value in super().config.items() if name != "truth"}
        return config if self.truth is None else {**config, "fitted_on": mask_digests(self.truth.masks)}


def _held_out(n_target: int) -> range:
    count = min(n_target, _MOST, max(_FEWEST, math.ceil(_SHARE * n_target)))
    step = math.ceil(n_target / count) if count else 1
    while any(step % divisor == 0 for divisor in range(2, math.isqrt(step) + 1)):
        step += 1
    return range(step // 2, n_target, step)


def _datamodeling_score(
    method: AttributionMethod, damping: float, snapshots: Sequence[SnapshotFeatures], truth: SubsetTruth
) -> float:
    trial: Any = copy.copy(method)
    trial.damping = damping
    targets = list(snapshots[0].target_rows)
    predicted = torch.zeros(len(truth.masks), len(targets), dtype=torch.float64)
    for block in trial.score(snapshots):
        weights = truth.masks[:, block.rows.start : block.rows.stop].double()
        predicted += weights @ block.scores.double().cpu()
    measured = truth.outputs[..., targets].double()
    return correlation_score(snapshots[0].reduce(predicted), measured, "spearman", 0, 0.95, 0).mean.item()
